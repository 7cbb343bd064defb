"""A cached step sees only its own tokens outside attention: nodes that need the other tokens are refused or mended."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts, analyse, is_past_length, stand_ins, token_input
from onnxtools.base.errors import JobError
from onnxtools.ir.edit import Builder
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, is_op


def check_locality(model: Model, originals: set[ir.Node]) -> None:
    """Refuse nodes of the exporter through which tokens meet outside attention.

    A reduction of the whole tensor to one number is the scale of current scaling; `add-kv-cache` warns of it.

    Raises:
        JobError: names the first such node.
    """
    facts = analyse(model)
    tokens = token_input(model)
    shape = facts[tokens.value].shape if tokens is not None else None
    if tokens is None or shape is None:
        return
    size = shape[tokens.axis]
    for node in model.graph:
        if node in originals and all(facts[o].value is None for o in node.outputs) and _mixes(node, facts, size):
            raise JobError(
                f"node {node.name!r} ({node.op_type}) mixes tokens outside attention: a step would not see the earlier "
                "ones, so no cache can be added"
            )


def _mixes(node: ir.Node, facts: Facts, size: int) -> bool:
    shape = facts[node.inputs[0]].shape if node.inputs else None
    if shape is None or size not in shape:
        return node.op_type == "MatMul" and len(node.inputs) > 1 and _size_at(facts[node.inputs[1]].shape, -2) == size
    op = node.op_type
    if op.startswith("Reduce"):
        values = facts[node.inputs[1]].value if len(node.inputs) > 1 else None
        axes = [int(a) for a in values] if values is not None else list(attribute(node, "axes", None) or [])
        return bool(axes) and any(shape[a] == size for a in axes)
    if op == "CumSum":
        axis = facts[node.inputs[1]].value
        return axis is None or shape[int(axis)] == size
    if op in ("Softmax", "LogSoftmax", "Hardmax"):
        return bool(shape[attribute(node, "axis", -1)] == size)
    if op in ("LayerNormalization", "RMSNormalization"):
        axis = attribute(node, "axis", -1) % len(shape)
        return size in shape[axis:]
    if op == "MatMul":
        return shape[-1] == size
    if op in ("Gather", "Slice"):
        picks = size not in (facts[node.outputs[0]].shape or (size,))
        return _turns(node, facts, size) or (picks and _joins(node, facts, size))
    if op in ("TopK", "ArgMax", "ArgMin", "LpNormalization"):
        return bool(shape[attribute(node, "axis", -1 if op in ("TopK", "LpNormalization") else 0)] == size)
    if op in _OVER_IMAGES:
        return size in shape[2:]
    if op in ("Pad", "ReverseSequence") or op in _ALONG_TIME:
        return op != "Pad" or shape != facts[node.outputs[0]].shape
    return op == "Concat" and shape[attribute(node, "axis")] == size


def _turns(node: ir.Node, facts: Facts, size: int) -> bool:
    """Whether a Slice reads the tokens backwards."""
    steps = facts[node.inputs[4]].value if node.op_type == "Slice" and len(node.inputs) > 4 else None
    if steps is None or not (steps < 0).any():
        return False
    axes, shape = facts[node.inputs[3]].value, facts[node.inputs[0]].shape or ()
    return axes is None or any(shape[int(a)] == size for a, step in zip(axes, steps, strict=True) if step < 0)


def _joins(node: ir.Node, facts: Facts, size: int) -> bool:
    """Whether tokens that a node picks meet all tokens again. The last token's logits do not."""
    waiting, seen = list(node.outputs), set(node.outputs)
    while waiting:
        for user, index in waiting.pop().uses():
            others = [v for i, v in enumerate(user.inputs) if i != index and v not in seen]
            if any(facts[v].value is None and size in (facts[v].shape or ()) for v in others):
                return True
            new = [value for value in user.outputs if value not in seen]
            seen.update(new)
            waiting += new
    return False


_OVER_IMAGES = {
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool",
    "InstanceNormalization", "GroupNormalization", "MeanVarianceNormalization",
}  # fmt: skip
"""Operators that mix the axes behind the second one."""
_ALONG_TIME = {"LSTM", "GRU", "RNN"}


def _size_at(shape: tuple[int, ...] | None, axis: int) -> int | None:
    return shape[axis] if shape is not None and len(shape) >= -axis else None


def restrict_to_new_tokens(
    inputs: list[ir.Value],
    originals: set[ir.Node],
    past_1d: ir.Value,
    total: ir.Value,
    builder: Builder,
) -> int:
    """Slice mask inputs to the new tokens for readers that work on tokens, not on keys.

    A count along the mask (`cumsum`, Hugging Face's position ids) runs over the whole mask and is sliced afterwards.

    Args:
        inputs: mask inputs of the graph, [batch, total].
        originals: nodes of the exporter.
        past_1d: length of the cache before the step, int64 [1].
        total: length of the cache after the step, an int64 scalar.

    Returns:
        How many slices were added.
    """
    return sum(_restrict(value, originals, past_1d, total, builder) for value in inputs)


def _restrict(value: ir.Value, originals: set[ir.Node], past_1d: ir.Value, total: ir.Value, builder: Builder) -> int:
    cuts = 0
    for user, index in list(value.uses()):
        if user not in originals or user.op_type == "Shape":
            continue
        if is_op(user, "CumSum") and attribute(user, "reverse", 0):
            raise JobError(f"node {user.name!r} (CumSum) counts {value.name!r} from its end, which moves in each step")
        if is_op(user, "ArgMax", "ArgMin") and not attribute(user, "select_last_index", 0):
            continue  # the first real token, a place in the whole mask
        if is_op(user, "Cast", "Identity", "Not", "Neg"):
            cuts += _restrict(user.outputs[0], originals, past_1d, total, builder)
            continue
        whole = user.outputs[0] if is_op(user, "CumSum") else value
        builder.before = user
        if whole is value:
            user.replace_input_with(index, _cut(whole, past_1d, total, builder, user))
        else:
            uses = list(whole.uses())
            builder.before = uses[0][0] if uses else None
            cut = _cut(whole, past_1d, total, builder, user)
            for reader, input_index in uses:
                reader.replace_input_with(input_index, cut)
        cuts += 1
    return cuts


def _cut(value: ir.Value, past_1d: ir.Value, total: ir.Value, builder: Builder, user: ir.Node) -> ir.Value:
    end = builder.op("Unsqueeze", [total, builder.constant([0], "axes_0")], f"{user.name}/total")
    return builder.op("Slice", [value, past_1d, end, builder.constant([-1], "last_axis")], f"{user.name}/new_tokens")


_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", "MatMul", "Gemm", "Mod"}


def check_same_for_longer(model: Model) -> None:
    """Refuse a graph in which a number that meets data changes with the length of the text.

    Such a number (a scale by the logarithm of the length, angles of dynamic NTK) is another one in a longer text, so
    what was computed for earlier tokens no longer holds. Masks are looked at where they are rewritten.

    Raises:
        JobError: names the node and the value.
    """
    sizes, tokens = stand_ins(model), token_input(model)
    facts = analyse(model, sizes)
    shape = facts[tokens.value].shape if tokens is not None else None
    if tokens is None or shape is None or shape[tokens.axis] not in sizes.values():
        return
    size = shape[tokens.axis]
    longer = analyse(model, {name: 61 if length == size else length for name, length in sizes.items()})
    for node in model.graph:
        if not is_op(node, *_ARITHMETIC) or any(facts[o].value is not None for o in node.outputs):
            continue
        scores = any(len(shape := facts[o].shape or ()) > 2 and shape[-1] == size for o in node.outputs)
        for value in node.inputs:
            a, b = facts[value].value, longer[value].value
            if value is None or a is None or b is None or a.ndim != b.ndim or (scores and a.shape[-1:] == (size,)):
                continue  # masks of scores are looked at elsewhere
            if not np.array_equal(b[tuple(slice(0, n) for n in a.shape)], a, equal_nan=a.dtype.kind == "f"):
                raise JobError(
                    f"node {node.name!r} ({node.op_type}) uses {value.name!r}, which changes with the length of the "
                    "text: what a cache holds of earlier tokens would no longer be right"
                )


_SHAPE_ARGUMENTS = {
    "Reshape", "Expand", "Slice", "Tile", "ConstantOfShape", "Unsqueeze", "Squeeze", "Split", "Pad", "Resize",
}  # fmt: skip


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
