"""Masks of a cached graph: the exporter's [sequence, sequence] masks, rewritten as [sequence, total]."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts, Tokens
from onnxtools.analysis.mask_rules import MaskRule, MaskRules
from onnxtools.analysis.masks import HALF_LOWEST, MaskError, Pattern
from onnxtools.ir.edit import Builder
from onnxtools.ir.model import Model
from onnxtools.ir.query import attributes_of
from onnxtools.passes.kv_cache.whole_length import WholeLength

_POINTWISE = {
    "Add", "Sub", "Mul", "Div", "And", "Or", "Not", "Where", "Cast", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Neg", "Max", "Min", "Identity", "BitwiseNot", "Xor",
}  # fmt: skip


_AXES = ("Unsqueeze", "Squeeze")
"""Operators that may stand between a mask input of pairs and the scores; such an input has rows of new tokens alone."""


class MaskRewriter:
    """Writes the masks of the exporter again, grown to the total length.

    A mask that follows a rule (`MaskRules`) is written again from this rule. Another one is taken apart at pointwise
    nodes, and what remains is computed for the whole length (`WholeLength`), which is right for any mask of positions
    and padding.

    Args:
        model: the model.
        facts: its facts, computed with the stand-in length `size`.
        builder: inserts the new nodes.
        tokens: the token ids.
        past: cache length before this step, an int64 scalar of the graph.
        total: cache length after this step, an int64 scalar of the graph.
    """

    def __init__(
        self, model: Model, facts: Facts, builder: Builder, tokens: Tokens, past: ir.Value, total: ir.Value
    ) -> None:
        self.facts, self.builder = facts, builder
        self.past, self.total = past, total
        self.anchor = builder.before
        self.patterns: set[Pattern] = set()
        self.rules = MaskRules(model, facts, tokens)
        self.size = self.rules.size
        self._whole = WholeLength(facts, self.rules, builder, past, total)
        self._replacements: dict[Any, ir.Value] = {}

    @property
    def inputs(self) -> set[str]:
        """Names of the mask inputs that now span the total length."""
        return self._whole.inputs

    def notes(self) -> list[str]:
        """Notes for people: the rewritten masks and the grown mask inputs."""
        lines = []
        for pattern in self.patterns:
            keys = "causal" if pattern.causal else "all keys"
            window = f", sliding window of {pattern.window}" if pattern.window else ""
            lines.append(f"mask from positions ({keys}{window}) written for the total length")
        lines += [f"mask input {name!r} now spans total_sequence = past + new tokens" for name in sorted(self.inputs)]
        lines += [
            f"warning: mask input {name!r} decides for each pair of tokens who sees whom; it must be causal"
            for name in sorted(self._whole.pairs)
        ]
        if self._whole.square:
            lines.append(
                f"{self._whole.square} masks follow no rule: each step computes them for all pairs of tokens and takes "
                "its own rows"
            )
        return lines

    def counts_keys(self, value: ir.Value) -> bool:
        """Whether the last axis of `value` is the sequence: it then has an entry for each key."""
        shape = self.facts[value].shape
        if shape is None:
            raise MaskError(f"depends on {value.name!r}, whose shape is unknown")
        return bool(shape) and shape[-1] == self.size

    def size_for_keys(self, value: ir.Value) -> ir.Value:
        """A size or bound that may be computed from the number of keys, computed from the total length.

        Raises:
            MaskError: it depends on more than sizes.
        """
        return self._whole.value(value)

    # --- masks that follow a rule ------------------------------------------------------------------------------------

    def _hidden(self, rule: MaskRule) -> ir.Value:
        """Booleans [sequence, total] or [batch, 1, sequence, total], True where a key is hidden.

        They are added once, at the start of the graph.
        """
        key = (rule.pattern, rule.padding, rule.real)
        if key not in self._replacements:
            build, insertion_point = self.builder, self.builder.before
            build.before = self.anchor
            parts = self._hidden_by_position(rule.pattern) if rule.pattern is not None else []
            if rule.padding is not None:
                parts.append(self._hidden_by_padding(rule.padding, rule.real))
            hidden = parts[0]
            for part in parts[1:]:
                hidden = build.op("Or", [hidden, part], "/model/mask/hidden")
            build.before = insertion_point
            self._replacements[key] = hidden
        return self._replacements[key]

    def _hidden_by_position(self, pattern: Pattern) -> list[ir.Value]:
        self.patterns.add(pattern)
        build = self.builder
        query, key = self._places()
        parts = [build.op("Greater", [key, query], "/model/mask/future")] if pattern.causal else []
        if pattern.window is not None:
            distance = build.op("Sub", [query, key], "/model/mask/distance")
            width = build.constant(np.array(pattern.window, dtype=np.int64), "window")
            parts.append(build.op("GreaterOrEqual", [distance, width], "/model/mask/outside"))
        return parts

    def _hidden_by_padding(self, padding: ir.Value, real: int) -> ir.Value:
        build = self.builder
        marks = self._whole.grow_input(padding)
        if self.facts[padding].dtype != ir.DataType.BOOL:
            marks = build.op("Cast", [marks], "/model/mask/marks", to=ir.DataType.BOOL.value)
        hidden = build.op("Not", [marks], "/model/mask/padding") if real else marks
        return build.op("Unsqueeze", [hidden, build.constant([1, 2], "axes")], "/model/mask/Unsqueeze")

    def _places(self) -> tuple[ir.Value, ir.Value]:
        """int64 positions of the new tokens [sequence, 1] and of all keys [total]."""
        if "places" not in self._replacements:
            build = self.builder
            zero, one = (build.constant(np.array(n, dtype=np.int64), f"int_{n}") for n in (0, 1))
            query = build.op("Range", [self.past, self.total, one], "/model/mask/query")
            self._replacements["places"] = build.op(
                "Unsqueeze", [query, build.constant([1], "axes_1")], "/model/mask/query_column"
            )
            self._replacements["keys"] = build.op("Range", [zero, self.total, one], "/model/mask/keys")
        return self._replacements["places"], self._replacements["keys"]

    def additive(self, rule: MaskRule, fill: float, dtype: ir.DataType | None) -> ir.Value:
        """0 or `fill` in the type of the scores: TensorRT fuses an added mask, not a boolean one.

        A row without a visible key stays finite where there is padding.
        """
        assert dtype is not None
        if rule.padding is not None:
            fill = max(fill, HALF_LOWEST.get(dtype, fill))
        key = (rule.pattern, rule.padding, rule.real, fill, dtype)
        if key not in self._replacements:
            hidden = self._hidden(rule)
            build, insertion_point = self.builder, self.builder.before
            build.before = self.anchor
            low = build.constant(np.array(fill, dtype=dtype.numpy()), "mask_fill", dtype)
            zero = build.constant(np.array(0, dtype=dtype.numpy()), "mask_zero", dtype)
            self._replacements[key] = build.op("Where", [hidden, low, zero], "/model/mask/additive")
            build.before = insertion_point
        return self._replacements[key]

    # --- other masks -------------------------------------------------------------------------------------------------

    def extend(self, value: ir.Value) -> ir.Value:
        """`value`, a mask or a part of one, with its last axis grown from sequence to total.

        Raises:
            MaskError: it is computed in a way that cannot be extended.
        """
        if value not in self._replacements:
            self._replacements[value] = self._extend(value)
        return self._replacements[value]

    def _extend(self, value: ir.Value) -> ir.Value:
        if not self.counts_keys(value):
            # A flag of each row, or one number: where padding is in it, it is computed from the whole mask.
            return (
                self._whole.value(value)
                if any(map(self.rules.views.is_padding, self.rules.views.sources(value)))
                else value
            )
        known, dtype, node = self.facts[value].value, self.facts[value].dtype, value.producer()
        rule, flat = self.rules.rule(value), known is not None and np.all(known == known.reshape(-1)[0])
        shows_all = rule is not None and rule.pattern is None and rule.padding is None
        if known is not None and flat and (shows_all or not self.facts.dims):
            return self.builder.constant(np.array(known.reshape(-1)[0]), "mask_constant", dtype)
        if rule is not None and rule.fill is not None:
            return self.additive(rule, rule.fill, dtype)
        if rule is not None:
            hidden = self._hidden(rule)
            return self.builder.op("Not", [hidden], "/model/mask/visible") if rule.visible else hidden
        pairs = self.rules.reads_pairs(value)
        further = {*_POINTWISE, "Expand", *(_AXES if pairs else ())}
        if node is None or not self._is_square(value) or node.op_type not in further:
            return self._whole.value(value)
        if node.op_type in ("Expand", "Identity") and node.inputs[0] is not None:
            return self.extend(node.inputs[0])
        inputs = [None if v is None else self.extend(v) for v in node.inputs]
        return self.builder.op(node.op_type, inputs, f"/model/mask/{node.op_type}", **attributes_of(node))

    def _is_square(self, value: ir.Value) -> bool:
        return (self.facts[value].shape or ())[-2:] == (self.size, self.size)
