"""Raise the default operator set, changing the nodes whose form changed on the way."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

from onnxtools.errors import JobError, UsageError
from onnxtools.graph import Builder, attribute
from onnxtools.model import MAX_IR_VERSION, Model
from onnxtools.passbase import Pass, PassResult, option

MAX_OPSET = 25
"""TensorRT 11's parser takes opset <= 25, ONNX Runtime 1.31 <= 26."""

_REDUCE = {"ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"}


@dataclass(frozen=True)
class SetOpset(Pass):
    """Convert to opset `version`; a model that is there already, or beyond, keeps its opset.

    Rules:
      - opset 13: Squeeze, Unsqueeze, Split and ReduceSum take axes and sizes as inputs;
      - opset 18: Split without sizes names `num_outputs`; Reduce* take axes as an input;
      - every other operator must mean the same at both versions by its schema (inputs and attributes only grew),
        else the node is named in an error;
      - never downwards: an operator such as Gelu (20) would lose its meaning;
      - the IR version is raised where the opset needs it; --ir-version writes an older one for an older reader (TensorRT 9 reads 9).
    """

    name = "set-opset"
    example = "onnxtools set-opset model.onnx out.onnx --version 19"

    version: int = option(19, "Lowest opset that the result may have.")

    ir_version: int | None = option(None, "IR version of the result; what it is, or what the opset needs, by default.")

    def __post_init__(self) -> None:
        if not 13 <= self.version <= MAX_OPSET:
            raise UsageError(f"set-opset: opset {self.version} is out of range; choose 13 to {MAX_OPSET} (TensorRT 11's parser stops at {MAX_OPSET})")

    def apply(self, model: Model) -> PassResult:
        old_ir = model.ir.ir_version or 0
        opset = max(self.version, model.opset)
        if self.ir_version is None:
            model.ir.ir_version = min(MAX_IR_VERSION, max(old_ir, _ir_version(opset)))
        else:
            _check_ir_version(self.ir_version, opset, model)
            model.ir.ir_version = self.ir_version
        old = model.opset
        if old >= self.version:
            changed = model.ir.ir_version != old_ir
            return PassResult(changed, 0, [f"opset {old} kept (already at or above {self.version}; nothing is lowered)"])
        if old < 11:
            raise JobError(f"opset {old} is older than any exporter of these models; export the model again with opset 17 or later")
        builder = Builder(model)
        rewritten = 0
        for node in list(model.graph.all_nodes()):
            if node.domain in ("", "ai.onnx"):
                builder.before = node
                rewritten += _upgrade(node, old, self.version, builder)
        model.ir.opset_imports[""] = self.version
        return PassResult(True, rewritten, [f"opset {old} -> {self.version}, {rewritten} nodes rewritten"])

    def ensures(self, model: Model) -> None:
        if model.opset < self.version:
            raise JobError(f"the model is still at opset {model.opset}")


_IR_OF_4_BITS = 10


def _check_ir_version(wanted: int, opset: int, model: Model) -> None:
    least = _ir_version(opset)
    if not least <= wanted <= MAX_IR_VERSION:
        raise UsageError(f"set-opset: --ir-version {wanted}: opset {opset} takes {least} to {MAX_IR_VERSION}")
    small = next((value.name for value, tensor in model.weights() if tensor.dtype.bitwidth < 8), None)
    if small is not None and wanted < _IR_OF_4_BITS:
        raise JobError(f"--ir-version {wanted}: weight {small!r} has 4 bits, which IR {_IR_OF_4_BITS} brought; leave it out")


def _ir_version(opset: int) -> int:
    """The lowest IR version that may carry `opset` (onnx.helper's table)."""
    return onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


def _upgrade(node: ir.Node, old: int, new: int, builder: Builder) -> int:
    op = node.op_type
    if op == "Split" and old < 18 <= new:
        return _split(node, builder)
    axes_became_input = (old < 18 <= new and op in _REDUCE) or (old < 13 and op in ("ReduceSum", "Squeeze", "Unsqueeze"))
    if axes_became_input:
        return _attribute_to_input(node, "axes", builder)
    _check_same_meaning(node, old, new)
    return 0


def _attribute_to_input(node: ir.Node, name: str, builder: Builder) -> int:
    values = attribute(node, name)
    if values is None:
        return 0
    del node.attributes[name]
    node.resize_inputs(2)
    node.replace_input_with(1, builder.constant(list(values), f"{node.name}/{name}"))
    return 1


def _split(node: ir.Node, builder: Builder) -> int:
    if attribute(node, "split") is not None:
        return _attribute_to_input(node, "split", builder)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return 0
    # At opset < 18 a Split without sizes cuts equal parts; since 18 the count must be written down.
    node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    return 1


_SEMANTICS_CHANGED = {
    "Softmax": 13, "LogSoftmax": 13, "Hardmax": 13, "BatchNormalization": 15, "GroupNormalization": 21, "Resize": 13, "Upsample": 10,
    "GridSample": 20, "DFT": 20, "Dropout": 13, "Clip": 11, "Pad": 11,
}  # fmt: skip


def _check_same_meaning(node: ir.Node, old: int, new: int) -> None:
    try:
        before = onnx.defs.get_schema(node.op_type, old, "")
        after = onnx.defs.get_schema(node.op_type, new, "")
    except onnx.defs.SchemaError:
        raise JobError(f"node {node.name!r} ({node.op_type}) is no operator of opset {old} or {new}; is its domain missing?") from None
    if before.since_version == after.since_version:
        return
    changed = old < _SEMANTICS_CHANGED.get(node.op_type, 0) <= new
    lost = [name for name in node.attributes if name not in after.attributes]
    needed = [name for name, spec in after.attributes.items() if spec.required and name not in node.attributes]
    if changed or lost or needed or after.deprecated:
        what = f"attribute {(lost or needed)[0]!r}" if lost or needed else "meaning"
        raise JobError(
            f"node {node.name!r} ({node.op_type}): its {what} changed between opset {old} and {new} and there is no rule for it;"
            f" export the model at opset {new}"
        )
