"""Recognizes masks that depend on a padding mask: they are evaluated for known padding, and a rule must explain them.

Exporters write `causal and not padding` in dozens of ways: flattened indices, ScatterND into a slice, sums of two
lowest numbers. The elements of all of them are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts, Tokens, infer_node
from onnxtools.analysis.masks import BLOCKING, MaskError, Pattern, hidden_by_addition, pattern_of, square
from onnxtools.analysis.operators import UNKNOWN, Fact
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, is_op

Array = np.ndarray[Any, Any]
_LIMIT = 1 << 27
"""Most elements of a mask that is evaluated; two rows of a window of 4096 have 2^26."""


@dataclass(frozen=True)
class MaskRule:
    """A mask [..., queries, keys] by its elements.

    Attributes:
        pattern: the keys that it hides by their positions; None if none.
        padding: a graph input [batch, sequence]; the mask also hides the keys that it marks as padding.
        real: the number in `padding` that marks a real token, 1 or 0.
        fill: the number that is added to the score of a hidden key; None for a mask of booleans.
        visible: booleans are True where a key is visible, else where it is hidden.
    """

    pattern: Pattern | None
    padding: ir.Value | None = None
    real: int = 1
    fill: float | None = None
    visible: bool = True


class MaskRules:
    """Finds the rules of masks, for a sequence of `size` tokens.

    Args:
        model: the model.
        facts: its facts; the sequence has `size` tokens in them.
        tokens: its token ids.
        size: tokens of a sequence.
    """

    def __init__(self, model: Model, facts: Facts, tokens: Tokens, size: int) -> None:
        self.model, self.facts, self.tokens, self.size = model, facts, tokens, size
        shape = facts[tokens.value].shape
        assert shape is not None
        self._batch = shape[tokens.batch_axis]
        self.rows = 2 if facts.dims else self._batch
        self._order = {node: index for index, node in enumerate(model.graph)}
        self._views: dict[tuple[ir.Value, bytes], Facts] = {}
        self._read: dict[ir.Value, frozenset[ir.Value]] = {}

    def rule(self, value: ir.Value) -> MaskRule | None:
        """Returns the rule of `value`, or None if there is none or it depends on more than positions and padding."""
        known = self.facts[value].value
        try:
            if known is not None:
                return self._split(known)
        except MaskError:
            return None
        source = self._padding(value)
        for real in (1, 0) if source is not None else ():
            assert source is not None
            try:
                whole = self._split(self._elements(value, source, np.ones((self.rows, self.size), bool), real))
            except MaskError:
                continue
            found = [self._agrees(whole, value, source, marks, real) for marks in _padded(self.rows, self.size)]
            if all(fill is not None for fill in found):
                fill = None if whole.fill is None else max(fill for fill in found if fill is not None)
                return replace(whole, padding=source, real=real, fill=fill)
        return None

    def without_padding(self, value: ir.Value) -> Array | None:
        """Returns the elements of `value` for a batch without padding, None if it depends on other inputs too."""
        known = self.facts[value].value
        source = self._padding(value) if known is None else None
        if source is None:
            return known
        try:
            return self._elements(value, source, np.ones((self.rows, self.size), bool), 1)
        except MaskError:
            return None

    def hides_later(self, value: ir.Value) -> bool:
        """Whether the mask hides later tokens from earlier ones.

        It does so by its elements, or it comes from an input with an entry for each pair of tokens. A mask of
        [batch, sequence] hides padding alone: an encoder has one, and its tokens see later tokens.
        """
        rule = self.rule(value)
        if rule is not None:
            return rule.pattern is not None and rule.pattern.causal
        array = self.without_padding(value)
        if array is not None:
            return _hides_later(array, self.size)
        return any((self.facts[source].shape or ())[-2:] == (self.size, self.size) for source in self.sources(value))

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
        shape, tokens = self.facts[value].shape, self.facts[self.tokens.value].shape
        same = shape is not None and tokens is not None and self.tokens.axis == 1 and shape == tokens
        return same and value is not self.tokens.value and "position" not in (value.name or "")

    def _padding(self, value: ir.Value) -> ir.Value | None:
        sources = list(self.sources(value))
        return sources[0] if len(sources) == 1 and self.is_padding(sources[0]) else None

    def _split(self, array: Array) -> MaskRule:
        """Returns the rule of known elements.

        Raises:
            MaskError: they follow none.
        """
        matrix = square(array, self.size)
        if matrix is None:
            raise MaskError(f"has the shape {list(array.shape)}, which is no [sequence, sequence] mask")
        if matrix.dtype == bool:
            visible = bool(matrix[-1, -1])  # a token always sees itself
            return MaskRule(pattern_of(~matrix if visible else matrix), visible=visible)
        hidden, fill = hidden_by_addition(matrix)
        return MaskRule(pattern_of(hidden), fill=fill)

    def _agrees(self, rule: MaskRule, value: ir.Value, source: ir.Value, marks: Array, real: int) -> float | None:
        """Returns the mildest number that hides a key, 0.0 for booleans; None if the elements contradict the rule.

        What is hidden from padding, and from a token that sees no key, has no meaning.
        """
        try:
            array = self._elements(value, source, marks, real)
            if rule.fill is None:
                hidden, fill = ~array if rule.visible else array, 0.0
            else:
                hidden = hidden_by_addition(array)[0]
                fill = float(array[hidden].max()) if hidden.any() else BLOCKING
        except MaskError:
            return None
        expected = ~marks[:, None, None, :]
        if rule.pattern is not None:
            expected = expected | rule.pattern.blocked(self.size)
        if hidden.ndim != 4 or hidden.shape[0] not in (1, self.rows):
            return None
        matters = marks[:, None, :, None] & ~expected.all(axis=-1, keepdims=True)
        return None if np.any((hidden != expected) & matters) else fill

    def _elements(self, value: ir.Value, source: ir.Value, marks: Array, real: int) -> Array:
        """Returns the elements of `value` where `source` marks real tokens by `marks` [rows, size].

        Raises:
            MaskError: they cannot be computed.
        """
        dtype = self.facts[source].dtype
        marked = (marks if real else ~marks).astype(dtype.numpy() if dtype is not None else bool)
        key = (source, marked.tobytes())
        if key not in self._views:
            self._views[key] = self._view()
            self._views[key][source] = Fact(dtype, marked.shape, marked)
        view = self._views[key]
        for node in self._above(value, view):
            if is_op(node, "Shape"):
                view[node.outputs[0]] = self._sizes(node)
            else:
                infer_node(node, view, self.model)
        array = view[value].value
        if array is None:
            raise MaskError(f"depends on {value.name!r}, which cannot be evaluated")
        return array

    def _view(self) -> Facts:
        """Returns facts of the inputs alone, with `rows` rows."""
        view = Facts({}, _LIMIT)
        for value in self.model.graph.inputs:
            fact = self.facts[value]
            if fact.shape is not None:
                view[value] = Fact(fact.dtype, self._with_rows(fact.shape))
        return view

    def _with_rows(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `shape` with `rows` in place of the stand-in of the batch, which is a prime."""
        other = self.rows != self._batch
        return tuple(d // self._batch * self.rows if other and d % self._batch == 0 else d for d in shape)

    def _sizes(self, node: ir.Node) -> Fact:
        """Returns the output of a Shape by the facts of the model: what lies above may be no part of the mask."""
        shape = self.facts[node.inputs[0]].shape
        if shape is None:
            return UNKNOWN
        sizes = self._with_rows(shape)[attribute(node, "start", 0) : attribute(node, "end", None)]
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


def _padded(rows: int, size: int) -> list[Array]:
    """Returns marks of real tokens [rows, size]: nothing padded, the left, the right, and single places."""
    left, right = np.arange(size) >= size // 3, np.arange(size) < size - size // 4
    scattered = np.random.default_rng(0).random((2, rows, size)) < 0.6
    return [np.ones((rows, size), bool), *(np.stack([a, b][:rows] + [a] * (rows - 2)) for a, b in ((left, right),
            (right, left))), *scattered]  # fmt: skip


def _hides_later(array: Array, size: int) -> bool:
    """Whether the elements hide all later keys: additive or subtracted numbers, or booleans either way."""
    if array.ndim < 2 or array.shape[-2:] != (size, size):
        return False
    later = np.triu(np.ones((size, size), bool), 1)
    rows = array.reshape(-1, size, size)
    if array.dtype == bool:
        return any(bool((rows[:, later] == hidden).all() and (rows[:, ~later] != hidden).any()) for hidden in (0, 1))
    magnitudes = np.abs(rows.astype(np.float64))
    return bool((magnitudes[:, later] >= -BLOCKING).all() and not (magnitudes[:, ~later] >= -BLOCKING).all())
