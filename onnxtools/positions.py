"""Positions in a graph: tables that limit them, and what must move by the cache length once there is a cache."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxtools.graph import Builder, attribute, constant_tensor, is_constant_expression, is_op
from onnxtools.infer import Facts
from onnxtools.model import Model


def table_rows(model: Model) -> int | None:
    """Rows of the smallest table that is looked up by position: Gather by something counted or an input called position, Slice up to a length.

    A longer sequence has no row, or a shape that does not fit. None where there is no such table.
    """
    found = []
    for node in model.graph:
        data = constant_tensor(node.inputs[0]) if is_op(node, "Gather", "Slice") else None
        if data is None or not data.shape:
            continue
        if is_op(node, "Gather"):
            axis, by_position = attribute(node, "axis", 0), _by_position(node.inputs[1])
        else:
            axes = constant_tensor(node.inputs[3]) if len(node.inputs) > 3 else None
            axis, by_position = int(axes.numpy().reshape(-1)[0]) if axes is not None else 0, not is_constant_expression(node.inputs[2])
        if by_position:
            found.append(int(data.shape.numpy()[axis]))
    return min(found, default=None)


def _by_position(value: ir.Value | None) -> bool:
    """Whether `value` depends on inputs called position, or on shapes alone."""
    waiting, seen, inputs = [value], set[ir.Value](), set[str]()
    while waiting:
        current = waiting.pop()
        if current is None or current in seen or current.is_initializer():
            continue
        seen.add(current)
        node = current.producer()
        if node is None:
            inputs.add(current.name or "")
        elif not is_op(node, "Shape", "Size"):
            waiting += node.inputs
    return not is_constant_expression(value) and all("position" in name for name in inputs)


def shift_positions(model: Model, facts: Facts, size: int, past: ir.Value, past_1d: ir.Value, builder: Builder) -> list[str]:
    """Let internally counted positions start at `past` instead of 0.

    Args:
        size: the (stand-in) sequence length.
        past: int64 scalar, `past_1d`: the same with shape [1].
    Returns:
        Names of the nodes that were changed: Range(0, sequence) and Slice(table, 0:sequence).
    """
    changed: list[str] = []
    for node in list(model.graph):
        builder.before = node
        if is_op(node, "Range") and _counts(facts, node, size):
            dtype = facts[node.inputs[0]].dtype or ir.DataType.INT64
            offset = past if dtype == ir.DataType.INT64 else builder.op("Cast", [past], f"{node.name}/past", dtype=dtype, to=dtype.value)
            for index in (0, 1):
                moved = builder.op("Add", [node.inputs[index], offset], f"{node.name}/offset", dtype=dtype, shape=[])
                node.replace_input_with(index, moved)
            changed.append(node.name or "")
        elif is_op(node, "Slice") and _slices_table(facts, node, size):
            for index in (1, 2):
                dtype = facts[node.inputs[index]].dtype or ir.DataType.INT64
                offset = past_1d if dtype == ir.DataType.INT64 else builder.op("Cast", [past_1d], f"{node.name}/past", dtype=dtype, to=dtype.value)
                node.replace_input_with(index, builder.op("Add", [node.inputs[index], offset], f"{node.name}/offset", dtype=dtype, shape=[1]))
            changed.append(node.name or "")
    return changed


def _counts(facts: Facts, node: ir.Node, size: int) -> bool:
    value = facts[node.outputs[0]].value
    return value is not None and value.shape == (size,) and np.array_equal(value, np.arange(size, dtype=value.dtype))


def _slices_table(facts: Facts, node: ir.Node, size: int) -> bool:
    """Slice(constant table, 0, sequence) along one axis, where the sequence is not the whole table."""
    data = node.inputs[0]
    starts, ends = facts[node.inputs[1]].value, facts[node.inputs[2]].value
    if starts is None or ends is None or starts.size != 1 or starts.item() != 0 or ends.item() != size:
        return False
    return is_constant_expression(data)
