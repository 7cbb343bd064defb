"""Building through TensorRT's Python interface, which TensorRT and TensorRT-RTX share line by line.

Measured with TensorRT-RTX 1.7.1: a plan cannot be deserialized without a GPU driver (cudaError 35), so the engine's
inputs and outputs are read from the parsed network, whose bindings the plan keeps. TensorRT only warns of shapes that
no run can have, and ignores failing writes: both are errors here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from onnxtools.base.errors import JobError
from onnxtools.base.memory import releasing_pages
from onnxtools.base.progress import DELAY_SECONDS
from onnxtools.engines.build import last_words
from onnxtools.engines.build.audit import audit_engine
from onnxtools.engines.build.builder import Built
from onnxtools.engines.build.profiles import Profile
from onnxtools.engines.build.spec import EngineSpec, pool_size, pool_type
from onnxtools.engines.build.timing_cache import TimingCache
from onnxtools.engines.tensorrt import network as net
from onnxtools.engines.tensorrt.lowering import lowered
from onnxtools.engines.tensorrt.plan_file import PlanFile
from onnxtools.ir.model import Model
from onnxtools.storage.rows import external_path

_LOG = logging.getLogger("onnxtools")
IO_SOURCE = "parsed network (a plan is read back on a GPU only)"


class ApiBuilder:
    """The common part of the backends `tensorrt` and `tensorrt-rtx`; the methods are those of `Builder`.

    Attributes:
        trt: the module of the library.
        name: name of the backend.
        title: name of the library, for people.
    """

    name: str
    title: str

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self._tools = _tools(trt)

    def version(self) -> str:
        return str(self.trt.__version__)

    def supports(self, op_type: str) -> bool:
        if not hasattr(self, "_parser"):
            builder = self.trt.Builder(self._tools.logger)
            self._network = builder.create_network(self.network_flags(strong=True))
            self._parser = self.trt.OnnxParser(self._network, self._tools.logger)
        return bool(self._parser.supports_operator(op_type))

    def network_flags(self, *, strong: bool) -> int:
        """The flags of `create_network`."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 1 << int(flag) if strong and flag is not None else 0

    def changes(self, model: Model) -> list[Callable[[Model], list[str]]]:
        """What this library alone changes in a copy of the graph; each returns notes."""
        return []

    def configure(self, config: Any, spec: EngineSpec, *, strong: bool) -> None:
        """Set the options of `config` that only this library has."""

    def strong(self, model: Model, spec: EngineSpec) -> bool:
        """Whether the network is strongly typed."""
        return True

    def build(self, model: Model, source: Path, plan: Path, profiles: Sequence[Profile], spec: EngineSpec) -> Built:
        with _monitor(self._tools) as monitor:
            return self._build(model, source, plan, profiles, spec, monitor)

    def _build(
        self, model: Model, source: Path, plan: Path, profiles: Sequence[Profile], spec: EngineSpec, monitor: Any
    ) -> Built:
        logger, strong = self._tools.logger, self.strong(model, spec)
        logger.clear()
        builder = self.trt.Builder(logger)
        network = builder.create_network(self.network_flags(strong=strong))
        parser = self.trt.OnnxParser(network, logger)  # the parser owns the weights and must outlive the build
        lowering = lowered(model, *self.changes(model))
        graph, changes = lowering if lowering else (None, [])
        parsed = parser.parse(graph, str(source)) if graph is not None else parser.parse_from_file(str(source))
        monitor.check()
        if not parsed:
            raise JobError(self._parser_error(model, parser))
        net.refuse_shape_inputs(model, network)
        mends = [*changes, *net.mend_attention(self.trt, network)]
        inputs, outputs = net.read_io(network)
        if strong:
            net.check_io(model, inputs, outputs)
        layers, precisions = net.histogram(network)
        config = self._config(builder, profiles, spec)
        self.configure(config, spec, strong=strong)
        cache = TimingCache.open(self.name, config, spec)
        weights = {external_path(tensor) for tensor in model.external_tensors()}
        with PlanFile(plan) as file, releasing_pages(weights):
            self._serialize(model, builder, network, config, file, spec, monitor)
        notes = cache.save() if cache is not None else []
        return Built(
            inputs,
            outputs,
            io_source=IO_SOURCE,
            layers=layers,
            precisions=precisions,
            mends=mends,
            notes=notes,
            warnings=logger.lines(self.trt.ILogger.WARNING),
            size=file.size,
            sha256=file.sha256,
            engine_layers=audit_engine(self.trt, logger, plan),
        )

    def _config(self, builder: Any, profiles: Sequence[Profile], spec: EngineSpec) -> Any:
        trt, config = self.trt, builder.create_builder_config()
        config.profiling_verbosity = getattr(trt.ProfilingVerbosity, spec.profiling_verbosity.upper())
        flags = trt.BuilderFlag
        switches = {
            "SPARSE_WEIGHTS": spec.sparsity != "disable",
            "REFIT": spec.refit,
            "STRIP_PLAN": spec.strip_weights,
            "WEIGHT_STREAMING": spec.allow_weight_streaming,
            "VERSION_COMPATIBLE": spec.version_compatible,
            "ERROR_ON_TIMING_CACHE_MISS": spec.error_on_cache_miss,
        }
        for flag, on in switches.items():
            if on:
                config.set_flag(getattr(flags, flag))
        if not spec.tf32:
            config.clear_flag(flags.TF32)
        if spec.builder_optimization_level is not None:
            config.builder_optimization_level = spec.builder_optimization_level
        if spec.tiling_optimization_level is not None:
            config.tiling_optimization_level = getattr(
                trt.TilingOptimizationLevel, spec.tiling_optimization_level.upper()
            )
        for text in spec.mem_pool_size:
            pool, size = pool_size(text)
            config.set_memory_pool_limit(getattr(trt.MemoryPoolType, pool_type(pool)), size)
        for path in spec.plugins:
            if not Path(path).is_file():
                raise JobError(f"--plugins {path}: no such file")
            trt.get_plugin_registry().load_library(path)
        for profile in profiles:
            optimization_profile = builder.create_optimization_profile()
            for name, span in profile.shapes.items():
                optimization_profile.set_shape(name, span.min, span.opt, span.max)
            if config.add_optimization_profile(optimization_profile) < 0:
                raise JobError(f"profile {profile.name!r} is refused: {self._tools.logger.reason()}; change the shapes")
        return config

    def _serialize(
        self, model: Model, builder: Any, network: Any, config: Any, plan: PlanFile, spec: EngineSpec, monitor: Any
    ) -> None:
        if hasattr(config, "progress_monitor"):
            config.progress_monitor = monitor
        if hasattr(builder, "build_serialized_network_to_stream"):
            result = builder.build_serialized_network_to_stream(network, config, self._tools.Writer(plan))
        else:  # before TensorRT 10
            result = builder.build_serialized_network(network, config)
            if result is not None:
                plan.take(memoryview(result))
        monitor.check()
        plan.finish()
        logger = self._tools.logger
        unfit = [line for _, text in logger.messages if re.search(_UNFIT, line := _plain(text))]
        if unfit:
            raise JobError(
                f"{model.path}: the graph cannot run in its profiles: {unfit[0]}; lower --max-seq-len or the shapes"
            )
        if (not result or plan.size == 0) and (spec.refit or spec.strip_weights) and "Myelin" in logger.reason():
            needs = f"{self.title} makes a refittable engine on a machine with a GPU alone"
            raise JobError(f"{model.path}: {needs}; build it there, or leave --refit and --strip-weights out")
        if not result or plan.size == 0:
            raise JobError(
                f"{model.path}: {self.title} cannot build it: {logger.reason()}; see the graph with `onnxtools inspect`"
            )

    def _parser_error(self, model: Model, parser: Any) -> str:
        """One line for a single parser error, else a heading and one line for each error."""
        lines = [_parser_line(model, parser.get_error(i)) for i in range(parser.num_errors)]
        advice = (
            "see it with `onnxtools inspect`; `onnxtools fold-constants` and `onnxtools convert` remove much of what "
            "parsers refuse"
        )
        if not lines:
            return f"{model.path}: {self.title} cannot parse it: {self._tools.logger.reason()}; {advice}"
        if len(lines) == 1:
            return f"{model.path}: {self.title}'s parser refuses {lines[0]}; {advice}"
        return "\n  ".join([f"{model.path}: {self.title}'s parser refuses {len(lines)} nodes; {advice}", *lines])


_UNFIT = r"Profile k(MIN|MAX) values are not self-consistent|k(MIN|OPT|MAX) values for profile"
"""Messages on shapes that the graph contradicts.

With the second message the build fails; the first is only a warning, but the engine would fail.
"""


_NOISE = r"cudaError 35|Make sure input .* has Int64 binding"


@functools.cache
def _tools(trt: Any) -> SimpleNamespace:
    """Subclasses of the module's interfaces, and the only logger.

    TensorRT keeps the first logger of a process as long as an object made with it lives.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors and warnings and drops other messages.

        It also drops the messages of every build: that there is no GPU, and that 64-bit inputs have 64 bits.
        """

        def __init__(self) -> None:
            super().__init__()
            self.messages: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            last_words.say(message)
            _LOG.debug("%s: %s", severity.name, message)
            if severity <= trt.ILogger.WARNING and not re.search(_NOISE, message):
                self.messages.append((severity, message))

        def clear(self) -> None:
            self.messages.clear()

        def lines(self, severity: Any) -> list[str]:
            """Messages of one severity, each once, without TensorRT's source positions."""
            return list(dict.fromkeys(_plain(text) for kind, text in self.messages if kind == severity))

        def reason(self) -> str:
            """The errors as one line."""
            lines = self.lines(trt.ILogger.INTERNAL_ERROR) + self.lines(trt.ILogger.ERROR)
            return "; ".join(lines) or "no reason given (another logger is active in this process)"

    class Writer(getattr(trt, "IStreamWriter", object)):  # type: ignore[misc]
        """Takes the plan piece by piece while `PlanFile` writes the piece before.

        TensorRT ignores a failed write, so `PlanFile` keeps the error.
        """

        def __init__(self, plan: PlanFile) -> None:
            super().__init__()
            self.plan = plan

        def write(self, data: bytes) -> int:
            """Take a piece of the plan; returns how many bytes were taken."""
            return self.plan.take(data)

    class Monitor(getattr(trt, "IProgressMonitor", object)):  # type: ignore[misc]  # since TensorRT 9
        """Shows the phases on a terminal if a build takes longer than two seconds, and stops a cancelled build."""

        def __init__(self, bars: Any | None) -> None:
            super().__init__()
            self.cancelled = 0  # or the number of the signal
            self.bars = bars
            self.tasks: dict[str, Any] = {}
            self.started = time.monotonic()
            self.visible = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            _LOG.info("building: %s, %d steps", phase_name, num_steps)
            if self.bars is not None:
                self.tasks[phase_name] = self.bars.add_task(phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Update the progress; returns whether the build goes on."""
            if self.bars is not None and phase_name in self.tasks:
                if not self.visible and time.monotonic() - self.started > DELAY_SECONDS:
                    self.bars.start()
                    self.visible = True
                self.bars.update(self.tasks[phase_name], completed=step + 1)
            return not self.cancelled

        def check(self) -> None:
            if self.cancelled:
                raise KeyboardInterrupt if self.cancelled == signal.SIGINT else SystemExit(128 + self.cancelled)

        def close(self) -> None:
            if self.bars is not None and self.visible:
                self.bars.stop()

        def phase_finish(self, phase_name: str) -> None:
            if self.bars is not None and phase_name in self.tasks:
                self.bars.remove_task(self.tasks.pop(phase_name))

    return SimpleNamespace(logger=Logger(), Writer=Writer, Monitor=Monitor)


def _plain(text: str) -> str:
    """A message of TensorRT as one line, without source files, error codes and advice about other APIs."""
    text = " ".join(line for line in text.splitlines() if "cudaError 35" not in line)
    text = re.sub(r"^\w+::\w+: Error Code \d+: ", "", text)
    text = re.sub(r"\w+\.(cpp|h):\d+: ", "", text)
    text = re.sub(r" ?\(See https?://[^)]*\)|\.? In \S+ at /_src/[^ )]*", "", text)
    text = re.sub(r"^Internal Error \((.*)\)$", r"\1", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".")


def _parser_line(model: Model, error: Any) -> str:
    """`node 'X' (Op) -> 'output': reason`; the output is how ONNX Runtime knows a node without a name."""
    name = error.node_name()
    outputs = [node.outputs[0].name for node in model.graph.all_nodes() if name and node.name == name]
    makes = f" -> {outputs[0]!r}" if outputs else ""
    reason = _plain(error.desc())
    quoted = re.search(r'&& "([^"]*)"', reason) or re.match(r"Assertion failed: .*?: (.+)", reason)
    if quoted:
        reason = quoted.group(1)
    if reason == "false":
        reason = "this operator cannot be parsed here"
    where = repr(name) if name else f"number {error.node()}"
    return f"node {where} ({error.node_operator()}){makes}: {reason.rstrip('.')}"


@contextlib.contextmanager
def _monitor(tools: SimpleNamespace) -> Iterator[Any]:
    """A monitor for parser and builder, which Ctrl-C or SIGTERM cancels.

    The signal handlers raise nothing: TensorRT would lose an exception that passes through its frames.
    """
    monitor = tools.Monitor(_bars())

    def cancel(signum: int, frame: Any) -> None:
        monitor.cancelled = signum

    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield monitor
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        monitor.close()


def _bars() -> Any | None:
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
