"""Batch and sequence sizes that a static export baked into the graph, made dynamic again."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.axes import Atom, Layout, LayoutError, follow, leaves
from onnxtools.analysis.cache import may_be_past
from onnxtools.analysis.facts import Facts, Tokens, analyse, is_ids_like, stand_ins
from onnxtools.base.errors import JobError
from onnxtools.ir.edit import Builder
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, constant_tensor, is_constant_expression

_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand"}


def make_dynamic(
    model: Model, tokens: Tokens, past_1d: ir.Value, total: ir.Value, originals: set[ir.Node], builder: Builder
) -> list[str]:
    """Follow the batch and sequence axes from the token inputs through the graph and make them dynamic.

    Rules:
      - constant Reshape targets that hold batch or sequence are rewritten in terms of the input's shape;
      - an operand computed from constants that meets the sequence axis has one entry per position and is sliced
        past:total;
      - an operator through which the axes cannot be followed is an error that names it.

    Args:
        past_1d: length of the cache before the step, int64 [1].
        total: length of the cache after the step, an int64 scalar.
        originals: nodes of the exporter.

    Returns:
        Notes for people.

    Raises:
        JobError: a node that works only for the static size, or whose axes cannot be followed.
    """
    tracer = _Tracer(model, tokens.value, past_1d, total, originals, builder)
    for node in list(model.graph):
        builder.before = node
        tracer.visit(node)
    tracer.name_dimensions()
    # Check with other sizes than the static ones; past + new tokens stay within the tables of positions.
    past = 1 if tracer.sequence.size > 1 else 0
    facts = analyse(
        model, {"batch": tracer.batch.size + 1, "sequence": tracer.sequence.size - past, "past_sequence": past}
    )
    for node in model.graph:
        if any(facts[o].shape is None for o in node.outputs if o in tracer.layouts):
            raise JobError(
                f"node {node.name!r} ({node.op_type}) works only for the static size of the export; export with "
                "dynamic batch and sequence"
            )
    return tracer.notes()


class _Tracer:
    def __init__(
        self, model: Model, ids: ir.Value, past_1d: ir.Value, total: ir.Value, originals: set[ir.Node], builder: Builder
    ) -> None:
        self.model, self.ids, self.builder, self.originals = model, ids, builder, originals
        self.past_1d, self.total = past_1d, total
        shape = tuple(d for d in ids.shape or () if isinstance(d, int))
        # The new cache inputs are dynamic already; their batch gets the static size here.
        self.facts: Facts = analyse(model, stand_ins(model) | {"batch": shape[0]})
        self.batch, self.sequence = Atom(shape[0]), Atom(shape[1])
        self.layouts: dict[ir.Value, Layout] = {}
        self.reshapes = 0
        self.tables = 0
        for value in model.graph.inputs:
            if is_ids_like(value) and self.facts[value].shape == shape:
                self.layouts[value] = [[self.batch], [self.sequence]]
            elif may_be_past(value.name):
                self.layouts[value] = self._fresh(value)

    def notes(self) -> list[str]:
        lines = [f"static export: {self.reshapes} reshape targets made dynamic in batch and sequence"]
        if self.tables:
            lines.append(
                f"{self.tables} position tables have {self.sequence.size} entries: past + new tokens cannot exceed that"
            )
        return lines

    def _fresh(self, value: ir.Value) -> Layout:
        shape = self.facts[value].shape
        if shape is None:
            raise JobError(f"the shape of {value.name!r} is unknown; run onnx shape inference first")
        return [[Atom(size)] for size in shape]

    def visit(self, node: ir.Node) -> None:
        traced = [v for v in node.inputs if v is not None and v in self.layouts]
        if not traced or node.op_type == "Shape":
            return
        try:
            if node.op_type == "Reshape" and node in self.originals:  # added Reshapes are dynamic already
                self._free_reshape(node)
            for output in node.outputs:
                self.layouts[output] = self._layout(node, output)
        except LayoutError as error:
            where = f"node {node.name!r} ({node.op_type})"
            raise JobError(
                f"{where}: {error}, so its static size cannot be freed; export with dynamic batch and sequence"
            ) from None
        for atom in (self.batch, self.sequence):
            if atom.parts:
                raise JobError(
                    f"node {node.name!r} ({node.op_type}) splits the batch or sequence axis; export with dynamic batch "
                    "and sequence"
                )

    def _layout(self, node: ir.Node, output: ir.Value) -> Layout:
        first = node.inputs[0]
        op = node.op_type
        if op in _MOVES:
            return follow(self.layouts[first], node, self.facts) if first in self.layouts else self._fresh(output)
        if op == "Gather" and first is not None:
            return self._gather(node, first, output)
        if op == "MatMul":
            return self._matmul(node, output)
        if op == "Gemm":
            rows = self.layouts.get(first) if first is not None else None
            fresh = self._fresh(output)
            return [rows[1 if attribute(node, "transA", 0) else 0], fresh[1]] if rows else fresh
        return self._pointwise(node, output)

    def _gather(self, node: ir.Node, data: ir.Value, output: ir.Value) -> Layout:
        index = node.inputs[1]
        assert index is not None
        table = self.layouts.get(data) or self._fresh(data)
        axis = attribute(node, "axis", 0) % len(table)
        picked = self.layouts.get(index) or ([[Atom(s)] for s in self.facts[index].shape or ()])
        return [*table[:axis], *picked, *table[axis + 1 :]]

    def _matmul(self, node: ir.Node, output: ir.Value) -> Layout:
        fresh = self._fresh(output)
        a, b = (self.layouts.get(v) if v is not None else None for v in node.inputs)
        rank = len(fresh)
        result = self._align(rank - 2, [side[:-2] for side in (a, b) if side], fresh)
        return [*result, a[-2] if a else fresh[-2], b[-1] if b else fresh[-1]]

    def _align(self, rank: int, sides: list[Layout], fresh: Layout) -> Layout:
        """Right-aligned broadcast: an axis with batch or sequence atoms wins, then any traced axis of the full size."""
        result: Layout = list(fresh[:rank])
        for side in sides:
            for back in range(1, len(side) + 1):
                axis = side[-back]
                if _size(axis) == _size(fresh[rank - back]) and (
                    self._dynamic(axis) or not self._dynamic(result[rank - back])
                ):
                    result[rank - back] = axis
        return result

    def _dynamic(self, axis: list[Atom]) -> bool:
        return any(atom in (self.batch, self.sequence) for atom in leaves(axis))

    def _pointwise(self, node: ir.Node, output: ir.Value) -> Layout:
        """The layout after an elementwise, normalizing, reducing or slicing operator.

        Axes of unchanged size keep their atoms.
        """
        fresh = self._fresh(output)
        sides = [self.layouts[v] for v in node.inputs if v is not None and v in self.layouts]
        result = self._align(len(fresh), [side for side in sides if len(side) <= len(fresh)], fresh)
        dynamic = [a for side in sides for axis in side for a in leaves(axis) if a in (self.batch, self.sequence)]
        kept_ids = {id(a) for axis in result for a in leaves(axis)}
        if any(id(a) not in kept_ids for a in dynamic) and node.op_type not in (
            "ReduceMax",
            "ReduceMin",
            "ReduceMean",
            "ReduceSum",
            "Concat",
            "Slice",
        ):
            raise LayoutError("a batch or sequence axis disappears")
        for index, value in enumerate(node.inputs):
            if value is not None and value not in self.layouts and len(self.facts[value].shape or ()) > 0:
                self._slice_table(node, index, value, result)
        return result

    def _slice_table(self, node: ir.Node, index: int, value: ir.Value, result: Layout) -> None:
        """Slice an untraced operand that has one entry per position to the entries of the new tokens."""
        shape = self.facts[value].shape or ()
        for back in range(1, min(len(shape), len(result)) + 1):
            if (
                is_constant_expression(value)
                and leaves(result[-back]) == [self.sequence]
                and shape[-back] == self.sequence.size > 1
            ):
                end = self.builder.op(
                    "Unsqueeze", [self.total, self.builder.constant([0], "axes_0")], f"{node.name}/total"
                )
                axis = self.builder.constant([len(shape) - back], "axis")
                sliced = self.builder.op("Slice", [value, self.past_1d, end, axis], f"{node.name}/positions")
                node.replace_input_with(index, sliced)
                self.tables += 1
                return

    def _free_reshape(self, node: ir.Node) -> None:
        data, target = node.inputs[0], node.inputs[1]
        if constant_tensor(target) is None or data not in self.layouts:
            return
        layout = follow(self.layouts[data], node, self.facts)
        if not any(self._dynamic(axis) for axis in layout):
            return
        parts: list[ir.Value] = []
        inferred = 0
        for axis in layout:
            atoms = leaves(axis)
            if not self._dynamic(axis):
                parts.append(self.builder.constant([_size(axis)], "size"))
            elif atoms in ([self.batch], [self.sequence]):
                parts.append(self._length(0 if atoms == [self.batch] else 1))
            else:
                inferred += 1
                parts.append(self.builder.constant([-1], "rest"))
        if inferred > 1:
            raise LayoutError("batch and sequence are merged with other axes twice")
        joined = self.builder.op("Concat", parts, f"{node.name}/shape", axis=0)
        self.facts[joined] = self.facts[target]
        node.replace_input_with(1, joined)
        node.attributes.pop("allowzero", None)
        self.reshapes += 1

    def _length(self, axis: int) -> ir.Value:
        return self.builder.op(
            "Shape", [self.ids], f"/model/shape_{axis}", dtype=ir.DataType.INT64, shape=[1], start=axis, end=axis + 1
        )

    def name_dimensions(self) -> None:
        names = {id(self.batch): "batch", id(self.sequence): "sequence"}
        for value in (*self.model.graph.inputs, *self.model.graph.outputs):
            layout = self.layouts.get(value)
            if layout is None or may_be_past(value.name) or value.shape is None or len(value.shape) != len(layout):
                continue
            dims: list[int | str | None] = []
            for axis, dim in zip(layout, value.shape, strict=True):
                atoms = leaves(axis)
                dynamic = len(atoms) == 1 and id(atoms[0]) in names
                dims.append(names[id(atoms[0])] if dynamic else dim if isinstance(dim, int) else dim.value)
            value.shape = ir.Shape(dims)


def _size(axis: list[Atom]) -> int:
    return int(np.prod([atom.size for atom in axis], dtype=np.int64)) if axis else 1
