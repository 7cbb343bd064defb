"""Rotation of queries and keys, and the attention of queries to cached keys and values, in standard operators."""

from __future__ import annotations

import onnx_ir as ir

from onnxtools.exporter.config import LatentAttention, SelfAttention
from onnxtools.exporter.decoder_inputs import DecoderInputs
from onnxtools.exporter.layers import FLOAT, Layers
from onnxtools.exporter.rope import Rope


class Scores:
    """Operators of opset 23 (RotaryEmbedding, Attention), or their parts."""

    def __init__(self, layers: Layers, io: DecoderInputs) -> None:
        self.layers, self.build, self.io, self.opset = layers, layers.build, io, layers.options.opset
        self._angles: dict[int, tuple[ir.Value, ir.Value]] = {}

    def rotated(self, x: ir.Value, rope: Rope | None, channels: int, name: str) -> ir.Value:
        """Rotary embedding of the first of `channels` channels of [batch, heads, sequence, channels]."""
        if rope is None:
            return x
        if self.opset < 23:
            return self._rotated_primitive(x, rope, channels - rope.dim, name)
        dim = rope.dim if rope.dim < channels else 0  # 0: all channels
        pairs = {"interleaved": 1} if rope.interleaved else {}
        inputs = [x, *self.io.tables(rope), self.io.rows(rope)]
        return self.layers.op("RotaryEmbedding", inputs, name, rotary_embedding_dim=dim, **pairs)

    def _rotated_primitive(self, x: ir.Value, rope: Rope, unrotated: int, name: str) -> ir.Value:
        op, build, dim = self.layers.op, self.build, rope.dim
        cos, sin = self._cos_sin(rope)
        if rope.interleaved:
            rest = []
            if unrotated:
                sizes = build.constant([dim, unrotated], "rope_parts")
                x, *rest = build.ops("Split", [x, sizes], f"{name}/Split", outputs=2, axis=-1)
            step, end, axis = build.constant([2], "rope_step"), build.constant([dim], "rope_end"), self._axis()
            starts = (build.constant([0], "zero"), build.constant([1], "axis_1"))
            a, b = (op("Slice", [x, start, end, axis, step], f"{name}/pairs") for start in starts)
        else:
            sizes = build.constant([dim // 2, dim // 2, *([unrotated] if unrotated else [])], "rope_parts")
            a, b, *rest = build.ops("Split", [x, sizes], f"{name}/Split", outputs=3 if unrotated else 2, axis=-1)
        first = op("Sub", [op("Mul", [a, cos], f"{name}/a_cos"), op("Mul", [b, sin], f"{name}/b_sin")], f"{name}/first")
        second = op(
            "Add", [op("Mul", [b, cos], f"{name}/b_cos"), op("Mul", [a, sin], f"{name}/a_sin")], f"{name}/second"
        )
        if not rope.interleaved:
            return op("Concat", [first, second, *rest], f"{name}/rotated", axis=-1)
        pairs = [op("Unsqueeze", [half, self._axis()], f"{name}/pair") for half in (first, second)]
        joined = op("Concat", pairs, f"{name}/rotated_pairs", axis=-1)
        whole = op("Reshape", [joined, build.constant([0, 0, 0, dim], "rope_shape")], f"{name}/rotated")
        return op("Concat", [whole, *rest], f"{name}/rotated", axis=-1) if rest else whole

    def _axis(self) -> ir.Value:
        return self.build.constant([-1], "last_axis")

    def _cos_sin(self, rope: Rope) -> tuple[ir.Value, ir.Value]:
        """cos and sin of the new tokens, each [batch, 1, sequence, rotary dim / 2]."""
        index = self.io.config.ropes.index(rope)
        if index not in self._angles:
            op, suffix, found = self.layers.op, f"_{index}" if index else "", []
            for key, table in zip(("angles", "sines"), self.io.tables(rope), strict=True):
                rows = op("Gather", [table, self.io.rows(rope)], f"/model/rope{suffix}/{key}")
                axis = self.build.constant([1], "axis_1")
                found.append(op("Unsqueeze", [rows, axis], f"/model/rope{suffix}/{key}"))
            self._angles[index] = (found[0], found[1])
        return self._angles[index]

    def attended(
        self, q: ir.Value, k: ir.Value, v: ir.Value, c: SelfAttention | LatentAttention, weight: str, name: str
    ) -> ir.Value:
        """The context [batch, heads, sequence, value channels] of a layer.

        Args:
            q: [batch, heads, sequence, channels].
            k: [batch, kv_heads, total, channels].
            v: [batch, kv_heads, total, value channels].
            c: the layer's attention.
            weight: canonical name of the attention's module.
            name: prefix of the new nodes' names.
        """
        # Attention has no sinks, opset 23 leaves open whether its softcap comes before the mask, and TensorRT wants
        # values as wide as keys.
        is_plain = isinstance(c, SelfAttention) and c.softcap is None and not c.sinks
        if self.opset >= 23 and is_plain:
            wide = {} if self.layers.dtype == FLOAT else {"softmax_precision": FLOAT.value}
            return self.layers.op("Attention", [q, k, v, self.io.mask(c)], name, scale=c.scale, **wide)
        return self._primitive(q, k, v, c, weight, name)

    def _primitive(
        self, q: ir.Value, k: ir.Value, v: ir.Value, c: SelfAttention | LatentAttention, weight: str, name: str
    ) -> ir.Value:
        """Attention in primitive operators: MatMul, mask, Softmax in fp32, MatMul."""
        op = self.layers.op
        sinks = None
        if isinstance(c, SelfAttention):
            k, v = self._repeated(k, c, f"{name}/key"), self._repeated(v, c, f"{name}/value")
            sinks = self._sinks(weight, c, name) if c.sinks else None
        scaled = op("Mul", [q, self.layers.scalar(c.scale, "attention_scale")], f"{name}/q/scaled")
        scores = op("MatMul", [scaled, op("Transpose", [k], f"{name}/key", perm=[0, 1, 3, 2])], f"{name}/qk")
        if isinstance(c, SelfAttention) and c.softcap is not None:
            scores = self.layers.softcapped(scores, c.softcap, f"{name}/softcap")
        masked = self.layers.cast(op("Add", [scores, self.io.mask(c)], f"{name}/scores"), FLOAT, f"{name}/scores")
        probabilities = self._softmax(masked, sinks, name)
        return op(
            "MatMul", [self.layers.cast(probabilities, self.layers.dtype, f"{name}/probabilities"), v], f"{name}/pv"
        )

    def _sinks(self, weight: str, c: SelfAttention, name: str) -> ir.Value:
        """The logit of no token of each head, fp32 [batch, heads, sequence, 1]."""
        shape = self.build.constant([1, c.heads, 1, 1], "sinks_shape")
        sinks = self.layers.op("Reshape", [self.layers.weight(f"{weight}.sinks"), shape], f"{name}/sinks")
        return self.layers.cast(
            self.layers.op("Expand", [sinks, self.io.heads_shape(c.heads)], f"{name}/sinks"), FLOAT, f"{name}/sinks"
        )

    def _softmax(self, scores: ir.Value, sinks: ir.Value | None, name: str) -> ir.Value:
        """Softmax over the last axis of fp32 scores; a sink takes its share and is left out."""
        op = self.layers.op
        if sinks is None:
            return op("Softmax", [scores], name, axis=-1)
        joined = op("Concat", [sinks, scores], f"{name}/with_sink", axis=-1)
        shares = op("Softmax", [joined], name, axis=-1)
        ends = [self.build.constant([1], "axis_1"), self.build.constant([1 << 62], "end"), self._axis()]
        return op("Slice", [shares, *ends], f"{name}/without_sink")

    def _repeated(self, x: ir.Value, c: SelfAttention, name: str) -> ir.Value:
        """Repeat each key/value head for every query head that shares it."""
        build = self.build
        repeat = c.heads // c.kv_heads
        if repeat == 1:
            return x
        column = self.layers.op("Unsqueeze", [x, build.constant([2], "axis_2")], name)
        copies = self.layers.op("Expand", [column, build.constant([1, 1, repeat, 1, 1], "repeat")], name)
        target = build.constant([0, c.heads, -1, c.head_dim], "repeated_shape")
        return self.layers.op("Reshape", [copies, target], f"{name}/repeated")
