"""Positions in a graph: tables that limit them, and nodes that need the cache length added once there is a cache."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts, analyse, token_input
from onnxtools.ir.edit import Builder
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, constant_tensor, is_constant_expression, is_op


def table_rows(model: Model) -> int | None:
    """Returns the number of positions in the graph's smallest position table, or None if no table is recognized.

    A position table is read by a Gather whose indices count positions or come from an input called position, or by a
    Slice that is as long as the sequence. A longer sequence has no row, or a shape that does not fit.
    """
    tokens = token_input(model)
    facts = analyse(model) if tokens is not None else None
    shape = facts[tokens.value].shape if tokens is not None and facts is not None else None
    if tokens is None or facts is None or shape is None or isinstance((tokens.value.shape or ())[tokens.axis], int):
        return None
    limits = []
    for node in model.graph:
        data = constant_tensor(node.inputs[0]) if is_op(node, "Gather", "Slice") else None
        if data is not None and len(data.shape) > 1:
            rows = data.shape.numpy()
            if is_op(node, "Gather"):
                limits += [
                    int(rows[attribute(node, "axis", 0)]) - first
                    for first in _first_row(node.inputs[1], facts, shape[tokens.axis])
                ]
            else:
                limits += [int(rows[axis]) for axis in _as_long(node, facts, shape[tokens.axis])]
    return min(limits, default=None)


def _first_row(index: ir.Value | None, facts: Facts, length: int) -> list[int]:
    """Returns the row of position 0 as a list of one, or [] if `index` is no positions.

    Positions are `length` consecutive numbers, or an input called position, perhaps plus a constant.
    """
    indices = facts[index].value
    if indices is not None:
        rows = np.unique(indices)
        return [int(rows[0])] if len(rows) == length and rows[-1] - rows[0] == length - 1 else []
    first, value = 0, index
    while value is not None and (node := value.producer()) is not None:
        if is_op(node, "Add"):
            addends = [facts[v].value for v in node.inputs]
            place = next((i for i, array in enumerate(addends) if array is not None and array.size == 1), None)
            if place is None:
                return []
            first += int(addends[place].reshape(-1)[0])  # type: ignore[union-attr]
            value = node.inputs[1 - place]
        elif is_op(node, "Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze"):
            value = node.inputs[0]
        else:
            return []
    return [first] if value is not None and value.is_graph_input() and "position" in (value.name or "") else []


def _as_long(node: ir.Node, facts: Facts, length: int) -> list[int]:
    """Returns the axes that a Slice cuts to `length`."""
    if len(node.inputs) < 3 or (
        len(node.inputs) > 4 and node.inputs[4] is not None and not np.all(facts[node.inputs[4]].value == 1)
    ):
        return []
    starts, ends = facts[node.inputs[1]].value, facts[node.inputs[2]].value
    axes = facts[node.inputs[3]].value if len(node.inputs) > 3 and node.inputs[3] is not None else None
    if starts is None or ends is None or (axes is None and len(node.inputs) > 3 and node.inputs[3] is not None):
        return []
    places = range(ends.size) if axes is None else axes.reshape(-1)
    return [
        int(axis)
        for axis, low, high in zip(places, starts.reshape(-1), ends.reshape(-1), strict=True)
        if low >= 0 and high - low == length
    ]


def shift_positions(
    model: Model, facts: Facts, size: int, past: ir.Value, past_1d: ir.Value, builder: Builder
) -> list[str]:
    """Let positions that the graph counts itself start at `past` instead of 0.

    Args:
        model: the model; it is changed in place.
        facts: its facts.
        size: the (stand-in) sequence length.
        past: tokens in the cache, an int64 scalar.
        past_1d: the same with shape [1].
        builder: inserts the new nodes.

    Returns:
        Names of the changed nodes: Range(0, sequence) and Slice(table, 0:sequence).
    """
    changed: list[str] = []
    for node in list(model.graph):
        builder.before = node
        if is_op(node, "Range") and _counts(facts, node, size):
            dtype = facts[node.inputs[0]].dtype or ir.DataType.INT64
            offset = (
                past
                if dtype == ir.DataType.INT64
                else builder.op("Cast", [past], f"{node.name}/past", dtype=dtype, to=dtype.value)
            )
            for index in (0, 1):
                moved = builder.op("Add", [node.inputs[index], offset], f"{node.name}/offset", dtype=dtype, shape=[])
                node.replace_input_with(index, moved)
            changed.append(node.name or "")
        elif is_op(node, "Slice") and _slices_table(facts, node, size):
            for index in (1, 2):
                dtype = facts[node.inputs[index]].dtype or ir.DataType.INT64
                offset = (
                    past_1d
                    if dtype == ir.DataType.INT64
                    else builder.op("Cast", [past_1d], f"{node.name}/past", dtype=dtype, to=dtype.value)
                )
                node.replace_input_with(
                    index,
                    builder.op("Add", [node.inputs[index], offset], f"{node.name}/offset", dtype=dtype, shape=[1]),
                )
            changed.append(node.name or "")
    return changed


def _counts(facts: Facts, node: ir.Node, size: int) -> bool:
    value = facts[node.outputs[0]].value
    return value is not None and value.shape == (size,) and np.array_equal(value, np.arange(size, dtype=value.dtype))


def _slices_table(facts: Facts, node: ir.Node, size: int) -> bool:
    """Whether `node` is Slice(constant table, 0, sequence) along one axis."""
    data = node.inputs[0]
    starts, ends = facts[node.inputs[1]].value, facts[node.inputs[2]].value
    if starts is None or ends is None or starts.size != 1 or starts.item() != 0 or ends.item() != size:
        return False
    return is_constant_expression(data)
