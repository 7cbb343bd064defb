"""The Attention operator as MatMul, Softmax, MatMul."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts, analyse
from onnxtools.analysis.masks import HIDDEN
from onnxtools.analysis.operators import Fact
from onnxtools.base.errors import JobError
from onnxtools.ir.edit import Builder, remove_unused, replace_keeping_name
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, is_op
from onnxtools.pipeline.passbase import Pass, PassResult


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Attention-23/24 without past inputs becomes primitive operators with an explicit additive mask.

    Rules (ONNX operator specification, Attention):
      - scores = (Q * scale) K^T + mask, scale = 1/sqrt(channels) by default; keys and values of grouped queries are
        repeated;
      - `is_causal` becomes a mask from positions, top-left aligned as the operator is without past inputs;
      - softcap, windows (opset 25), extra outputs, past inputs and `nonpad_kv_seqlen` are refused by name.
    """

    name = "decompose-attention"
    numerics = "rounding"
    example = "onnxtools decompose-attention model.onnx primitive.onnx"

    def apply(self, model: Model) -> PassResult:
        nodes = [node for node in model.graph if is_op(node, "Attention")]
        if not nodes:
            return PassResult(False, 0, ["no Attention operator found"])
        facts = analyse(model)
        builder = Builder(model)
        for node in nodes:
            builder.before = node
            _decompose(node, facts, builder)
        remove_unused(model)
        return PassResult(True, len(nodes), [f"{len(nodes)} Attention operators written as MatMul, Softmax, MatMul"])


def _decompose(node: ir.Node, facts: Facts, build: Builder) -> None:
    extra = [i for i, v in enumerate(node.inputs) if v is not None and i >= 4]
    used_outputs = [o for o in node.outputs[1:] if o.uses() or o.is_graph_output()]
    unknown = [name for name, value in node.attributes.items() if name not in _KNOWN and _is_set(value)]
    if extra or used_outputs or unknown:
        feature = f"input {extra[0]}" if extra else "a second output" if used_outputs else unknown[0]
        raise JobError(
            f"node {node.name!r} (Attention) uses {feature}, which add-kv-cache cannot rewrite; export full-sequence "
            "attention without a cache"
        )
    query, key, value = (_heads(node, i, facts, build) for i in range(3))
    shape, keys = facts[query].shape, facts[key].shape
    dtype = facts[query].dtype
    if shape is None or keys is None or dtype is None:
        raise JobError(f"node {node.name!r} (Attention): its shapes are unknown; run onnx shape inference first")
    name = node.name or "Attention"
    repeat = shape[1] // keys[1]
    if repeat > 1:
        key, value = (_repeat(v, repeat, facts, build, name) for v in (key, value))
    scale = attribute(node, "scale") or 1 / math.sqrt(shape[-1])
    query = build.op(
        "Mul", [query, build.constant(np.array(scale, dtype=dtype.numpy()), "attention_scale", dtype)], f"{name}/Scale"
    )
    scores = build.op(
        "MatMul", [query, build.op("Transpose", [key], f"{name}/Transpose", perm=[0, 1, 3, 2])], f"{name}/QK"
    )
    if attribute(node, "is_causal", 0):
        scores = build.op("Add", [scores, _causal(node, query, key, dtype, build)], f"{name}/Causal")
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        scores = _masked(scores, node.inputs[3], facts, dtype, build, name)
    probabilities = build.op("Softmax", [scores], f"{name}/Softmax", axis=-1)
    result = build.op("MatMul", [probabilities, value], f"{name}/PV")
    if len(facts[node.inputs[0]].shape or ()) == 3:
        result = build.op("Transpose", [result], f"{name}/Merge", perm=[0, 2, 1, 3])
        result = build.op("Reshape", [result, build.constant([0, 0, -1], "merge")], f"{name}/Reshape")
    result.dtype, result.shape = dtype, node.outputs[0].shape
    replace_keeping_name(build.graph, node.outputs[0], result)


_KNOWN = {"scale", "is_causal", "q_num_heads", "kv_num_heads", "softmax_precision", "qk_matmul_output_mode"}
"""Attributes that are read, or that say nothing about the first output."""


def _is_set(value: ir.Attr) -> bool:
    """Whether an attribute asks for something; 0 (softcap) and -1 (windows of opset 25) do not."""
    return value.value not in (0, 0.0, -1)


def _heads(node: ir.Node, index: int, facts: Facts, build: Builder) -> ir.Value:
    """Input `index` (0 query, 1 key, 2 value) as [batch, heads, sequence, channels]."""
    value = node.inputs[index]
    shape = facts[value].shape
    assert value is not None
    if shape is not None and len(shape) == 3:
        heads = attribute(node, "q_num_heads" if index == 0 else "kv_num_heads")
        value = build.op(
            "Reshape", [value, build.constant([0, 0, heads, shape[2] // heads], "heads")], f"{node.name}/Heads"
        )
        value = build.op("Transpose", [value], f"{node.name}/ToHeads", perm=[0, 2, 1, 3])
        facts[value] = Fact(facts[node.inputs[index]].dtype, (shape[0], heads, shape[1], shape[2] // heads))
    return value


def _repeat(value: ir.Value, repeat: int, facts: Facts, build: Builder, name: str) -> ir.Value:
    shape = facts[value].shape
    assert shape is not None
    value = build.op("Unsqueeze", [value, build.constant([2], "axes_2")], f"{name}/Unsqueeze")
    value = build.op("Expand", [value, build.constant([1, 1, repeat, 1, 1], "repeat")], f"{name}/Expand")
    return build.op(
        "Reshape", [value, build.constant([0, shape[1] * repeat, -1, shape[3]], "repeated")], f"{name}/Repeat"
    )


def _causal(node: ir.Node, query: ir.Value, key: ir.Value, dtype: ir.DataType, build: Builder) -> ir.Value:
    """The additive mask [query length, key length], in `dtype`, that hides keys later than the query."""
    name = f"{node.name}/mask"
    rows, columns = (_count(value, f"{name}/{part}", build) for value, part in ((query, "queries"), (key, "keys")))
    column = build.op("Unsqueeze", [rows, build.constant([1], "axes_1")], f"{name}/Column")
    hidden = build.op("Greater", [columns, column], f"{name}/Greater")
    fill, none = (build.constant(np.array(n, dtype=dtype.numpy()), "mask", dtype) for n in (HIDDEN, 0))
    return build.op("Where", [hidden, fill, none], f"{name}/Where")


def _count(value: ir.Value, name: str, build: Builder) -> ir.Value:
    """int64 [sequence]: 0, 1, ... along the sequence axis of `value` [batch, heads, sequence, channels]."""
    length = build.op("Shape", [value], f"{name}/Shape", start=2, end=3)
    length = build.op("Squeeze", [length, build.constant([0], "axes_0")], f"{name}/Length")
    zero, one = (build.constant(np.array(n, dtype=np.int64), f"int_{n}") for n in (0, 1))
    return build.op("Range", [zero, length, one], f"{name}/Range")


def _masked(scores: ir.Value, mask: ir.Value, facts: Facts, dtype: ir.DataType, build: Builder, name: str) -> ir.Value:
    """Applies `attn_mask`: a boolean mask says which keys take part, a numeric mask is added."""
    if facts[mask].dtype != ir.DataType.BOOL:
        return build.op("Add", [scores, mask], f"{name}/Mask")
    fill = build.constant(np.array(HIDDEN, dtype=dtype.numpy()), "mask", dtype)
    return build.op("Where", [mask, scores, fill], f"{name}/Mask")
