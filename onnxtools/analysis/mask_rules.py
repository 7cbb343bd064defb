"""Recognizes masks that depend on a padding mask: they are evaluated for known padding, and a rule must explain them.

Exporters write `causal and not padding` in dozens of ways: flattened indices, ScatterND into a slice, sums of two
lowest numbers. The elements of all of them are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.cache import positions
from onnxtools.analysis.facts import Facts, Tokens, infer_node
from onnxtools.analysis.masks import (
    BLOCKING,
    MaskError,
    Pattern,
    hidden_by_addition,
    mask_constants,
    pattern_of,
    prime_above,
    square,
)
from onnxtools.analysis.operators import UNKNOWN, Fact
from onnxtools.base.errors import JobError
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
    """Finds the rules of masks.

    A rule is read from the elements for `size` tokens, where padding is tried, and must hold for `LONG_TEXT` tokens
    too, where windows show that are longer than `size`.

    Args:
        model: the model.
        facts: its facts; the sequence has `size` tokens in them.
        tokens: its token ids.
        size: tokens of a sequence.
    """

    def __init__(self, model: Model, facts: Facts, tokens: Tokens, size: int) -> None:
        self.model, self.facts, self.tokens, self.size = model, facts, tokens, size
        shape = facts[tokens.value].shape
        assert shape is not None and tokens.value.shape is not None
        self._batch = shape[tokens.batch_axis]
        self.rows = self._batch if isinstance(tokens.value.shape[tokens.batch_axis], int) else 2
        self._order = {node: index for index, node in enumerate(model.graph)}
        self._views: dict[tuple[ir.Value | None, int, bytes], Facts] = {}
        self._read: dict[ir.Value, frozenset[ir.Value]] = {}
        self._rules: dict[ir.Value, MaskRule | None] = {}
        self._fixed = isinstance(tokens.value.shape[tokens.axis], int)
        self._limit = positions(model)

    def rule(self, value: ir.Value) -> MaskRule | None:
        """Returns the rule of `value`, or None if there is none or it depends on more than positions and padding."""
        if value not in self._rules:
            self._rules[value] = self._rule(value)
        return self._rules[value]

    def _rule(self, value: ir.Value) -> MaskRule | None:
        known = self.facts[value].value
        source = self._padding(value) if known is None else None
        if known is None and source is None:
            return None
        for real in (1, 0) if known is None else (1,):
            try:
                array = known if known is not None else self._elements(value, source, self._all(), real)
                rule = replace(self._split(array), padding=source, real=real)
                fills = [self._agrees(rule, value, marks) for marks in _padded(self.rows, self.size)]
            except MaskError:
                continue
            if not self._ignores_numbers(rule, value):
                return None
            if source is None:
                return self._at_length(rule, value)
            if all(fill is not None for fill in fills):
                fill = None if rule.fill is None else max(fill for fill in fills if fill is not None)
                return self._at_length(replace(rule, fill=fill), value)
        return None

    def _ignores_numbers(self, rule: MaskRule, value: ir.Value) -> bool:
        """Whether tokens marked 2 are real ones too; False where numbers tell packed texts apart.

        Arithmetic such as (1 - mask) * lowest makes no mask of a 2: it counts on 0 and 1.
        """
        packed = np.ones((self.rows, self.size), np.int64) + (np.arange(self.size) >= self.size // 2)
        try:
            return self._agrees(rule, value, packed) is not None
        except MaskError:
            return True

    def _at_length(self, rule: MaskRule, value: ir.Value) -> MaskRule | None:
        """Returns the rule that also holds for a long text: with a window that did not show before, or None."""
        for length in self._lengths(value):
            try:
                array = self._elements(value, rule.padding, self._all(length, 1), rule.real)
            except MaskError:
                continue  # a table of positions may be shorter
            finally:
                self._views = {key: view for key, view in self._views.items() if key[1] == self.size}
            if array.shape[-2:] != (length, length):
                continue
            try:
                longer = self._split(array, length)
            except MaskError:
                return None  # chunks, which did not show before
            if longer.visible != rule.visible or (longer.fill is None) != (rule.fill is None):
                return None
            before = np.zeros((self.size,) * 2, bool) if rule.pattern is None else rule.pattern.blocked(self.size)
            after = np.zeros((self.size,) * 2, bool) if longer.pattern is None else longer.pattern.blocked(self.size)
            return replace(rule, pattern=longer.pattern) if np.array_equal(before, after) else None
        return rule  # the graph takes no longer text

    def _lengths(self, value: ir.Value) -> list[int]:
        """Returns lengths of longer texts, the longest first; shorter ones for graphs with tables of positions.

        Raises:
            JobError: a window may be too long to be looked at.
        """
        if self._fixed:
            return []
        limit = self._limit or LONGEST_TEXT
        windows = [n for n in mask_constants(value, self.facts) if LONG_TEXT <= n < limit]
        if windows and max(windows) > LONGEST_TEXT:
            raise JobError(
                f"the mask {value.name!r} is computed from the constant {max(windows)}; windows beyond {LONGEST_TEXT} "
                "positions cannot be checked"
            )
        primes = [prime_above(n + 1) for n in sorted(windows, reverse=True)]
        return [n for n in (*primes, LONG_TEXT, 523, 257, 127, 61, 31, self._limit or 0) if self.size < n]

    def is_same_for_longer(self, value: ir.Value) -> bool:
        """Whether a longer text leaves the mask between its first tokens as it is.

        Added numbers may move by one number for each query, which a softmax does not see.
        """
        short = self.without_padding(value)
        for length in sorted(self._lengths(value)) if short is not None else ():
            long = self.without_padding(value, length)
            if short is None or long is None or long.ndim != short.ndim:
                continue
            part = long[tuple(slice(0, size) for size in short.shape)]
            if part.dtype == bool or part.shape != short.shape:
                return np.array_equal(part, short)
            with np.errstate(invalid="ignore"):
                shift = np.nan_to_num(part.astype(np.float64) - short.astype(np.float64))
            return bool(np.allclose(shift, shift[..., :1], rtol=0, atol=1e-4))
        return True

    def without_padding(self, value: ir.Value, length: int | None = None) -> Array | None:
        """Returns the elements of `value` for a batch without padding, None if it depends on other inputs too."""
        known = self.facts[value].value
        if known is not None and length is None:
            return known
        source = self._padding(value) if known is None else None
        if known is None and source is None:
            return None
        try:
            return self._elements(value, source, self._all(length), 1)
        except MaskError:
            return None

    def hides_later(self, value: ir.Value, op: str) -> bool:
        """Whether the mask hides later tokens from earlier ones, where it is the operand of an Add or Sub.

        It does so by its elements, or it comes from an input with an entry for each pair of tokens. A mask of
        [batch, sequence] hides padding alone: an encoder has one, and its tokens see later tokens.
        """
        rule = self.rule(value)
        if rule is not None:
            return op == "Add" and rule.pattern is not None and rule.pattern.causal
        array = self.without_padding(value)
        if array is not None:
            return array.dtype != bool and op in ("Add", "Sub") and self._hides(array if op == "Add" else -array)
        return self.reads_pairs(value)

    def shows_earlier_alone(self, value: ir.Value, when: bool) -> bool:
        """Whether the condition of a Where is `when` for keys that a token sees, and the others include later ones."""
        rule = self.rule(value)
        if rule is not None:
            return rule.visible == when and rule.pattern is not None and rule.pattern.causal
        array = self.without_padding(value)
        if array is None:
            return self.reads_pairs(value)
        return self._hides(np.where(array == when, 0.0, -np.inf))

    def reads_pairs(self, value: ir.Value) -> bool:
        """Whether the mask comes from an input with an entry for each pair of tokens."""
        return any((self.facts[source].shape or ())[-2:] == (self.size, self.size) for source in self.sources(value))

    def _hides(self, array: Array) -> bool:
        """Whether added numbers [..., size, size] hide all later keys, and leave each token one that it sees."""
        if array.ndim < 2 or array.shape[-2:] != (self.size, self.size):
            return False
        blocked = array.reshape(-1, self.size, self.size) <= BLOCKING
        later = np.triu(np.ones((self.size, self.size), bool), 1)
        return bool(blocked[:, later].all() and not blocked.all(axis=-1).any())

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

    def _padding(self, value: ir.Value) -> ir.Value | None:
        sources = list(self.sources(value))
        return sources[0] if len(sources) == 1 and self.is_padding(sources[0]) else None

    def _all(self, length: int | None = None, rows: int | None = None) -> Array:
        fixed = self.rows == self._batch
        return np.ones((self.rows if fixed or rows is None else rows, length or self.size), np.int64)

    def _split(self, array: Array, size: int | None = None) -> MaskRule:
        """Returns the rule of known elements.

        Raises:
            MaskError: they follow none.
        """
        matrix = square(array, size or self.size)
        if matrix is None:
            raise MaskError(f"has the shape {list(array.shape)}, which is no [sequence, sequence] mask")
        if matrix.dtype == bool:
            visible = bool(matrix[-1, -1])  # a token always sees itself
            return MaskRule(pattern_of(~matrix if visible else matrix), visible=visible)
        hidden, fill = hidden_by_addition(matrix)
        return MaskRule(pattern_of(hidden), fill=fill)

    def _agrees(self, rule: MaskRule, value: ir.Value, marks: Array) -> float | None:
        """Returns the mildest number that hides a key, 0.0 for booleans; None if the elements contradict the rule.

        What is hidden from padding, and from a token that sees no key, has no meaning.

        Args:
            marks: int64 [rows, size]: 0 marks padding, other numbers real tokens.
        """
        if rule.padding is None:
            return rule.fill or 0.0
        array, real = self._elements(value, rule.padding, marks, rule.real), marks > 0
        if rule.fill is None:
            hidden, fill = ~array if rule.visible else array, 0.0
        else:
            hidden = hidden_by_addition(array)[0]
            fill = float(array[hidden].max()) if hidden.any() else BLOCKING
        expected = ~real[:, None, None, :]
        if rule.pattern is not None:
            expected = expected | rule.pattern.blocked(self.size)
        if hidden.ndim != 4 or hidden.shape[0] not in (1, self.rows):
            return None
        matters = ~expected.all(axis=-1, keepdims=True)
        if "mask" in (rule.padding.name or "").lower():
            matters = matters & real[:, None, :, None]
        return None if np.any((hidden != expected) & matters) else fill

    def _elements(self, value: ir.Value, source: ir.Value | None, marks: Array, real: int) -> Array:
        """Returns the elements of `value` where `source` marks tokens by `marks` [rows, length].

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


LONG_TEXT = 1031
"""Tokens of the longer text that a rule must hold for, a prime."""
LONGEST_TEXT = 4100
"""Longest text that a mask is evaluated for."""


def _padded(rows: int, size: int) -> list[Array]:
    """Returns marks [rows, size]: nothing padded, the left, the right, and single places."""
    left, right = np.arange(size) >= size // 3, np.arange(size) < size - size // 4
    sides = [np.stack([a, b][:rows] + [a] * (rows - 2)) for a, b in ((left, right), (right, left))]
    scattered = list(np.random.default_rng(0).random((2, rows, size)) < 0.6)
    return [np.ones((rows, size), np.int64), *(marks.astype(np.int64) for marks in (*sides, *scattered))]
