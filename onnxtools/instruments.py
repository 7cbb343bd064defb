"""What can be hung on a `PassManager`: time, memory, node counts, dumps, checks, and a reproducer for crashes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from onnxtools.errors import JobError, OnnxtoolsError, UsageError
from onnxtools.manager import Instrument, Step
from onnxtools.memory import peak_mib
from onnxtools.model import Model
from onnxtools.ort import Feeds, Runner, random_feeds
from onnxtools.passbase import Pass
from onnxtools.validate import Difference, default_tolerance, empty_cache, is_cached

CHECK_LIMIT = 256 << 20
"""The numeric check runs by default on models with fewer weight bytes than this."""


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
            raise UsageError(f"--dump {folder}: cannot be made a folder ({error.strerror}); name another") from None

    def after(self, pass_: Pass, model: Model, step: Step) -> None:
        self._index += 1
        if step.result.changed:
            copy = Model(model.ir.clone(), model.path)
            copy.save(self.folder / f"{self._index:02d}-{pass_.name}.onnx")


class Checker(Instrument):
    """onnx.checker with strict shape inference, on the graph without its large weights: after each pass, or once at the end.

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
            raise JobError(f"{culprit} made an invalid graph: {reason}; please report it (--no-check writes it nevertheless)")
        self._valid = reason is None


def _check(model: Model) -> str | None:
    try:
        onnx.checker.check_model(skeleton(model), full_check=True)
    except Exception as error:  # the checker raises several types
        return " ".join(str(error).split())[:300]
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
    return ir.ExternalTensor("none", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(list(tensor.shape.numpy())), name=name, base_dir="")


class NumericCheck(Instrument):
    """Runs the graph on ONNX Runtime after each pass and compares it with the graph before (`measures['rel_l2']`).

    A pass that declares itself exact or rounding must stay within `tolerance`; a lossy one is reported, and what it
    made becomes the reference of the next.
    """

    def __init__(self, feeds: Feeds | None = None, tolerance: float | None = None) -> None:
        self.feeds, self.tolerance = feeds, tolerance
        self.given = feeds is not None
        self._expected: dict[str, object] | None = None
        self._skip = ""

    def before(self, pass_: Pass, model: Model) -> None:
        if self._expected is not None or self._skip:
            return
        try:
            if self.feeds is None:
                self.feeds = random_feeds(model)
            self._expected = self._run(model)
        except OnnxtoolsError as error:
            if self.given:
                raise  # inputs that the user named must work
            self._skip = str(error)

    def _run(self, model: Model) -> dict[str, object]:
        assert self.feeds is not None
        feeds = dict(self.feeds)
        if is_cached(model):
            feeds.update({name: array for name, array in empty_cache(model, next(iter(feeds.values())).shape[0]).items() if name not in feeds})
        for value in model.graph.inputs:
            name, kind = value.name or "", value.dtype
            if name in feeds and kind is not None and kind != ir.DataType.BFLOAT16 and feeds[name].dtype != kind.numpy():
                feeds[name] = feeds[name].astype(kind.numpy())
        return dict(Runner(model)(feeds))

    def after(self, pass_: Pass, model: Model, step: Step) -> None:
        if self._skip or self._expected is None:
            step.measures["numeric_skipped"] = self._skip
            return
        if not step.result.changed:
            return
        try:
            actual = self._run(model)
        except OnnxtoolsError as error:
            if "NOT_IMPLEMENTED" not in str(error) and model.weight_bytes() < CHECK_LIMIT:
                raise JobError(f"pass {pass_.name!r} made a graph that ONNX Runtime cannot run, while it ran before: {error} (--no-check writes it)") from error
            self._skip = f"after {pass_.name}: {error}"
            step.measures["numeric_skipped"] = self._skip
            return
        lossy = pass_.numerics == "lossy"  # may change the type and the scale of what a cache holds; what is made of it is compared
        shared = [name for name in self._expected if name in actual and not (lossy and "present" in name)]
        worst = max((Difference.of(self._expected[name], actual[name]).rel_l2 for name in shared), default=0.0)  # type: ignore[arg-type]
        step.measures["rel_l2"] = worst
        least = _REORDERED if pass_.numerics == "rounding" else 0.0
        allowed = self.tolerance if self.tolerance is not None else max(default_tolerance(model), least)
        if not np.isfinite(worst):
            raise JobError(f"pass {pass_.name!r} made infinite or NaN outputs; nothing was written (--no-check writes it)")
        if lossy:
            self._expected = actual
        elif worst > allowed:
            limit = f"{worst:.2e} (relative L2), more than {allowed:.0e}"
            raise JobError(f"pass {pass_.name!r} changed the outputs by {limit}; nothing was written (--tolerance allows more, --no-check skips this)")


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
        from onnxtools.recipe import write_recipe

        self.folder.mkdir(parents=True, exist_ok=True)
        write_recipe(self.folder / "recipe.yaml", model.path, Path("after.onnx"), self.passes, f"{pass_.name} failed: {type(error).__name__}")
        note = f"reproduce with: onnxtools pipeline {self.folder / 'recipe.yaml'} --debug"
        error.__notes__ = [*getattr(error, "__notes__", []), note]  # BaseException.add_note exists since Python 3.11
