"""The way from the query-key product to the Softmax, replayed with masks of the total length."""

from __future__ import annotations

import onnx_ir as ir

from onnxtools.analysis.attention import Attention
from onnxtools.analysis.masks import BLOCKING, MaskError
from onnxtools.base.errors import JobError
from onnxtools.ir.edit import Builder
from onnxtools.ir.query import attributes_of
from onnxtools.passes.kv_cache.mask import MaskRewriter
from onnxtools.passes.kv_cache.renewal import Renewal

_LAYOUT = {"Reshape", "Unsqueeze", "Squeeze", "Expand", "Identity", "Dropout"}
_KEEP_HIDDEN = {"Add", "Sub", "Cast", "Concat", "QuantizeLinear", "DequantizeLinear"}
"""Operators behind a mask that leave hidden keys hidden: further masks and biases, the largest score, sinks."""
_SMALLEST = 0.05
"""Smallest factor behind a mask: -1e4 times it still hides."""


class ScoreReplay:
    """Replays the nodes between the query-key product and the Softmax.

    Args:
        builder: inserts the nodes.
        masks: grows the masks.
        renewal: renews what is computed from the scores beside them, such as their largest.
    """

    def __init__(self, builder: Builder, masks: MaskRewriter, renewal: Renewal) -> None:
        self.builder, self.masks, self.renewal = builder, masks, renewal
        self._masked = False
        self._unread: set[str] = set()

    def replay(self, scores: ir.Value, block: Attention, prefix: str) -> ir.Value:
        """Apply the block's scaling and masking to `scores` [batch, heads, sequence, total].

        Raises:
            JobError: the block has no causal mask, or a mask that cannot be extended.
        """
        self._masked, self._unread = False, set()
        self.renewal.values[block.product_qk.outputs[0]] = scores
        for node, data in block.scores:
            try:
                scores = self._step(scores, node, data, block, prefix)
            except MaskError as error:
                where = f"attention at {block.softmax.name!r}: the mask of node {node.name!r} ({node.op_type})"
                raise JobError(f"{where} {error}; it cannot be extended to a cache") from None
            self.renewal.values[node.outputs[0]] = scores
        if not self._masked and self._unread:
            raise JobError(
                f"attention at {block.softmax.name!r} has no causal mask that is understood: it depends on the inputs "
                f"{', '.join(sorted(self._unread))}"
            )
        if not self._masked:
            raise JobError(
                f"attention at {block.softmax.name!r} has no causal mask: earlier tokens see later ones, so a cache "
                "would change the result"
            )
        return scores

    def _step(self, scores: ir.Value, node: ir.Node, data: int, block: Attention, prefix: str) -> ir.Value:
        """Replay one node; returns the new scores and remembers whether later keys are hidden."""
        name = f"{prefix}/{node.op_type}"
        if node.op_type in _LAYOUT:
            return scores
        if node.op_type == "Transpose":
            raise MaskError("transposes the scores")
        if node.op_type == "Where":
            return self._where(scores, node, data, name)
        if self._masked and not self._keeps_hidden(node, data):
            raise MaskError("changes the scores of hidden keys")
        inputs: list[ir.Value | None] = list(node.inputs)
        inputs[data] = scores
        for index, side in enumerate(node.inputs):
            if index == data or side is None:
                continue
            if not self.masks.counts_keys(side):
                inputs[index] = self._beside(side, node, prefix)
                continue
            rule = self.masks.rules.rule(side) if node.op_type in ("Add", "Sub") else None
            if rule is not None and rule.pattern is None and rule.padding is None:
                return scores  # adds zeros
            sources = self.masks.rules.views.sources(side)
            self._unread |= {
                v.name or "" for v in sources if len(sources) > 1 or not self.masks.rules.views.is_padding(v)
            }
            first = node.op_type == "Add" or (node.op_type == "Sub" and data == 0)
            self._masked |= first and self.masks.rules.hides_later(side, node.op_type)
            inputs[index] = self._with_heads(self.masks.extend(side), side, block)
        attributes = attributes_of(node)
        if node.op_type == "Concat":
            attributes["axis"] = -1  # beside the keys: attention sinks
        return self.builder.op(node.op_type, inputs, name, **attributes)

    def _keeps_hidden(self, node: ir.Node, data: int) -> bool:
        """Whether hidden keys stay hidden behind `node`."""
        if node.op_type in ("Mul", "Div"):
            factor = self.masks.facts[node.inputs[1 - data]].value
            if factor is None or factor.size != 1 or data != 0:
                return False
            number = float(factor.reshape(-1)[0])
            return number >= _SMALLEST if node.op_type == "Mul" else 0 < number <= 1 / _SMALLEST
        return node.op_type in _KEEP_HIDDEN

    def _beside(self, side: ir.Value, node: ir.Node, prefix: str) -> ir.Value | None:
        """An operand without an axis of keys: a scale, a soft cap, the largest score of each row.

        Raises:
            MaskError: it is computed from scores that are not masked yet, so that later keys are in it.
        """
        if self.masks.facts[side].value is None and self.renewal.is_of_attention(side):
            if not self._masked:
                raise MaskError("is computed from scores that show later keys")
            return self.renewal.value(side, prefix)
        return self.masks.extend(side)

    def _with_heads(self, grown: ir.Value, side: ir.Value, block: Attention) -> ir.Value:
        """`grown` [batch * heads, queries, keys] with axes of their own for batch and heads, else `grown` itself."""
        shape, heads = self.masks.facts[side].shape or (), block.query.head_count
        if len(shape) != 3 or shape[0] != block.query.batch.size * heads or heads == 1:
            return grown
        build = self.builder
        sizes = build.op("Shape", [grown], "/model/mask/sizes", start=1, end=3)
        target = build.op("Concat", [build.constant([-1, heads], "rows"), sizes], "/model/mask/split", axis=0)
        return build.op("Reshape", [grown, target], "/model/mask/by_head")

    def _where(self, scores: ir.Value, node: ir.Node, data: int, name: str) -> ir.Value:
        condition, fill = node.inputs[0], node.inputs[3 - data]
        value = self.masks.facts[fill].value
        if value is None or value.size != 1:
            raise MaskError("fills with something other than one constant")
        assert condition is not None
        if not self.masks.counts_keys(condition):
            raise MaskError(f"has the shape {list(self.masks.facts[condition].shape or ())}, which is no mask of keys")
        rule, number = self.masks.rules.rule(condition), float(value.reshape(-1)[0])
        if rule is not None and rule.pattern is None and rule.padding is None:
            return scores
        if number > BLOCKING:
            raise MaskError(f"fills hidden places with {number:g}, which does not hide them")
        self._masked |= self.masks.rules.shows_earlier_alone(condition, when=data == 1)
        if rule is None:
            inputs: list[ir.Value | None] = [self.masks.extend(condition), None, None]
            inputs[data], inputs[3 - data] = scores, fill
            return self.builder.op("Where", inputs, name)
        if rule.visible == (data == 2):
            raise MaskError("hides the keys that its condition shows")
        return self.builder.op("Add", [scores, self.masks.additive(rule, number, self.masks.facts[fill].dtype)], name)
