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
from onnxtools.analysis.facts import Facts, Tokens
from onnxtools.analysis.mask_views import MaskViews
from onnxtools.analysis.masks import (
    BLOCKING,
    SENTINEL,
    MaskError,
    Pattern,
    hidden_by_addition,
    mask_constants,
    pattern_of,
    prime_above,
    square,
)
from onnxtools.base.errors import JobError
from onnxtools.ir.model import Model

Array = np.ndarray[Any, Any]


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

    def blocked(self, size: int) -> Array:
        """Returns the keys that are hidden by their positions, booleans [size, size]."""
        return self.pattern.blocked(size) if self.pattern is not None else np.zeros((size, size), bool)


class MaskRules:
    """Finds the rules of masks.

    A rule is read from the elements for `size` tokens, where padding is tried, and must hold for `LONG_TEXT` tokens
    too, where windows show that are longer than `size`.

    Args:
        model: the model.
        facts: its facts.
        tokens: its token ids.

    Attributes:
        views: evaluates masks.
        size: tokens of a text in `facts`.
    """

    def __init__(self, model: Model, facts: Facts, tokens: Tokens) -> None:
        self.facts, self.tokens = facts, tokens
        self.views = MaskViews(model, facts, tokens)
        self.size = self.views.size
        self._rules: dict[ir.Value, MaskRule | None] = {}
        assert tokens.value.shape is not None
        self._fixed = isinstance(tokens.value.shape[tokens.axis], int)
        self._limit = positions(model)

    def rule(self, value: ir.Value) -> MaskRule | None:
        """Returns the rule of `value`, or None if there is none or it depends on more than positions and padding."""
        if value not in self._rules:
            self._rules[value] = self._rule(value)
        return self._rules[value]

    def _rule(self, value: ir.Value) -> MaskRule | None:
        known = self.facts[value].value
        if known is not None:
            try:
                return self._at_length(self._split(known), value)
            except MaskError:
                return None
        source = self.views.padding(value)
        for real in (1, 0) if source is not None else ():
            try:
                array = self.views.elements(value, source, self.views.all_real(), real)
                rule = replace(self._split(array), padding=source, real=real)
                fills = [self._agrees(rule, value, marks) for marks in _padded(self.views.rows, self.size)]
            except MaskError:
                continue
            if not self._ignores_numbers(rule, value):
                return None
            if all(fill is not None for fill in fills):
                fill = None if rule.fill is None else max(fill for fill in fills if fill is not None)
                return self._at_length(replace(rule, fill=fill), value)
        return None

    def _ignores_numbers(self, rule: MaskRule, value: ir.Value) -> bool:
        """Whether tokens marked 2 are real ones too; False where numbers tell packed texts apart.

        Arithmetic such as (1 - mask) * lowest makes no mask of a 2: it counts on 0 and 1.
        """
        packed = np.ones((self.views.rows, self.size), np.int64) + (np.arange(self.size) >= self.size // 2)
        try:
            return self._agrees(rule, value, packed) is not None
        except MaskError:
            return True

    def _at_length(self, rule: MaskRule, value: ir.Value) -> MaskRule | None:
        """Returns the rule that also holds for a long text: with a window that did not show before, or None."""
        for length in self._lengths(value):
            try:
                array = self.views.elements(value, rule.padding, self.views.all_real(length, 1), rule.real)
            except MaskError:
                continue  # a table of positions may be shorter
            if array.shape[-2:] != (length, length):
                continue
            try:
                longer = self._split(array, length)
            except MaskError:
                return None  # chunks, which did not show before
            if longer.visible != rule.visible or (longer.fill is None) != (rule.fill is None):
                return None
            same = np.array_equal(rule.blocked(self.size), longer.blocked(self.size))
            return replace(rule, pattern=longer.pattern) if same else None
        return rule  # the graph takes no longer text

    def _lengths(self, value: ir.Value) -> list[int]:
        """Returns lengths of longer texts, the longest first; shorter ones for graphs with tables of positions.

        Raises:
            JobError: a window may be too long to be looked at.
        """
        if self._fixed:
            return []
        limit = self._limit or SENTINEL
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
        source = self.views.padding(value) if known is None else None
        if known is None and source is None:
            return None
        try:
            return self.views.elements(value, source, self.views.all_real(length), 1)
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
        return any(
            (self.facts[source].shape or ())[-2:] == (self.size, self.size) for source in self.views.sources(value)
        )

    def _hides(self, array: Array) -> bool:
        """Whether added numbers [..., size, size] hide all later keys, and leave each token one that it sees."""
        if array.ndim < 2 or array.shape[-2:] != (self.size, self.size):
            return False
        blocked = array.reshape(-1, self.size, self.size) <= BLOCKING
        later = np.triu(np.ones((self.size, self.size), bool), 1)
        return bool(blocked[:, later].all() and not blocked.all(axis=-1).any())

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
        assert rule.padding is not None
        array, real = self.views.elements(value, rule.padding, marks, rule.real), marks > 0
        if rule.fill is None:
            hidden, fill = ~array if rule.visible else array, 0.0
        else:
            hidden = hidden_by_addition(array)[0]
            fill = float(array[hidden].max()) if hidden.any() else BLOCKING
        expected = ~real[:, None, None, :] | rule.blocked(self.size)
        if hidden.ndim != 4 or hidden.shape[0] not in (1, self.views.rows):
            return None
        matters = ~expected.all(axis=-1, keepdims=True)
        if "mask" in (rule.padding.name or "").lower():
            matters = matters & real[:, None, :, None]
        return None if np.any((hidden != expected) & matters) else fill


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
