"""Layers in ONNX Runtime's own operators (domain com.microsoft), for graphs that only it runs (`--kv-cache gqa`).

The residual addition, the bias before it and the norm after it are one node, and so are a bias and its GELU: on a GPU a
decode step is a chain of small kernels, and each kernel less saves time. The nodes compute in fp32 inside, like the
standard form.
Operators: ContribOperators.md of ONNX Runtime (SkipLayerNormalization, SkipSimplifiedLayerNormalization, BiasGelu,
FastGelu).
"""

from __future__ import annotations

import onnx_ir as ir

from onnxtools.exporter.config import Activation, Norm, SelfAttention
from onnxtools.exporter.layers import Layers
from onnxtools.storage.lazy import hstack, vstack
from onnxtools.storage.quantized_weight import QuantizedWeight

MICROSOFT = "com.microsoft"


class OrtLayers(Layers):
    """`Layers` with fused nodes."""

    def add_norm(
        self, hidden: ir.Value, update: ir.Value, kind: Norm, weight: str, name: str, residual: str
    ) -> tuple[ir.Value, ir.Value]:
        bias = _take_bias(update)
        scale = self._gain(kind, weight)
        if kind.kind == "layer_norm":
            beta = self.weight(f"{weight}.bias") if kind.bias else None
            op, inputs = "SkipLayerNormalization", [update, hidden, scale, beta, bias]
        else:
            op, inputs = "SkipSimplifiedLayerNormalization", [update, hidden, scale, bias]
        while inputs[-1] is None:
            inputs.pop()
        normed, _, _, summed = self.build.ops(op, inputs, f"{name}/{op}", outputs=4, domain=MICROSOFT, epsilon=kind.eps)
        return summed, normed

    def activation(self, x: ir.Value, kind: Activation, name: str) -> ir.Value:
        if kind not in ("gelu", "gelu_tanh"):
            return super().activation(x, kind, name)
        bias = _take_bias(x)
        if kind == "gelu" and bias is None:
            return super().activation(x, kind, name)  # BiasGelu's bias is not optional
        op = "FastGelu" if kind == "gelu_tanh" else "BiasGelu"
        return self.build.ops(op, [x, *([bias] if bias is not None else [])], f"{name}/{op}", domain=MICROSOFT)[0]

    def qkv(
        self, hidden: ir.Value, attention: SelfAttention, weight: str, name: str
    ) -> tuple[ir.Value, ir.Value | None] | None:
        """One product for queries, keys and values, [tokens, q_size + 2 kv_size], and their bias.

        Returns None where each projection has scales of its own. The caller adds the bias to the three-dimensional
        value: as the bias of the Gemm it would first be broadcast to all tokens, in a kernel slower than the addition.
        """
        parts = [f"{weight}.{part}_proj" for part in ("q", "k", "v")]
        packed = (isinstance(self._weights[f"{part}.weight"], QuantizedWeight) for part in parts)
        if any(packed) or any(part in self._scales for part in parts):
            return None
        joined = f"{weight}.qkv_proj"
        for kind in ("weight", *(["bias"] if attention.bias else [])):
            tensors = [self._weights[f"{part}.{kind}"] for part in parts]
            beside = kind == "weight" and self.config.linear_in_out
            self.stored(f"{joined}.{kind}", (hstack if beside else vstack)(tensors, f"{joined}.{kind}"))
        bias = self.weight(f"{joined}.bias") if attention.bias else None
        return self.linear(hidden, joined, f"{name}/qkv_proj", bias=False), bias


def _take_bias(value: ir.Value) -> ir.Value | None:
    """Remove the bias from the Gemm that makes `value` and return it; None where there is no Gemm or no bias."""
    node = value.producer()
    if node is None or node.op_type != "Gemm" or len(node.inputs) < 3:
        return None
    bias = node.inputs[2]
    node.resize_inputs(2)
    return bias
