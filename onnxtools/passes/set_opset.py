"""Raise the default operator set and rewrite the nodes whose form changed between the versions."""

from __future__ import annotations

from dataclasses import dataclass

from onnxtools.analysis.opsets import MAX_OPSET, lowest_ir_version, reach_opset
from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.options import option
from onnxtools.ir.model import MAX_IR_VERSION, Model
from onnxtools.pipeline.passbase import Pass, PassResult

_IR_OF_4_BITS = 10
"""First IR version with 4-bit types."""
"""TensorRT 11's parser takes opset <= 25, ONNX Runtime 1.31 <= 26."""


@dataclass(frozen=True)
class SetOpset(Pass):
    """Convert to opset `version`; a model at this opset or a newer one keeps its opset.

    Rules:
      - opset 13: Squeeze, Unsqueeze, Split and ReduceSum take axes and sizes as inputs;
      - opset 18: Split without sizes names `num_outputs`; Reduce* take axes as an input;
      - inference keeps its meaning: BatchNormalization with one output, Softmax over the last axis, Resize, GridSample
        and Dropout;
      - every other operator must mean the same at both versions by its schema (inputs and attributes only grew),
        else the node is named in an error;
      - an opset is never lowered: an operator such as Gelu (20) would lose its meaning;
      - the IR version is raised where the opset needs it; --ir-version writes an older one for an older reader
        (TensorRT 9 reads 9).
    """

    name = "set-opset"
    example = "onnxtools set-opset model.onnx out.onnx --version 19"

    version: int = option(19, "Lowest opset that the result may have.")

    ir_version: int | None = option(None, "IR version of the result; what it is, or what the opset needs, by default.")

    def __post_init__(self) -> None:
        if not 13 <= self.version <= MAX_OPSET:
            raise UsageError(
                f"set-opset: opset {self.version} is out of range; choose 13 to {MAX_OPSET} (TensorRT 11's parser "
                f"stops at {MAX_OPSET})"
            )

    def apply(self, model: Model) -> PassResult:
        old, old_ir = model.opset, model.ir.ir_version or 0
        if self.ir_version is not None:
            _check_ir_version(self.ir_version, max(self.version, old), model)
        rewritten, note = reach_opset(model, self.version)
        if self.ir_version is not None:
            model.ir.ir_version = self.ir_version
        return PassResult((model.opset, model.ir.ir_version) != (old, old_ir), rewritten, [note])

    def ensures(self, model: Model) -> None:
        if model.opset < self.version:
            raise JobError(f"the model is still at opset {model.opset}")


def _check_ir_version(version: int, opset: int, model: Model) -> None:
    least = lowest_ir_version(opset)
    if not least <= version <= MAX_IR_VERSION:
        raise UsageError(f"set-opset: --ir-version {version}: opset {opset} takes {least} to {MAX_IR_VERSION}")
    small = next((value.name for value, tensor in model.weights() if tensor.dtype.bitwidth < 8), None)
    if small is not None and version < _IR_OF_4_BITS:
        raise JobError(
            f"--ir-version {version}: weight {small!r} has 4 bits, which IR {_IR_OF_4_BITS} brought; leave it out"
        )
