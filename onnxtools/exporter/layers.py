"""The layers of a decoder as ONNX nodes: embedding, norm, linear, MLP, head.

Activations are [batch * sequence, hidden]. Linear layers are Gemm with the weight as the checkpoint stores it ([out,
in] and transB=1): a weight is copied, never transposed, a tied head reads the embedding table, and the bias is part of
the node.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxtools.base.errors import JobError
from onnxtools.exporter.config import Activation, DecoderConfig, Mlp, Norm
from onnxtools.exporter.export_options import ExportOptions
from onnxtools.exporter.family import Weights
from onnxtools.ir.edit import Builder
from onnxtools.numerics import formats
from onnxtools.storage.lazy import Tensor, cast
from onnxtools.storage.quantized_weight import Codes, QuantizedWeight
from onnxtools.storage.rows import elements

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

    def wide_weight(self, name: str) -> ir.Value:
        """The weight `name` in fp32."""
        if name not in self._values:
            self._values[name] = self.build.initializer(cast(self._weights[name], FLOAT), name)
        return self._values[name]

    def scalar(self, value: float, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """A constant of rank 0, in the compute type by default."""
        dtype = dtype or self.dtype
        return self.build.constant(np.array(value, dtype.numpy()), name, dtype)

    def embedding(self, ids: ir.Value, positions: ir.Value | None) -> ir.Value:
        """int64 ids [batch, sequence] to [batch * sequence, hidden].

        `positions` [batch, sequence] are those of learned vectors, which are added; None where there are none.
        """
        c = self.config
        hidden = self.op("Gather", [self.weight("model.embed_tokens.weight"), ids], "/model/embed_tokens")
        if c.embed_scale != 1:
            hidden = self.op("Mul", [hidden, self.scalar(c.embed_scale, "embed_scale")], "/model/embed_scale")
        if c.width != c.hidden_size:
            return self._projected(hidden, positions)
        if positions is not None:
            hidden = self.op("Add", [hidden, self._learned(positions)], "/model/embed")
        flat = self.op("Reshape", [hidden, self.build.constant([-1, c.hidden_size], "tokens_shape")], "/model/embed")
        return flat if c.embed_norm is None else self.norm(flat, c.embed_norm, "model.embed_norm", "/model/embed_norm")

    def _projected(self, narrow: ir.Value, positions: ir.Value | None) -> ir.Value:
        """An embedding [batch, sequence, width] in the hidden size, [batch * sequence, hidden]."""
        flat = self.op(
            "Reshape", [narrow, self.build.constant([-1, self.config.width], "narrow_shape")], "/model/embed"
        )
        hidden = self.linear(flat, "model.project_in", "/model/project_in", bias=False)
        if positions is None:
            return hidden
        sizes = self.build.constant([-1, self.config.hidden_size], "tokens_shape")
        learned = self.op("Reshape", [self._learned(positions), sizes], "/model/embed_positions")
        return self.op("Add", [hidden, learned], "/model/embed")

    def _learned(self, positions: ir.Value) -> ir.Value:
        return self.op("Gather", [self.weight("model.embed_positions.weight"), positions], "/model/embed_positions")

    def norm(self, hidden: ir.Value, kind: Norm, weight: str, name: str, *, by_head: bool = False) -> ir.Value:
        """LayerNorm or RMSNorm over the last axis, computed in fp32 (stash_type 1).

        With `by_head` the gains are [heads, channels], for values [tokens, heads, channels].
        """
        if by_head:
            return self._head_norm(hidden, kind, weight, name)
        return self._norm(hidden, kind, self._gain(kind, weight), weight, name)

    def _head_norm(self, hidden: ir.Value, kind: Norm, weight: str, name: str) -> ir.Value:
        gains = self.weight(f"{weight}.weight")
        assert gains.shape is not None
        channels = gains.shape[-1]
        assert isinstance(channels, int)
        normed = self._norm(hidden, dataclasses.replace(kind, bias=False), self._ones(channels), weight, name)
        return self.op("Mul", [normed, gains], f"{name}/gains")

    def _gain(self, kind: Norm, weight: str) -> ir.Value:
        return self.weight(f"{weight}.weight") if kind.gain else self._ones(self.config.hidden_size)

    def _ones(self, size: int) -> ir.Value:
        return self.build.constant(np.ones(size, self.dtype.numpy()), "ones", self.dtype)

    def _norm(self, hidden: ir.Value, kind: Norm, scale: ir.Value, weight: str, name: str) -> ir.Value:
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

    def linear(self, hidden: ir.Value, weight: str, name: str, *, bias: bool, in_out: bool | None = None) -> ir.Value:
        """[tokens, in] to [tokens, out]; in FP8 where the checkpoint has scales for it.

        `in_out` is whether the weight is [in, out]; None where that is the same for the whole model.
        """
        in_out = self.config.linear_in_out if in_out is None else in_out
        packed = self._weights.get(f"{weight}.weight")
        if isinstance(packed, QuantizedWeight) and not in_out:
            return self._quantized(hidden, packed.parts, weight, name, bias=bias)
        scales = self._scales.get(weight)
        if scales is None:
            stored = self.weight(f"{weight}.weight")
        else:
            hidden, stored = (
                self._through_fp8(hidden, scales.activation),
                self._fp8_weight(f"{weight}.weight", scales.weight, name),
            )
        inputs = [hidden, stored, *([self.weight(f"{weight}.bias")] if bias else [])]
        return self.op("Gemm", inputs, name, **({} if in_out else {"transB": 1}))

    def _quantized(self, hidden: ir.Value, p: Codes, weight: str, name: str, *, bias: bool) -> ir.Value:
        """A linear layer with the checkpoint's own codes and scales behind DequantizeLinear."""
        if p.block and self.options.opset < 21:
            raise JobError(
                f"weights in blocks, as {weight!r}, need DequantizeLinear of opset 21, and --opset is "
                f"{self.options.opset}; raise it"
            )
        if p.input_order is not None:
            order = self.build.constant(p.input_order, "input_order")
            hidden = self._once("Gather", [hidden, order], f"{hidden.name}/ordered/{order.name}", axis=1)
        if p.input_factors is not None:
            factors = self.stored(f"{weight}.input_factors", p.input_factors)
            hidden = self.op("Mul", [hidden, factors], f"{name}/input_factors")
        if p.input_scale is not None:
            hidden = self._rounded(hidden, p.input_scale, p.codes.dtype)
        wide = self._scale_type(p)
        scale = self.build.initializer(cast(p.scale, wide), f"{weight}.weight_scale")
        inputs = [self.build.initializer(p.codes, f"{weight}.weight"), scale]
        inputs += [self.build.initializer(p.zero, f"{weight}.zero_point")] if p.zero is not None else []
        along = 0 if p.in_out else 1
        has_rows = bool(p.scale.shape.numpy())
        layout = {"axis": along, "block_size": p.block} if p.block else {"axis": 1 - along} if has_rows else {}
        matrix = self.op("DequantizeLinear", inputs, f"{name}/weight", **layout)
        if wide != self.dtype:
            matrix = self.op("Cast", [matrix], f"{name}/weight", to=self.dtype.value)
        biases = [self.weight(f"{weight}.bias")] if bias else []
        return self.op("Gemm", [hidden, matrix, *biases], name, **({} if p.in_out else {"transB": 1}))

    def _scale_type(self, p: Codes) -> ir.DataType:
        """The type that weights are de-quantized in: the compute type, or fp32 where that would round their scales.

        With a scale of the activation it is the compute type, as far as it holds the scales as normal numbers: only
        then do engines multiply the codes themselves.
        """
        if self.dtype == FLOAT or p.scale.dtype == self.dtype:
            return self.dtype
        least = float(ml_dtypes.finfo(self.dtype.numpy()).tiny)  # type: ignore[no-untyped-call]
        fits = p.input_scale is not None and float(elements(p.scale).astype(np.float32).min()) >= least
        return self.dtype if fits else FLOAT

    def _once(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        """A node that layers share."""
        if name not in self._values:
            self._values[name] = self.op(op_type, inputs, name, **attributes)
        return self._values[name]

    def _rounded(self, x: ir.Value, scale: float, dtype: ir.DataType) -> ir.Value:
        """`x` rounded to FP8 or INT8 with a scale of the checkpoint; layers that share their input share the nodes."""
        name = f"{x.name}/{dtype.name.lower()}/{scale!r}"
        zero = self.build.constant(np.zeros((), dtype.numpy()), f"{dtype.name.lower()}_zero_point", dtype)
        pair = [self.scalar(scale, "activation_scale"), zero]
        stored = self._once("QuantizeLinear", [x, *pair], name)
        return self._once("DequantizeLinear", [stored, *pair], f"{name}/back")

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

    def mlp(self, hidden: ir.Value, c: Mlp, weight: str, name: str, *, in_out: bool | None = None) -> ir.Value:
        """The MLP of a block, [tokens, hidden] to [tokens, hidden]; `in_out` as in `linear`."""
        up = self.linear(hidden, f"{weight}.up_proj", f"{name}/up_proj", bias=c.bias, in_out=in_out)
        if c.gated:
            gate = self.linear(hidden, f"{weight}.gate_proj", f"{name}/gate_proj", bias=c.bias, in_out=in_out)
            inner = self._gated(gate, up, c, name)
        else:
            inner = self.activation(up, c.activation, f"{name}/act")
        return self.linear(inner, f"{weight}.down_proj", f"{name}/down_proj", bias=c.bias, in_out=in_out)

    def _gated(self, gate: ir.Value, up: ir.Value, c: Mlp, name: str) -> ir.Value:
        op = self.op
        if c.activation != "swiglu_clamped":
            return op("Mul", [self.activation(gate, c.activation, f"{name}/act"), up], name)
        assert c.limit is not None
        low, high = self.scalar(-c.limit, "limit_low"), self.scalar(c.limit, "limit_high")
        gate = op("Min", [gate, high], f"{name}/gate")
        up = op("Add", [op("Clip", [up, low, high], f"{name}/up"), self.scalar(1.0, "one")], f"{name}/up")
        share = op("Sigmoid", [op("Mul", [gate, self.scalar(c.alpha, "swiglu_alpha")], f"{name}/act")], f"{name}/act")
        return op("Mul", [op("Mul", [gate, share], f"{name}/glu"), up], name)

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

    def softcapped(self, x: ir.Value, cap: float, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """cap x tanh(x / cap) (Gemma 2, arXiv 2408.00118, section 2); `dtype` is that of `x`, or the compute type."""
        value = self.scalar(cap, "softcap", dtype)
        return self.op("Mul", [self.op("Tanh", [self.op("Div", [x, value], name)], name), value], name)

    def head(self, hidden: ir.Value) -> ir.Value:
        """Logits [tokens, vocabulary] in fp32."""
        c = self.config
        if c.width != c.hidden_size:
            hidden = self.linear(hidden, "model.project_out", "/model/project_out", bias=False)
        table = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
        bias = [self.weight("lm_head.bias")] if c.head_bias else []
        logits = self.op("Gemm", [hidden, self.weight(table), *bias], "/lm_head", transB=1)
        logits = self.cast(logits, FLOAT, "/lm_head")
        if c.logit_scale != 1:
            logits = self.op("Mul", [logits, self.scalar(c.logit_scale, "logit_scale", FLOAT)], "/lm_head/scale")
        if c.logit_softcap is not None:
            logits = self.softcapped(logits, c.logit_softcap, "/lm_head/softcap", FLOAT)
        return logits
