"""Mixtures of experts as com.microsoft.MoE: one node whose weights are stacks, joined expert by expert when written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.experts import Mixture
from onnxtools.ir.edit import Builder, rename_or_bypass
from onnxtools.ir.query import attribute, constant_tensor, is_op, small_constant
from onnxtools.storage.lazy import Tensor, alternating, folded, shape_of, vstack


@dataclass(frozen=True)
class _Router:
    """The logits that MoE chooses by, [tokens, experts], and whether the weights of a token sum to 1."""

    logits: ir.Value
    normalized: bool


@dataclass(frozen=True)
class _Expert:
    """Gate, up and down of an expert, each Gemm with the weight [out, in], and its SwiGLU."""

    gate: ir.Node
    up: ir.Node
    down: ir.Node
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None


def lower_mixture(build: Builder, mixture: Mixture) -> str:
    """Replace `mixture` by one com.microsoft.MoE. Returns why it cannot be, or ''.

    ONNX Runtime's operator takes the softmax of the logits, the `top_k` largest, and SwiGLU of alternating rows of gate
    and up (ContribOperators.md; the other layouts have no CPU kernel).
    """
    router = _router(mixture)
    if router is None:
        return "its router is no softmax with the largest scores"
    experts = [_expert(rows, result) for rows, result in zip(mixture.rows, mixture.results, strict=True)]
    found = [expert for expert in experts if expert is not None]
    if len(found) != len(experts) or len({(e.alpha, e.beta, e.limit) for e in found}) != 1:
        return "its experts are no SwiGLU of stored weights [out, in]"
    end = mixture.output.producer()
    assert end is not None
    build.before = end
    name, first = f"{end.name}/MoE", found[0]
    inputs: list[ir.Value | None] = [
        mixture.hidden,
        build.op("CastLike", [router.logits, mixture.hidden], f"{name}/router"),
    ]
    inputs += _stacks(build, [e.gate for e in found], [e.up for e in found], f"{name}/fc1")
    inputs += _stacks(build, [e.down for e in found], None, f"{name}/fc2")
    while inputs[-1] is None:
        inputs.pop()
    attributes: dict[str, Any] = {
        "k": _top_k(mixture), "activation_type": "swiglu", "swiglu_fusion": 1,
        "normalize_routing_weights": int(router.normalized), "activation_alpha": first.alpha,
        "activation_beta": first.beta, **({} if first.limit is None else {"swiglu_limit": first.limit}),
    }  # fmt: skip
    result = build.op("MoE", inputs, name, domain="com.microsoft", **attributes)
    row = build.op("Unsqueeze", [result, build.constant([1], "axis_1")], f"{name}/row")
    rename_or_bypass(build.graph, mixture.output, row)
    return ""


def _stacks(
    build: Builder, first: Sequence[ir.Node], second: Sequence[ir.Node] | None, name: str
) -> list[ir.Value | None]:
    """The weights [experts, out, in] and biases [experts, out] of linear layers; of two, rows take turns."""

    def rows(index: int, kind: str) -> ir.Value | None:
        if len(first[0].inputs) <= index:
            return None
        parts = []
        for n, node in enumerate(first):
            own = constant_tensor(node.inputs[index])
            other = constant_tensor(second[n].inputs[index]) if second is not None else None
            assert own is not None
            parts.append(own if other is None else alternating(own, other, f"{name}.{n}.{kind}"))
        return build.initializer(folded(vstack(parts, f"{name}.{kind}"), len(first)), f"{name}.{kind}")

    return [rows(1, "weight"), rows(2, "bias")]


def _top_k(mixture: Mixture) -> int:
    node = mixture.chosen.producer()
    count = small_constant(node.inputs[1]) if node is not None else None
    assert count is not None
    return int(count.ravel()[0])


def _router(mixture: Mixture) -> _Router | None:
    choice = mixture.chosen.producer()
    weights = _before(mixture.weights, "Unsqueeze", "Cast")
    maker = weights.producer() if weights is not None else None
    if choice is None or not is_op(choice, "TopK") or small_constant(choice.inputs[1]) is None or maker is None:
        return None
    scores = choice.inputs[0].producer() if choice.inputs[0] is not None else None
    logits = scores.inputs[0] if scores is not None and is_op(scores, "Softmax") else None
    if maker is choice and logits is not None:
        return _Router(logits, False)
    if is_op(maker, "Softmax") and maker.inputs[0] is choice.outputs[0] and choice.inputs[0] is not None:
        return _Router(logits or choice.inputs[0], True) if logits is None else None
    total = maker.inputs[1].producer() if is_op(maker, "Div") and maker.inputs[1] is not None else None
    sums = total is not None and is_op(total, "ReduceSum") and total.inputs[0] is choice.outputs[0]
    return _Router(logits, True) if sums and maker.inputs[0] is choice.outputs[0] and logits is not None else None


def _before(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """The value before nodes of these types."""
    while value is not None and (node := value.producer()) is not None and is_op(node, *op_types):
        value = node.inputs[0]
    return value


def _expert(rows: ir.Value, result: ir.Value) -> _Expert | None:
    down = result.producer()
    inner = down.inputs[0].producer() if down is not None and down.inputs[0] is not None else None
    linear = [use.node for use in rows.uses()]
    if (
        down is None
        or inner is None
        or not is_op(inner, "Mul")
        or len(linear) != 2
        or not all(map(_is_plain, [*linear, down]))
    ):
        return None
    for gate, up in (linear, linear[::-1]):
        settings = _swiglu(gate.outputs[0], up.outputs[0], inner)
        if settings is not None:
            return _Expert(gate, up, down, *settings)
    return None


def _is_plain(node: ir.Node) -> bool:
    """Whether a node is Gemm with a stored weight [out, in] and nothing else."""
    weight = constant_tensor(node.inputs[1]) if is_op(node, "Gemm") else None
    plain = all(attribute(node, name, value) == value for name, value in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)))
    floating = weight is not None and weight.dtype.is_floating_point() and weight.dtype.itemsize > 1
    return plain and floating and len(shape_of(_tensor(weight))) == 2 and attribute(node, "transB", 0) == 1


def _tensor(weight: ir.TensorProtocol | None) -> Tensor:
    assert weight is not None
    return weight


def _swiglu(gate: ir.Value, up: ir.Value, inner: ir.Node) -> tuple[float, float, float | None] | None:
    """(alpha, beta, limit) where `inner` is gate x sigmoid(alpha gate) x (up + beta), both limited."""
    left, right = (value.producer() if value is not None else None for value in inner.inputs)
    if left is None:
        return None
    if inner.inputs[1] is up:  # silu(gate) x up
        plain = is_op(left, "Swish") and left.inputs[0] is gate and attribute(left, "alpha", 1.0) == 1.0
        parts = {left.inputs[0], left.inputs[1]} if is_op(left, "Mul") else set()
        sigmoid = next(
            (n for n in (v.producer() for v in parts if v is not None) if n is not None and is_op(n, "Sigmoid")), None
        )
        return (
            (1.0, 0.0, None) if plain or (gate in parts and sigmoid is not None and sigmoid.inputs[0] is gate) else None
        )
    return _clamped(gate, up, left, right) if right is not None and is_op(left, "Mul") and is_op(right, "Add") else None


def _clamped(gate: ir.Value, up: ir.Value, glu: ir.Node, shifted: ir.Node) -> tuple[float, float, float | None] | None:
    """The form of gpt-oss: Min(gate, limit) x Sigmoid(. x alpha), and Clip(up) + 1."""
    low, sigmoid = (value.producer() if value is not None else None for value in glu.inputs)
    clip = shifted.inputs[0].producer() if shifted.inputs[0] is not None else None
    scaled = sigmoid.inputs[0].producer() if sigmoid is not None and sigmoid.inputs[0] is not None else None
    if (
        low is None
        or clip is None
        or scaled is None
        or not (is_op(low, "Min") and is_op(clip, "Clip") and is_op(scaled, "Mul"))
    ):
        return None
    if low.inputs[0] is not gate or clip.inputs[0] is not up or scaled.inputs[0] is not low.outputs[0]:
        return None
    numbers = [small_constant(value) for value in (scaled.inputs[1], shifted.inputs[1], low.inputs[1], clip.inputs[2])]
    if any(number is None for number in numbers):
        return None
    alpha, beta, limit, high = (float(np.asarray(number).ravel()[0]) for number in numbers)
    return (alpha, beta, limit) if limit == high else None
