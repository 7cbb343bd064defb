"""The elements of masks, evaluated for known padding and for texts of other lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts, Tokens, infer_node
from onnxtools.analysis.masks import MaskError
from onnxtools.analysis.operators import UNKNOWN, Fact
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, is_op

Array = np.ndarray[Any, Any]
_LIMIT = 1 << 27
"""Most elements of a value that is evaluated."""


class MaskViews:
    """Evaluates what is computed from positions and from inputs that mark padding.

    Args:
        model: the model. Its graph may change afterwards, above the sizes that masks read.
        facts: its facts.
        tokens: its token ids.

    Attributes:
        size: the stand-in length of a text in `facts`.
        rows: rows that padding is tried with.
    """

    def __init__(self, model: Model, facts: Facts, tokens: Tokens) -> None:
        self.model, self.facts, self.tokens = model, facts, tokens
        shape, dims = facts[tokens.value].shape, tokens.value.shape
        assert shape is not None and dims is not None
        self.size, self._batch = shape[tokens.axis], shape[tokens.batch_axis]
        self.rows = self._batch if isinstance(dims[tokens.batch_axis], int) else 2
        self._order = {node: index for index, node in enumerate(model.graph)}
        self._views: dict[tuple[ir.Value | None, int, bytes], Facts] = {}
        self._read: dict[ir.Value, frozenset[ir.Value]] = {}

    def sources(self, value: ir.Value) -> frozenset[ir.Value]:
        """Returns the graph inputs whose elements, not only whose sizes, `value` is computed from."""
        waiting, found, seen = [value], set[ir.Value](), {value}
        while waiting:
            current = waiting.pop()
            node = current.producer()
            if current.is_graph_input():
                found.add(current)
            elif current in self._read:
                found |= self._read[current]
            elif node is not None and not is_op(node, "Shape", "Size"):
                new = {v for v in node.inputs if v is not None} - seen
                seen |= new
                waiting += new
        self._read[value] = frozenset(found)
        return self._read[value]

    def is_padding(self, value: ir.Value) -> bool:
        """Whether a graph input may mark padding: [batch, sequence], and neither tokens nor positions."""
        shape, ids = self.facts[value].shape, self.facts[self.tokens.value].shape
        if shape is None or ids is None or len(shape) != 2 or value is self.tokens.value:
            return False
        return shape == (self._batch, self.size) and "position" not in (value.name or "")

    def padding(self, value: ir.Value) -> ir.Value | None:
        """Returns the input that marks padding, if `value` is computed from no other input."""
        sources = list(self.sources(value))
        return sources[0] if len(sources) == 1 and self.is_padding(sources[0]) else None

    def all_real(self, length: int | None = None, rows: int | None = None) -> Array:
        """Returns marks of a text without padding, int64 [rows, length]."""
        fixed = self.rows == self._batch
        return np.ones((self.rows if fixed or rows is None else rows, length or self.size), np.int64)

    def elements(self, value: ir.Value, source: ir.Value | None, marks: Array, real: int) -> Array:
        """Returns the elements of `value` where `source` marks tokens by `marks`.

        Args:
            value: a value that is computed from sizes and `source` alone.
            source: an input [batch, sequence]; None where positions alone matter.
            marks: int64 [rows, length]: 0 for padding, other numbers for real tokens.
            real: the number that the input has for a real token, 1 or 0.

        Raises:
            MaskError: they cannot be computed.
        """
        length = marks.shape[1]
        marked = marks if real else 1 - np.minimum(marks, 1)
        key = (source, length, marked.tobytes() if source is not None else b"")
        if key not in self._views:
            self._views[key] = self._view(*marks.shape)
            if source is not None:
                dtype = self.facts[source].dtype
                array = marked.astype(dtype.numpy() if dtype is not None else bool)
                self._views[key][source] = Fact(dtype, array.shape, array)
        view = self._views[key]
        if length != self.size:
            del self._views[key]  # it is large
        for node in self._above(value, view):
            if is_op(node, "Shape"):
                view[node.outputs[0]] = self._sizes(node, *marks.shape)
            else:
                infer_node(node, view, self.model)
        found = view[value].value
        if found is None:
            raise MaskError(f"depends on {value.name!r}, which cannot be evaluated")
        return found

    def _view(self, rows: int, length: int) -> Facts:
        """Returns facts of the inputs alone, with `rows` rows of `length` tokens."""
        view = Facts({}, _LIMIT)
        for value in self.model.graph.inputs:
            fact = self.facts[value]
            if fact.shape is not None:
                view[value] = Fact(fact.dtype, self._resized(fact.shape, rows, length))
        return view

    def _resized(self, shape: tuple[int, ...], rows: int, length: int) -> tuple[int, ...]:
        """Returns `shape` with `rows` and `length` in place of the stand-ins, which are primes."""
        sizes = []
        for size in shape:
            if size and rows != self._batch and size % self._batch == 0:
                size = size // self._batch * rows
            if size and length != self.size and size % self.size == 0:
                size = size // self.size * length
            sizes.append(size)
        return tuple(sizes)

    def _sizes(self, node: ir.Node, rows: int, length: int) -> Fact:
        """Returns the output of a Shape by the facts of the model: what lies above may be no part of the mask."""
        shape = self.facts[node.inputs[0]].shape
        if shape is None:
            return UNKNOWN
        sizes = self._resized(shape, rows, length)[attribute(node, "start", 0) : attribute(node, "end", None)]
        return Fact(ir.DataType.INT64, (len(sizes),), np.array(sizes, dtype=np.int64))

    def _above(self, value: ir.Value, view: Facts) -> list[ir.Node]:
        """Returns the nodes from sizes and inputs to `value` that have no facts in `view`, in graph order."""
        waiting, nodes = [value], set[ir.Node]()
        while waiting:
            node = waiting.pop().producer()
            if node is not None and node not in nodes and not (node.outputs and node.outputs[0] in view):
                nodes.add(node)
                waiting += [v for v in node.inputs if v is not None and not is_op(node, "Shape")]
        return sorted(nodes, key=lambda node: self._order.get(node, -1))
