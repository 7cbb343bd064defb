"""Masks of a cached graph: the exporter's [sequence, sequence] masks, rewritten as [sequence, total]."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.attention import Attention
from onnxtools.analysis.facts import Facts, analyse, is_past_length, stand_ins, token_input
from onnxtools.analysis.masks import BLOCKING, MaskError, Pattern, hidden_by_addition, pattern_of, square
from onnxtools.base.errors import JobError
from onnxtools.ir.edit import Builder
from onnxtools.ir.model import Model

_LAYOUT = {"Reshape", "Unsqueeze", "Squeeze", "Expand", "Identity", "Dropout"}
_POINTWISE = {
    "Add", "Sub", "Mul", "Div", "And", "Or", "Not", "Where", "Cast", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Neg", "Max", "Min", "Identity", "BitwiseNot", "Xor",
}  # fmt: skip


class MaskRewriter:
    """Replays the nodes between the query-key product and the Softmax, with masks grown to the total length.

    Args:
        size: the stand-in sequence length that `facts` were computed with.
        past: cache length before this step, an int64 scalar of the graph.
        total: cache length after this step, an int64 scalar of the graph.
    """

    def __init__(
        self, model: Model, facts: Facts, builder: Builder, size: int, past: ir.Value, total: ir.Value
    ) -> None:
        self.model, self.facts, self.builder, self.size = model, facts, builder, size
        self.past, self.total = past, total
        self.anchor = builder.before
        self.patterns: set[Pattern] = set()
        self.inputs: set[str] = set()
        self.kept: set[ir.Node] = set()  # nodes of the exporter that now work on the total length
        self._replacements: dict[Any, ir.Value] = {}

    def notes(self) -> list[str]:
        """Notes for people: the rewritten masks and the grown mask inputs."""
        lines = []
        for pattern in self.patterns:
            keys = "causal" if pattern.causal else "all keys"
            window = f", sliding window of {pattern.window}" if pattern.window else ""
            lines.append(f"mask from positions ({keys}{window}) written for the total length")
        lines += [f"mask input {name!r} now spans total_sequence = past + new tokens" for name in sorted(self.inputs)]
        return lines

    def replay(self, scores: ir.Value, block: Attention, prefix: str) -> ir.Value:
        """Apply the block's scaling and masking to `scores` [batch, heads, sequence, total].

        Raises:
            JobError: the block has no causal mask, or a mask that cannot be extended.
        """
        masked = False
        for node, data in block.scores:
            try:
                scores, hides = self._step(scores, node, data, prefix)
            except MaskError as error:
                where = f"attention at {block.softmax.name!r}: the mask of node {node.name!r} ({node.op_type})"
                raise JobError(f"{where} {error}; it cannot be extended to a cache") from None
            masked |= hides
        if not masked:
            raise JobError(
                f"attention at {block.softmax.name!r} has no causal mask: earlier tokens see later ones, so a cache "
                "would change the result"
            )
        return scores

    def _step(self, scores: ir.Value, node: ir.Node, data: int, prefix: str) -> tuple[ir.Value, bool]:
        """Replay one node; returns the new scores and whether the node hides keys."""
        name = f"{prefix}/{node.op_type}"
        if node.op_type in _LAYOUT:
            return scores, False
        if node.op_type == "Transpose":
            raise MaskError("transposes the scores")
        if node.op_type == "Where":
            return self._where(scores, node, data, name)
        inputs: list[ir.Value | None] = list(node.inputs)
        inputs[data] = scores
        hides = False
        for index, side in enumerate(node.inputs):
            if index == data or side is None:
                continue
            grown, grows = self._side(side, node)
            if grown is None:
                return scores, False
            inputs[index], hides = grown, hides or grows
        return self.builder.op(node.op_type, inputs, name, **{k: a.value for k, a in node.attributes.items()}), hides

    def _side(self, side: ir.Value, node: ir.Node) -> tuple[ir.Value | None, bool]:
        """The other operand of a pointwise node, grown, and whether it is a causal mask.

        The operand is None when the node has no effect.
        """
        fact = self.facts[side]
        if fact.value is None:
            return (
                (side, False)
                if fact.shape is not None and np.prod(fact.shape) == 1
                else (self.extend(side), self.is_causal(side))
            )
        if fact.value.size == 1:
            return side, False
        if node.op_type in ("Add", "Sub") and not fact.value.any():
            return None, False
        matrix = square(fact.value, self.size)
        if matrix is None:
            if fact.value.shape[-1] == 1 and (fact.value.ndim < 2 or fact.value.shape[-2] == 1):
                return side, False
            raise MaskError(f"has the shape {list(fact.value.shape)}, which is no [sequence, sequence] mask")
        if node.op_type != "Add":
            raise MaskError("is not added")
        hidden, fill = hidden_by_addition(matrix)
        pattern = pattern_of(hidden)
        return (None, False) if pattern is None else (self._additive(pattern, fill, fact.dtype), pattern.causal)

    def _where(self, scores: ir.Value, node: ir.Node, data: int, name: str) -> tuple[ir.Value, bool]:
        condition, fill = node.inputs[0], node.inputs[3 - data]
        value = self.facts[fill].value
        if value is None or value.size != 1:
            raise MaskError("fills with something other than one constant")
        array = self.facts[condition].value
        if array is None:
            assert condition is not None
            inputs: list[ir.Value | None] = [self.extend(condition), None, None]
            inputs[data], inputs[3 - data] = scores, fill
            return self.builder.op("Where", inputs, name), self.is_causal(condition)
        matrix = square(array if data == 2 else ~array, self.size)
        if matrix is None:
            raise MaskError(f"has the shape {list(array.shape)}, which is no [sequence, sequence] mask")
        pattern = pattern_of(matrix)
        if pattern is None:
            return scores, False
        number = float(value.reshape(-1)[0])
        if number > BLOCKING:
            raise MaskError(f"fills hidden places with {number:g}, which does not hide them")
        return self.builder.op(
            "Add", [scores, self._additive(pattern, number, self.facts[fill].dtype)], name
        ), pattern.causal

    # --- masks from positions ----------------------------------------------------------------------------------------

    def _hidden(self, pattern: Pattern) -> ir.Value:
        """Booleans [sequence, total], True where a key is hidden; added once, at the start of the graph."""
        if pattern in self._replacements:
            return self._replacements[pattern]
        self.patterns.add(pattern)
        build, insertion_point = self.builder, self.builder.before
        build.before = self.anchor
        query, key = self._places()
        parts = [build.op("Greater", [key, query], "/model/mask/future")] if pattern.causal else []
        if pattern.window is not None:
            distance = build.op("Sub", [query, key], "/model/mask/distance")
            width = build.constant(np.array(pattern.window, dtype=np.int64), "window")
            parts.append(build.op("GreaterOrEqual", [distance, width], "/model/mask/outside"))
        hidden = parts[0] if len(parts) == 1 else build.op("Or", parts, "/model/mask/hidden")
        build.before = insertion_point
        self._replacements[pattern] = hidden
        return hidden

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

    def _additive(self, pattern: Pattern, fill: float, dtype: ir.DataType | None) -> ir.Value:
        """0 or `fill`, [sequence, total] in the type of the scores: TensorRT fuses an added mask, not a boolean one."""
        assert dtype is not None
        key = (pattern, fill, dtype)
        if key not in self._replacements:
            hidden = self._hidden(pattern)
            build, insertion_point = self.builder, self.builder.before
            build.before = self.anchor
            low = build.constant(np.array(fill, dtype=dtype.numpy()), "mask_fill", dtype)
            zero = build.constant(np.array(0, dtype=dtype.numpy()), "mask_zero", dtype)
            self._replacements[key] = build.op("Where", [hidden, low, zero], "/model/mask/additive")
            build.before = insertion_point
        return self._replacements[key]

    def is_causal(self, value: ir.Value | None) -> bool:
        """Whether a mask, or a value that it is computed from, hides later tokens.

        It hides them by its elements, or as an input with an entry for each pair of tokens. A mask of
        [batch, sequence] hides padding alone: an encoder has one, and its tokens see later tokens.
        """
        waiting, seen = [value], {value}
        while waiting:
            current = waiting.pop()
            if current is None:
                continue
            fact, node = self.facts[current], current.producer()
            if fact.value is not None:
                if _hides_later(fact.value, self.size):
                    return True
                continue
            if node is None:
                if fact.shape is not None and fact.shape[-2:] == (self.size, self.size):
                    return True
                continue
            new = [v for v in node.inputs if v not in seen]
            seen.update(new)
            waiting += new
        return False

    # --- masks from inputs -------------------------------------------------------------------------------------------

    def extend(self, value: ir.Value) -> ir.Value:
        """`value`, a mask or a part of one, with its last axis grown from sequence to total.

        Raises:
            MaskError: it is computed in a way that cannot be extended.
        """
        if value not in self._replacements:
            self._replacements[value] = self._extend(value)
        return self._replacements[value]

    def _extend(self, value: ir.Value) -> ir.Value:
        fact = self.facts[value]
        if fact.value is not None:
            return self._extend_known(value, fact.value)
        if fact.shape is None:
            raise MaskError(f"depends on {value.name!r}, whose shape is unknown")
        if not fact.shape or (fact.shape[-1] != self.size and self.size not in fact.shape):
            return value
        node = value.producer()
        if node is None:
            return self._extend_input(value)
        source = node.inputs[0]
        if node.op_type in ("Expand", "Slice", "Tile", "Identity") and source is not None:
            return self.extend(source)
        if node.op_type in ("Reshape", "Unsqueeze") and source is not None:
            return self._extend_unsqueeze(source, fact.shape, node)
        if node.op_type == "GatherND":
            return self._extend_gather(node)
        if node.op_type not in _POINTWISE:
            raise MaskError(f"comes from node {node.name!r} ({node.op_type})")
        inputs = [None if v is None else self.extend(v) for v in node.inputs]
        if inputs == list(node.inputs):
            self.kept.add(node)
            return value
        return self.builder.op(
            node.op_type, inputs, f"/model/mask/{node.op_type}", **{k: a.value for k, a in node.attributes.items()}
        )

    def _extend_known(self, value: ir.Value, array: Any) -> ir.Value:
        matrix = square(array, self.size)
        if matrix is None:
            if array.ndim and array.shape[-1] == self.size:
                if np.all(array == array.reshape(-1)[0]):
                    return self.builder.constant(array.reshape(-1)[0], "mask_constant", self.facts[value].dtype)
                raise MaskError(f"depends on {value.name!r}, which counts positions in its own way")
            return value
        if np.all(matrix == matrix[0, 0]):
            return self.builder.constant(np.array(matrix[0, 0]), "mask_constant", self.facts[value].dtype)
        if matrix.dtype != bool:
            hidden, fill = hidden_by_addition(matrix)
            pattern = pattern_of(hidden)
            assert pattern is not None
            return self._additive(pattern, fill, self.facts[value].dtype)
        try:
            pattern = pattern_of(matrix)
            assert pattern is not None
            return self._hidden(pattern)
        except MaskError:
            pattern = pattern_of(~matrix)
            assert pattern is not None
            return self.builder.op("Not", [self._hidden(pattern)], "/model/mask/visible")

    def _extend_input(self, value: ir.Value) -> ir.Value:
        shape = list(value.shape or ())
        if self.facts[value].shape is None or self.facts[value].shape[-1] != self.size:  # type: ignore[index]
            return value
        shape[-1] = ir.SymbolicDim("total_sequence")
        value.shape = ir.Shape(shape)
        self.inputs.add(value.name or "")
        return value

    def _extend_gather(self, node: ir.Node) -> ir.Value:
        """The padding mask [batch, 1, 1, total], which transformers writes as `mask[b, j]` for batch b and key j."""
        data, index = node.inputs[0], self.facts[node.inputs[1]].value
        shape = self.facts[data].shape
        if data is None or shape is None or len(shape) != 2 or index is None or index.shape[-1] != 2 or index.ndim != 5:
            raise MaskError(f"comes from node {node.name!r} (GatherND)")
        rows, keys = (np.broadcast_to(index[..., i], index.shape[:-1]) for i in range(2))
        if keys.shape[0] != shape[0] or keys.shape[-1] != shape[1]:
            raise MaskError(f"compares tokens by node {node.name!r} (GatherND)")
        by_row = np.array_equal(rows, np.broadcast_to(np.arange(shape[0])[:, None, None, None], rows.shape))
        if not by_row or not np.array_equal(keys, np.broadcast_to(np.arange(shape[1]), keys.shape)):
            raise MaskError(f"picks elements by node {node.name!r} (GatherND)")
        return self.builder.op(
            "Unsqueeze", [self.extend(data), self.builder.constant([1, 2], "axes")], "/model/mask/Unsqueeze"
        )

    def _extend_unsqueeze(self, source: ir.Value, shape: tuple[int, ...], node: ir.Node) -> ir.Value:
        """A Reshape or Unsqueeze that only adds axes of one."""
        before = self.facts[source].shape
        if before is None or [d for d in before if d != 1] != [d for d in shape if d != 1]:
            raise MaskError(f"is rearranged by node {node.name!r} ({node.op_type})")
        grown = self.extend(source)
        axes, remaining = [], list(before)
        for index, size in enumerate(shape):
            if remaining and remaining[0] == size:
                remaining.pop(0)
            else:
                axes.append(index)
        return (
            self.builder.op("Unsqueeze", [grown, self.builder.constant(axes, "axes")], "/model/mask/Unsqueeze")
            if axes
            else grown
        )


def _hides_later(array: Any, size: int) -> bool:
    """Whether the elements are a causal mask: additive, or boolean (True for hidden keys, or for visible ones)."""
    try:
        matrix = square(array, size)
        if matrix is None:
            return False
        candidates = [matrix, ~matrix] if matrix.dtype == bool else [hidden_by_addition(matrix)[0]]
    except MaskError:
        return False
    for hidden in candidates:
        try:
            pattern = pattern_of(hidden)
        except MaskError:
            continue
        if pattern is not None and pattern.causal:
            return True
    return False


_SHAPE_ARGUMENTS = {
    "Reshape",
    "Expand",
    "Slice",
    "Tile",
    "ConstantOfShape",
    "Unsqueeze",
    "Squeeze",
    "Split",
    "Pad",
    "Resize",
}


def check_positions_follow_past(model: Model) -> None:
    """Refuse a cached graph in which a token's position depends on how the sequence was cut into steps.

    The graph is analysed once as a step (past P, S new tokens) and once as a full run (past 0, P + S tokens). A value
    that follows from shapes alone and is combined with data must hold, in the step, the last S entries of the full run.

    Raises:
        JobError: names the node and the value.
    """
    sizes = stand_ins(model)
    tokens = token_input(model)
    past = next((size for name, size in sizes.items() if is_past_length(name)), None)
    step = analyse(model, sizes)
    if tokens is None or past is None or (shape := step[tokens.value].shape) is None:
        return
    size = shape[tokens.axis]
    whole = analyse(
        model,
        {name: 0 if is_past_length(name) else past + size if value == size else value for name, value in sizes.items()},
    )
    for node in model.graph:
        if any(step[o].value is not None for o in node.outputs):
            continue
        for value in node.inputs[:1] if node.op_type in _SHAPE_ARGUMENTS and node.domain == "" else node.inputs:
            a, b = step[value].value, whole[value].value
            if value is not None and a is not None and b is not None and size in a.shape and not _is_tail(a, b, past):
                raise JobError(
                    f"node {node.name!r} ({node.op_type}) uses {value.name!r}, whose positions do not follow the cache;"
                    " export the model with a position_ids input"
                )


def _is_tail(step: Any, whole: Any, past: int) -> bool:
    """Whether `step` is `whole` without its first `past` entries along every axis that is `past` entries shorter."""
    if step.ndim != whole.ndim:
        return False
    index = tuple(
        slice(past, None) if b == a + past else slice(None) for a, b in zip(step.shape, whole.shape, strict=True)
    )
    return np.array_equal(whole[index], step)
