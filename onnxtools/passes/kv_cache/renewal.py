"""Values that the exporter computed from the inside of attention, computed again from the rebuilt attention."""

from __future__ import annotations

import onnx_ir as ir

from onnxtools.analysis.facts import Facts
from onnxtools.analysis.masks import MaskError
from onnxtools.base.errors import JobError
from onnxtools.ir.edit import Builder
from onnxtools.ir.query import attributes_of
from onnxtools.passes.kv_cache.mask import MaskRewriter

_LAYOUT = {"Reshape", "Transpose", "Identity", "Dropout", "Squeeze", "Unsqueeze"}
_SCALE_OPS = {
    "Abs", "ReduceMax", "ReduceMin", "Max", "Min", "Div", "Mul", "Reciprocal", "Cast", "Identity", "Reshape", "Neg",
    "Add", "Clip",
}  # fmt: skip
"""Operators that compute a current-scaling factor; none of them depends on the layout of the tensor."""
_ROW_OPS = {
    "IsNaN", "IsInf", "Not", "And", "Or", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Where",
    "Sub", "ReduceSum", "ReduceMean", "ReduceProd", "Sign",
}  # fmt: skip
"""Operators that find rows without a visible key (torch's safe softmax): pointwise, or over the last axis."""


class Renewal:
    """Replays nodes on rebuilt values; their other inputs are computed from rebuilt values where they were before.

    Args:
        facts: facts of the model.
        builder: inserts the nodes.
        masks: grows the masks among the other inputs.

    Attributes:
        values: the rebuilt value in place of a value of the exporter.
    """

    def __init__(self, facts: Facts, builder: Builder, masks: MaskRewriter) -> None:
        self.facts, self.builder, self.masks = facts, builder, masks
        self.values: dict[ir.Value, ir.Value] = {}

    def node(self, value: ir.Value, node: ir.Node, data: int, prefix: str) -> ir.Value:
        """Apply `node` to `value` in place of its input `data`; a rearrangement is left out.

        Raises:
            JobError: another input is computed from the inside of attention, and is neither a quantization scale nor a
                test of its rows.
        """
        old = node.inputs[data]
        assert old is not None
        self.values[old] = value
        if node.op_type in _LAYOUT:
            new = value
        else:
            # The bounds of a Slice may be computed from the number of keys.
            renew = self._bound if node.op_type == "Slice" else self.value
            inputs = [value if i == data else renew(v, prefix) for i, v in enumerate(node.inputs)]
            new = self.builder.op(node.op_type, inputs, f"{prefix}/{node.op_type}", **attributes_of(node))
        self.values[node.outputs[0]] = new
        return new

    def value(self, value: ir.Value | None, prefix: str) -> ir.Value | None:
        """`value`, computed from the rebuilt attention where it was computed from the old one.

        Such values are quantization scales and tests for rows without a visible key.

        Raises:
            JobError: as in `node`.
        """
        if value is None or value in self.values:
            return None if value is None else self.values[value]
        node, fact = value.producer(), self.facts[value]
        square = fact.shape is not None and len(fact.shape) > 1 and fact.shape[-1] == self.masks.size
        if node is None or fact.value is not None or (square and not self.is_of_attention(value)):
            return self.masks.extend(value) if square else value
        inputs = [self.value(v, prefix) for v in node.inputs]
        if inputs == list(node.inputs):
            self.values[value] = value
            return value
        rank = len(self.facts[node.inputs[0]].shape or ())
        if node.op_type not in _SCALE_OPS | _ROW_OPS or (
            node.op_type.startswith("Reduce") and rank not in (2, 4) and not _reduces_all_or_last(node, self.facts)
        ):
            raise JobError(
                f"node {node.name!r} ({node.op_type}) reads the inside of attention; only quantization scales and "
                "tests of its rows may"
            )
        self.values[value] = self.builder.op(node.op_type, inputs, f"{prefix}/{node.op_type}", **attributes_of(node))
        return self.values[value]

    def _bound(self, value: ir.Value | None, prefix: str) -> ir.Value | None:
        try:
            return value if value is None else self.masks.size_for_keys(value)
        except MaskError as error:
            raise JobError(f"a Slice inside attention ({prefix}) {error}; export with dynamic sizes") from None

    def is_of_attention(self, value: ir.Value) -> bool:
        """Whether `value` is computed from a rebuilt value; if not, it is a mask."""
        waiting, seen = [value], {value}
        while waiting:
            current = waiting.pop()
            if self.values.get(current, current) is not current:
                return True
            node = current.producer()
            new = {v for v in (node.inputs if node is not None else ()) if v is not None} - seen
            seen |= new
            waiting += new
        return False


def _reduces_all_or_last(node: ir.Node, facts: Facts) -> bool:
    """Whether the reduction is over all axes or the last axis alone, so that the number of axes does not matter."""
    source = facts[node.inputs[1]].value if len(node.inputs) > 1 else node.attributes.get("axes")
    axes = [int(a) for a in (source.value if isinstance(source, ir.Attr) else source)] if source is not None else []
    return axes in ([], [-1])
