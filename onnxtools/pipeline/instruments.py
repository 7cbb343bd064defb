"""What can be hung on a `PassManager`: time, memory, node counts, dumps, checks, and a reproducer for crashes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from onnxtools.analysis.cache import is_present
from onnxtools.analysis.facts import token_input
from onnxtools.base.errors import JobError, OnnxtoolsError, one_line
from onnxtools.base.memory import peak_mib
from onnxtools.check.feeds import (
    OWN_INPUTS,
    Array,
    Feeds,
    Probe,
    in_types_of,
    long_probe,
    many_tokens,
    probes,
    too_costly,
    with_causal_mask,
)
from onnxtools.check.runner import Runner
from onnxtools.check.validate import Difference, decode, default_tolerance, empty_cache, is_cached, validate_ranks
from onnxtools.ir.model import Model
from onnxtools.ir.part import TABLE_ROWS, beginning
from onnxtools.ir.query import has_dynamic_scales
from onnxtools.pipeline.manager import Instrument, Step
from onnxtools.pipeline.partition import Partition
from onnxtools.pipeline.passbase import Pass

CHECK_LIMIT = 256 << 20
"""Models with fewer weight bytes than this are compared in full by default."""
PART_LIMIT = 512 << 20
"""Of larger ones, as many bytes of weights from the beginning on."""
WARN, FAIL = 0.3, 1.0
"""Relative L2 of a lossy pass: above the one it is said, above the other refused.

At 1 the difference is as large as the outputs.
"""
_SECONDS = 60.0
"""A run that nobody asked for is ended after so long."""


class Timing(Instrument):
    """Wall time of each pass, in seconds (`measures['seconds']`)."""

    def before(self, pass_: Pass, model: Model) -> None:
        self._start = time.perf_counter()

    def after(self, pass_: Pass, model: Model, step: Step) -> None:
        step.measures["seconds"] = time.perf_counter() - self._start


class PeakMemory(Instrument):
    """Peak resident set of the process so far, in MiB (`measures['peak_mib']`)."""

    def after(self, pass_: Pass, model: Model, step: Step) -> None:
        step.measures["peak_mib"] = peak_mib()


class NodeCount(Instrument):
    """Nodes before and after (`measures['nodes_before']`, `['nodes_after']`)."""

    def before(self, pass_: Pass, model: Model) -> None:
        self._count = len(model.graph)

    def after(self, pass_: Pass, model: Model, step: Step) -> None:
        step.measures["nodes_before"], step.measures["nodes_after"] = self._count, len(model.graph)


class Dump(Instrument):
    """Writes the graph after each pass that changed it: `FOLDER/NN-pass.onnx`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JobError(f"--dump {folder}: cannot be made a folder ({error.strerror}); name another") from None

    def after(self, pass_: Pass, model: Model, step: Step) -> None:
        self._index += 1
        if step.result.changed:
            copy = Model(model.ir.clone(), model.path)
            copy.save(self.folder / f"{self._index:02d}-{pass_.name}.onnx")


class Checker(Instrument):
    """onnx.checker with strict shape inference, on the graph without its large weights: after each pass, or once at the
    end.

    A pass must not break a valid graph; one that was invalid when it came (exporters record wrong shapes) may stay so
    until a pass has mended it.
    """

    def __init__(self, each: bool = True) -> None:
        self.each = each
        self._valid: bool | None = None

    def before(self, pass_: Pass, model: Model) -> None:
        if self._valid is None:
            self._valid = _check(model) is None if self.each else True

    def after(self, pass_: Pass, model: Model, step: Step) -> None:
        if self.each and step.result.changed:
            self._judge(model, f"pass {pass_.name!r}")

    def finished(self, model: Model) -> None:
        if self.each:
            return
        if _check(model) is not None and model.path is not None:  # rare, so only now look at what came in
            self._valid = _check(Model.load(model.path)) is None
        self._judge(model, "the chain of passes")

    def _judge(self, model: Model, culprit: str) -> None:
        reason = _check(model)
        if reason is not None and self._valid:
            wrong = "existing shape" in reason or "existing type" in reason
            hint = "a recorded shape is wrong: run `onnxtools drop-stale-types` first" if wrong else "please report it"
            raise JobError(f"{culprit} made an invalid graph: {reason}; {hint} (--no-check writes it nevertheless)")
        self._valid = reason is None


def _check(model: Model) -> str | None:
    try:
        onnx.checker.check_model(skeleton(model), full_check=True)
    except Exception as error:  # the checker raises several types
        return one_line(error)
    return None


def skeleton(model: Model) -> onnx.ModelProto:
    """The graph as a proto in which weights above 1 KiB are inputs: small enough to check whatever the model's size."""
    tensors = {}
    for value, tensor in list(model.weights()):
        if tensor.nbytes > 1024:
            tensors[value] = tensor
            value.const_value = _placeholder(tensor, value.name or "")
    try:
        proto = model.proto()
    finally:
        for value, tensor in tensors.items():
            value.const_value = tensor
    large = {value.name for value in tensors}
    kept = [initializer for initializer in proto.graph.initializer if initializer.name not in large]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    names = {value.name for value in proto.graph.input}
    for value, tensor in tensors.items():
        if value.name not in names:
            shape = [int(d) for d in tensor.shape.numpy()]
            proto.graph.input.append(onnx.helper.make_tensor_value_info(value.name or "", tensor.dtype.value, shape))
    return proto


def _placeholder(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    return ir.ExternalTensor(
        "none", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(list(tensor.shape.numpy())), name=name, base_dir=""
    )


@dataclass(frozen=True)
class _Compared:
    """What is compared before and after a pass: outputs on several inputs, or inner values of a part.

    Attributes:
        names: of inner values, in graph order; None: the outputs of the whole graph.
        expected: the values on each of the probes.
    """

    probes: list[Probe]
    names: list[str] | None
    expected: list[dict[str, Array]]


class NumericCheck(Instrument):
    """Runs the graph on ONNX Runtime after each pass and compares it with the graph before (`measures['rel_l2']`).

    A model of less than `CHECK_LIMIT` bytes of weights is compared in full: with token ids all over the vocabulary, a
    padded row, and at positions beyond 4,000 where it has them. Of a larger one the first layers are, up to
    `PART_LIMIT` bytes; `measures['sampled']` says how much that was and what it cost. A pass that declares itself exact
    or rounding must stay within `tolerance`; of a lossy one a difference above `WARN` is said and one above `FAIL`
    refused, and what it made becomes the reference of the next.

    Args:
        feeds: inputs of the user, in place of those by rule.
        tolerance: largest accepted relative L2; by element type when None.
        full: compare a large model as a whole too.
        decodes: a pass gives the model a cache: it is also compared on a text beyond most windows, and in steps.
    """

    def __init__(
        self, feeds: Feeds | None = None, tolerance: float | None = None, *, full: bool = False, decodes: bool = False
    ) -> None:
        self.feeds, self.tolerance, self.full, self.decodes = feeds, tolerance, full, decodes
        self._before: _Compared | None = None
        self._skip = ""
        self._sampled = ""
        self._notes: list[str] = []

    def before(self, pass_: Pass, model: Model) -> None:
        if self._before is not None or self._skip:
            return
        try:
            self._before = self._start(model)
        except OnnxtoolsError as error:
            if self.feeds is not None:
                raise  # inputs that the user named must work
            self._skip = f"{error}; {OWN_INPUTS}"

    def _start(self, model: Model) -> _Compared:
        if self.feeds is not None:
            return self._full(model, [Probe("", self.feeds)])
        if self.full or model.weight_bytes() < CHECK_LIMIT:
            found, self._notes = probes(model)
            if not self.full and (why := too_costly(model, found[0].feeds)):
                raise JobError(f"a run of the graph would cost too much: {why}; --check runs it nevertheless")
            more = [long_probe(model), many_tokens(model, _BEYOND_WINDOWS) if self.decodes else None]
            return self._full(model, [*found, *(p for p in more if p is not None and not too_costly(model, p.feeds))])
        return self._part(model)

    def _full(self, model: Model, wanted: Sequence[Probe]) -> _Compared:
        """All outputs on each of the inputs; of those beyond the plain ones, where the graph runs on them."""
        run, kept = Runner(model, seconds=self._seconds), _Compared([], None, [])
        if self.decodes and self.feeds is None:
            wanted = with_causal_mask(model, lambda feeds: run(self._complete(model, feeds)), list(wanted))
        for probe in wanted:
            try:
                found = run(self._complete(model, probe.feeds))
            except OnnxtoolsError:
                if not probe.title:
                    raise
                continue
            if probe.title and any(_has_nan(probe.of_real(array)) for array in found.values()):
                continue  # a row without a visible key, where hidden keys are -infinity
            kept.probes.append(probe)
            kept.expected.append(found)
        return kept

    def _part(self, model: Model) -> _Compared:
        """Inner values of the first layers."""
        started = time.perf_counter()
        names, nodes, nbytes = beginning(model, PART_LIMIT)
        found, self._notes = probes(model, rows=TABLE_ROWS)
        plain = found[:1]
        if not names:
            raise JobError(
                f"its first weights alone have more than {PART_LIMIT >> 20} MiB; --check compares it in full"
            )
        run = Runner(model, names, rows=TABLE_ROWS, seconds=_SECONDS)
        values = [run({**self._complete(model, probe.feeds)}) for probe in plain]
        seconds = time.perf_counter() - started
        self._sampled = (
            f"the first {nodes} of {len(model.graph)} nodes ({nbytes / 1e6:.0f} MB of weights), {seconds:.1f} s"
        )
        return _Compared(plain, names, values)

    def partitioned(self, partition: Partition, model: Model, ranks: Sequence[Model], step: Step) -> None:
        verdict = validate_ranks(model, ranks, partition.compute, self.feeds, self.tolerance)
        worst = max(verdict.rows, key=lambda row: row.difference.rel_l2)
        step.measures["rel_l2"] = worst.difference.rel_l2
        if not verdict.passed:
            raise JobError(
                f"{partition.name}: the ranks compute another {worst.output!r} than the model (rel L2 "
                f"{worst.difference.rel_l2:.1e}, tolerance {verdict.tolerance:g}); --no-check leaves this out"
            )

    @property
    def _seconds(self) -> float | None:
        return None if self.full or self.feeds is not None else _SECONDS

    def _complete(self, model: Model, feeds: Feeds) -> Feeds:
        """The feeds with an empty cache, in the types that the graph wants."""
        feeds = dict(feeds)
        if is_cached(model):
            tokens = token_input(model)
            known = (
                feeds[tokens.value.name or ""].shape[tokens.batch_axis]
                if tokens is not None and tokens.value.name in feeds
                else 1
            )
            feeds.update({name: array for name, array in empty_cache(model, known).items() if name not in feeds})
        for value in model.graph.inputs:
            name, kind = value.name or "", value.dtype
            if (
                name in feeds
                and kind is not None
                and kind != ir.DataType.BFLOAT16
                and feeds[name].dtype != kind.numpy()
            ):
                feeds[name] = feeds[name].astype(kind.numpy())
        return feeds

    def after(self, pass_: Pass, model: Model, step: Step) -> None:
        if self._skip or self._before is None:
            step.measures["numeric_skipped"] = self._skip
            return
        if not step.result.changed:
            return
        try:
            actual = self._again(model)
        except OnnxtoolsError as error:
            if "NOT_IMPLEMENTED" not in str(error) and self._before.names is None:
                raise JobError(
                    f"pass {pass_.name!r} made a graph that ONNX Runtime cannot run, while it ran before: {error} "
                    "(--no-check writes it)"
                ) from error
            self._skip = f"after {pass_.name}: {error}"
            step.measures["numeric_skipped"] = self._skip
            return
        step.result.notes += [f"warning: the check sees little: {note}" for note in self._notes]
        self._notes = []
        worst, where = self._worst(actual, lossy=pass_.numerics == "lossy")
        step.measures["rel_l2"] = worst
        if self._before.names is not None:
            step.measures["sampled"] = self._sampled
        self._judge(pass_, model, step, worst, where)
        if pass_.adds_cache:
            self._judge_steps(pass_, model, step)
        if self._before.names is not None:
            self._before = self._part(model)
        elif pass_.numerics == "lossy":
            self._before = _Compared(self._before.probes, None, actual)

    def _judge_steps(self, pass_: Pass, model: Model, step: Step) -> None:
        """Decode the inputs in steps: a model that is not causal, or a mask that was misread, shows in them alone.

        Raises:
            JobError: the steps differ from the full run of the graph before.
        """
        assert self._before is not None
        if self._before.names is not None or has_dynamic_scales(model):
            reason = "of so large a model" if self._before.names is not None else "under current scaling"
            step.result.notes.append(f"steps {reason} were not compared with a full run: `onnxtools validate` does it")
            return
        run = Runner(model, seconds=self._seconds)
        for probe, expected in zip(self._before.probes, self._before.expected, strict=True):
            for way in _ways(model, probe):
                found = decode(model, run, in_types_of(model, probe.feeds), way)
                pairs = [(probe.of_real(expected[n]), probe.of_real(found[n])) for n in expected if n in found]
                worst = max((Difference.of(a, b).rel_l2 for a, b in pairs if a.shape == b.shape), default=0.0)
                if not worst <= self._allowed(pass_, model):
                    title = f"{probe.title}, " if probe.title else ""
                    raise JobError(
                        f"pass {pass_.name!r}: decoding in steps differs by {worst:.2e} (relative L2) from the full "
                        f"run ({title}{way[0]} + {way[1]} + {way[2]} tokens): earlier tokens see later ones, or a mask "
                        "depends on more than positions and padding; nothing was written (--no-check skips this)"
                    )

    def _allowed(self, pass_: Pass, model: Model) -> float:
        """The largest relative L2 of a pass that is exact or rounds."""
        if self.tolerance is not None:
            return self.tolerance
        return max(default_tolerance(model), _REORDERED if pass_.numerics == "rounding" else 0.0)

    def _again(self, model: Model) -> list[dict[str, Array]]:
        """The same values of the graph as it is now; of inner ones, those that it still has."""
        assert self._before is not None
        names = self._before.names
        if names is None:
            run = Runner(model, seconds=self._seconds)
        else:
            here = {value.name for node in model.graph for value in node.outputs}
            names = [name for name in names if name in here][-3:]
            if not names:
                raise JobError(
                    "no inner value of the part that was looked at kept its name; --check compares the whole"
                )
            run = Runner(model, names, rows=TABLE_ROWS, seconds=_SECONDS)
        return [run(self._complete(model, probe.feeds)) for probe in self._before.probes]

    def _worst(self, actual: Sequence[Mapping[str, Array]], *, lossy: bool) -> tuple[float, str]:
        """The largest difference, and of which inputs.

        A lossy pass may change what a cache holds; what is made of it is compared.
        """
        assert self._before is not None
        found = [(0.0, "")]
        for probe, expected, now in zip(self._before.probes, self._before.expected, actual, strict=True):
            for name, array in expected.items():
                if name in now and not (lossy and is_present(name)):
                    a, b = probe.of_real(array), probe.of_real(now[name])
                    if a.shape != b.shape:
                        raise JobError(
                            f"output {name!r} has the shape {list(b.shape)} now and had {list(a.shape)}; nothing was "
                            "written (--no-check writes it)"
                        )
                    found.append((Difference.of(a, b).rel_l2, f" ({probe.title})" if probe.title else ""))
        return max(found, key=lambda pair: pair[0])

    def _judge(self, pass_: Pass, model: Model, step: Step, worst: float, where: str) -> None:
        if not np.isfinite(worst):
            raise JobError(
                f"pass {pass_.name!r} made infinite or NaN outputs{where}; nothing was written (--no-check writes it)"
            )
        if pass_.numerics == "lossy":
            if worst > (FAIL if self.tolerance is None else self.tolerance):
                raise JobError(
                    f"pass {pass_.name!r} changed the outputs by {worst:.2g} (relative L2){where}: hardly anything of "
                    "the model is left; nothing was written (--inputs compares on real inputs, --tolerance allows "
                    "more, --no-check skips this)"
                )
            if worst > WARN:
                step.result.notes.append(
                    f"warning: the outputs changed by {worst:.2g} (relative L2){where}; measure what that costs with "
                    "`onnxtools accuracy`"
                )
            return
        allowed = self._allowed(pass_, model)
        if worst > allowed:
            limit = f"{worst:.2e} (relative L2){where}, more than {allowed:.0e}"
            raise JobError(
                f"pass {pass_.name!r} changed the outputs by {limit}; nothing was written (--tolerance allows more, "
                "--no-check skips this)"
            )


def _has_nan(array: Array) -> bool:
    return array.dtype.kind == "f" and bool(np.isnan(array).any())


def _ways(model: Model, probe: Probe) -> list[list[int]]:
    """Returns ways to cut a probe into steps: in the middle and near its ends. A short text is not cut."""
    tokens = token_input(model)
    ids = probe.feeds.get(tokens.value.name or "") if tokens is not None else None
    length = ids.shape[tokens.axis] if ids is not None and tokens is not None else 0
    if length < 4:
        return []
    half = length // 2
    return [[half, 1, length - half - 1], [1, length - 2, 1]]


_BEYOND_WINDOWS = 600
"""Tokens of a text that is decoded in steps: the windows of most models are shorter, GPT-Neo's is 256."""
_REORDERED = 1e-4
"""What sums in another order may come to, as in ONNX Runtime's own INT4 products (measured: 2.5e-5)."""


class Reproducer(Instrument):
    """On a crash, leaves a recipe in `folder` that runs the same passes on the same input again.

    A refusal (`OnnxtoolsError`) explains itself and leaves nothing.
    """

    def __init__(self, folder: Path, passes: Sequence[Pass]) -> None:
        self.folder, self.passes = folder, passes

    def failed(self, pass_: Pass, model: Model, error: BaseException) -> None:
        if isinstance(error, OnnxtoolsError) or model.path is None:
            return
        from onnxtools.pipeline.recipe_file import write_recipe

        self.folder.mkdir(parents=True, exist_ok=True)
        write_recipe(
            self.folder / "recipe.yaml",
            model.path,
            Path("after.onnx"),
            self.passes,
            f"{pass_.name} failed: {type(error).__name__}",
        )
        note = f"reproduce with: onnxtools pipeline {self.folder / 'recipe.yaml'} --debug"
        error.__notes__ = [*getattr(error, "__notes__", []), note]  # BaseException.add_note exists since Python 3.11
