"""Self-attention of one layer: projections, norm and rotation of queries and keys, cache, scores, output projection."""

from __future__ import annotations

import onnx_ir as ir

from onnxtools.exporter.config import LatentAttention, QkNorm, SelfAttention
from onnxtools.exporter.decoder_inputs import DecoderInputs
from onnxtools.exporter.latent_attention import Latent
from onnxtools.exporter.layers import Layers
from onnxtools.exporter.ort_layers import MICROSOFT, OrtLayers
from onnxtools.exporter.scores import Scores

_Q, _K, _V = "q", "k", "v"


class Attention:
    """Each call adds the attention of one layer."""

    def __init__(self, layers: Layers, io: DecoderInputs) -> None:
        self.layers, self.build, self.config, self.io = layers, layers.build, layers.config, io
        self.scores = Scores(layers, io)

    def __call__(self, hidden: ir.Value, n: int, *, last_only: bool = False) -> ir.Value:
        """Add layer `n`: projections, cache, attention and output projection.

        Maps [batch * sequence, hidden] to the same shape, or with `last_only` to [batch, hidden] of the last tokens.
        """
        c, weight, name = self.config.blocks[n].attention, f"model.layers.{n}.self_attn", f"/model/layers.{n}/attn"
        if isinstance(c, LatentAttention):
            context = Latent(self.layers, self.io, self.scores, c, n)(hidden, weight, name)
        else:
            context = self._context(hidden, c, n, weight, name)
        flat = self.layers.op(
            "Reshape", [context, self.build.constant([-1, c.context_size], "context_shape")], f"{name}/context"
        )
        flat = self.io.last_rows(flat, c.context_size) if last_only else flat
        return self.layers.linear(flat, f"{weight}.o_proj", f"{name}/o_proj", bias=c.output_bias)

    def _context(self, hidden: ir.Value, c: SelfAttention, n: int, weight: str, name: str) -> ir.Value:
        """[batch, sequence, heads, head_dim], or these as one row of a token."""
        is_plain = c.qk_norm is None and c.clip is None
        packed = self.layers.qkv(hidden, c, weight, name) if isinstance(self.layers, OrtLayers) and is_plain else None
        if packed is not None:
            product, qkv_bias = packed
            joined = self.io.shaped(product, (c.q_size + 2 * c.kv_size,), f"{name}/qkv")
            joined = joined if qkv_bias is None else self.layers.op("Add", [joined, qkv_bias], f"{name}/qkv")
            return self._grouped([joined, None, None], c, n, weight, name)
        q, k, v = (
            self._limited(
                self.layers.linear(hidden, f"{weight}.{part}_proj", f"{name}/{part}_proj", bias=c.bias), c, name
            )
            for part in (_Q, _K, _V)
        )
        if c.qk_norm is not None:
            q = self._normed(q, c.qk_norm, c.heads, c.head_dim, f"{weight}.q_norm", f"{name}/q_norm")
            k = self._normed(k, c.qk_norm, c.kv_heads, c.head_dim, f"{weight}.k_norm", f"{name}/k_norm")
        if self.io.kind == "gqa":
            sizes = ((_Q, q, c.q_size), (_K, k, c.kv_size), (_V, v, c.kv_size))
            parts: list[ir.Value | None] = [self.io.shaped(x, (size,), f"{name}/{part}") for part, x, size in sizes]
            return self._grouped(parts, c, n, weight, name)
        return self._standard(q, k, v, c, n, weight, name)

    def _limited(self, x: ir.Value, c: SelfAttention, name: str) -> ir.Value:
        if c.clip is None:
            return x
        limits = [self.layers.scalar(-c.clip, "clip_low"), self.layers.scalar(c.clip, "clip_high")]
        return self.layers.op("Clip", [x, *limits], f"{name}/clip")

    def _normed(self, x: ir.Value, kind: QkNorm, heads: int, channels: int, weight: str, name: str) -> ir.Value:
        """Queries or keys [tokens, heads * channels], normalized; [tokens, heads, channels] where each head is."""
        if kind.over == "all":
            return self.layers.norm(x, kind.norm, weight, name)
        split = self.layers.op(
            "Reshape", [x, self.build.constant([-1, heads, channels], "heads_shape")], f"{name}/split"
        )
        return self.layers.norm(split, kind.norm, weight, name, by_head=kind.over == "heads")

    def _grouped(self, projected: list[ir.Value | None], c: SelfAttention, n: int, weight: str, name: str) -> ir.Value:
        """Add com.microsoft.GroupQueryAttention, which rotates, appends to the cache and attends.

        `projected` is [q, k, v], or [packed q, k and v, None, None].
        """
        assert self.io.lengths is not None
        tables = self.io.tables(c.rope) if c.rope is not None else ()
        inputs = [*projected, *self.io.pasts[n], *self.io.lengths, *tables]
        attributes = {
            **({} if c.window is None else {"local_window_size": c.window}),
            **({} if c.softcap is None else {"softcap": c.softcap}),
            **({"rotary_interleaved": 1} if c.rope is not None and c.rope.interleaved else {}),
        }
        if c.sinks:  # input 11
            inputs += [None] * (11 - len(inputs)) + [self.layers.weight(f"{weight}.sinks")]
        outputs = self.build.ops(
            "GroupQueryAttention",
            inputs,
            f"{name}/GroupQueryAttention",
            outputs=3,
            domain=MICROSOFT,
            num_heads=c.heads,
            kv_num_heads=c.kv_heads,
            scale=c.scale,
            do_rotary=int(c.rope is not None),
            **attributes,
        )
        for kind, value in zip(("key", "value"), outputs[1:], strict=True):
            self.io.present(value, n, kind)
        return outputs[0]

    def _standard(
        self, q: ir.Value, k: ir.Value, v: ir.Value, c: SelfAttention, n: int, weight: str, name: str
    ) -> ir.Value:
        """Add attention over the cache in standard operators; returns [batch, sequence, heads, head_dim]."""
        q = self.scores.rotated(self._heads(q, c.heads, c, f"{name}/{_Q}"), c.rope, c.head_dim, f"{name}/{_Q}")
        k = self.scores.rotated(self._heads(k, c.kv_heads, c, f"{name}/{_K}"), c.rope, c.head_dim, f"{name}/{_K}")
        v = self._heads(v, c.kv_heads, c, f"{name}/{_V}")
        k, v = self.io.cached(k, v, n, name)
        context = self.scores.attended(q, k, v, c, weight, name)
        return self.layers.op("Transpose", [context], f"{name}/context", perm=[0, 2, 1, 3])

    def _heads(self, value: ir.Value, heads: int, attention: SelfAttention, name: str) -> ir.Value:
        split = self.io.shaped(value, (heads, attention.head_dim), name)
        return self.layers.op("Transpose", [split], name, perm=[0, 2, 1, 3])
