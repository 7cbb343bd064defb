"""The layers of a decoder as ONNX nodes: embedding, norm, linear, MLP, head.

Activations are [batch * sequence, hidden]. Linear layers are Gemm with the weight as the checkpoint stores it ([out,
in] and transB=1): a weight is copied, never transposed, a tied head reads the embedding table, and the bias is part of
the node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.exporter.config import Activation, DecoderConfig, Mlp, Norm
from onnxtools.exporter.export_options import ExportOptions
from onnxtools.exporter.family import Weights
from onnxtools.ir.edit import Builder
from onnxtools.numerics import formats
from onnxtools.storage.lazy import Tensor, cast

FLOAT, INT64, FP8 = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.FLOAT8E4M3FN


class Layers:
    """Builders of layers that share a graph, its weights and the compute type.

    In every method `weight` is the canonical name of a module, and `name` the prefix of the new nodes' names.
    """

    def __init__(
        self, build: Builder, config: DecoderConfig, options: ExportOptions, weights: Weights, dtype: ir.DataType
    ) -> None:
        self.build, self.config, self.options, self.dtype = build, config, options, dtype
        self._weights, self._scales = weights.tensors, weights.scales
        self._values: dict[str, ir.Value] = {}

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        """Add a node `name`/`op_type` with one output and return the output."""
        return self.build.op(op_type, inputs, f"{name}/{op_type}", **attributes)

    def weight(self, name: str) -> ir.Value:
        """The weight `name` in the compute type; all its readers share one initializer."""
        return self.stored(name, self._weights[name]) if name not in self._values else self._values[name]

    def stored(self, name: str, tensor: Tensor) -> ir.Value:
        """Add `tensor`, cast to the compute type, as the weight `name`."""
        self._values[name] = self.build.initializer(cast(tensor, self.dtype), name)
        return self._values[name]

    def scalar(self, value: float, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """A constant of rank 0, in the compute type by default."""
        dtype = dtype or self.dtype
        return self.build.constant(np.array(value, dtype.numpy()), name, dtype)

    def embedding(self, ids: ir.Value, positions: ir.Value | None) -> ir.Value:
        """int64 ids [batch, sequence] to [batch * sequence, hidden]; learned positions are added, if there are any."""
        hidden = self.op("Gather", [self.weight("model.embed_tokens.weight"), ids], "/model/embed_tokens")
        if positions is not None:
            learned = self.op(
                "Gather", [self.weight("model.embed_positions.weight"), positions], "/model/embed_positions"
            )
            hidden = self.op("Add", [hidden, learned], "/model/embed")
        return self.op(
            "Reshape", [hidden, self.build.constant([-1, self.config.hidden_size], "tokens_shape")], "/model/embed"
        )

    def norm(self, hidden: ir.Value, kind: Norm, weight: str, name: str) -> ir.Value:
        """LayerNorm or RMSNorm over the last axis, computed in fp32 (stash_type 1)."""
        scale = self.weight(f"{weight}.weight")
        if kind.kind == "layer_norm":
            bias = [self.weight(f"{weight}.bias")] if kind.bias else []
            return self.op("LayerNormalization", [hidden, scale, *bias], name, axis=-1, epsilon=kind.eps, stash_type=1)
        if self.options.opset >= 23:
            return self.op("RMSNormalization", [hidden, scale], name, axis=-1, epsilon=kind.eps, stash_type=1)
        wide = self.cast(hidden, FLOAT, f"{name}/wide")
        mean = self.op(
            "ReduceMean", [self.op("Mul", [wide, wide], name), self.build.constant([-1], "last_axis")], name, keepdims=1
        )
        root = self.op("Sqrt", [self.op("Add", [mean, self.scalar(kind.eps, "norm_eps", FLOAT)], name)], name)
        return self.op(
            "Mul", [self.cast(self.op("Div", [wide, root], name), self.dtype, f"{name}/narrow"), scale], f"{name}/scale"
        )

    def add_norm(
        self, hidden: ir.Value, update: ir.Value, kind: Norm, weight: str, name: str, residual: str
    ) -> tuple[ir.Value, ir.Value]:
        """`hidden + update`, and the norm of it."""
        summed = self.op("Add", [hidden, update], residual)
        return summed, self.norm(summed, kind, weight, name)

    def cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        """`value` cast to `dtype`; no Cast from fp32 to fp32 where the compute type is fp32."""
        return value if self.dtype == FLOAT and dtype == FLOAT else self.op("Cast", [value], name, to=dtype.value)

    def linear(self, hidden: ir.Value, weight: str, name: str, *, bias: bool) -> ir.Value:
        """[tokens, in] to [tokens, out]; in FP8 where the checkpoint has scales for it."""
        scales = self._scales.get(weight)
        if scales is None:
            stored = self.weight(f"{weight}.weight")
        else:
            hidden, stored = (
                self._through_fp8(hidden, scales.activation),
                self._fp8_weight(f"{weight}.weight", scales.weight, name),
            )
        inputs = [hidden, stored, *([self.weight(f"{weight}.bias")] if bias else [])]
        return self.op("Gemm", inputs, name, **({} if self.config.linear_in_out else {"transB": 1}))

    def _fp8(self, scale: float) -> list[ir.Value]:
        """The scale and zero point inputs of QuantizeLinear and DequantizeLinear, both of rank 0."""
        return [self.scalar(scale, "fp8_scale"), self.build.constant(np.zeros((), FP8.numpy()), "fp8_zero_point", FP8)]

    def _through_fp8(self, x: ir.Value, scale: float) -> ir.Value:
        """`x` rounded to FP8; layers that share their input share the two nodes."""
        key = f"{x.name}/{scale!r}"
        if key not in self._values:
            self._values[key] = self._dequantized(
                self.op("QuantizeLinear", [x, *self._fp8(scale)], f"{x.name}/fp8"), scale, f"{x.name}/fp8"
            )
        return self._values[key]

    def _dequantized(self, stored: ir.Value, scale: float, name: str) -> ir.Value:
        return self.op("DequantizeLinear", [stored, *self._fp8(scale)], name)

    def _fp8_weight(self, weight: str, scale: float, name: str) -> ir.Value:
        """The weight behind DequantizeLinear; it is converted to FP8 when it is written."""
        codes = formats.quantized(self._weights[weight], formats.FP8, np.asarray(scale, np.float32), axis=1)
        stored = self.build.initializer(codes, weight)
        return self._dequantized(stored, scale, f"{name}/weight")

    def mlp(self, hidden: ir.Value, c: Mlp, weight: str, name: str) -> ir.Value:
        """The MLP of a block, [tokens, hidden] to [tokens, hidden]."""
        up = self.linear(hidden, f"{weight}.up_proj", f"{name}/up_proj", bias=c.bias)
        if c.gated:
            gate = self.linear(hidden, f"{weight}.gate_proj", f"{name}/gate_proj", bias=c.bias)
            inner = self.op("Mul", [self.activation(gate, c.activation, f"{name}/act"), up], name)
        else:
            inner = self.activation(up, c.activation, f"{name}/act")
        return self.linear(inner, f"{weight}.down_proj", f"{name}/down_proj", bias=c.bias)

    def activation(self, x: ir.Value, kind: Activation, name: str) -> ir.Value:
        """GELU (Hendrycks and Gimpel, arXiv 1606.08415, section 2), SiLU, ReLU or its square (arXiv 2109.08668)."""
        if kind == "silu":
            return (
                self.op("Swish", [x], name)
                if self.options.opset >= 24
                else self.op("Mul", [x, self.op("Sigmoid", [x], name)], name)
            )
        if kind.startswith("relu"):
            positive = self.op("Relu", [x], name)
            return self.op("Mul", [positive, positive], name) if kind == "relu2" else positive
        if self.options.opset >= 20:
            return self.op("Gelu", [x], name, approximate="tanh" if kind == "gelu_tanh" else "none")
        if kind == "gelu":
            inner = self.op(
                "Erf", [self.op("Mul", [x, self.scalar(math.sqrt(0.5), "sqrt_half")], f"{name}/scale")], name
            )
        else:
            cube = self.op("Mul", [x, self.op("Mul", [x, x], f"{name}/square")], f"{name}/cube")
            bent = self.op(
                "Add", [x, self.op("Mul", [cube, self.scalar(0.044715, "gelu_cubic")], f"{name}/cubic")], f"{name}/bent"
            )
            inner = self.op(
                "Tanh",
                [self.op("Mul", [bent, self.scalar(math.sqrt(2 / math.pi), "sqrt_2_pi")], f"{name}/scale")],
                name,
            )
        half = self.op("Mul", [x, self.scalar(0.5, "half")], f"{name}/half")
        return self.op("Mul", [half, self.op("Add", [inner, self.scalar(1.0, "one")], name)], name)

    def head(self, hidden: ir.Value) -> ir.Value:
        """Logits [tokens, vocabulary] in fp32."""
        table = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        logits = self.op("Gemm", [hidden, self.weight(table)], "/lm_head", transB=1)
        return self.cast(logits, FLOAT, "/lm_head")
