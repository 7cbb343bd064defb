"""Multi-head latent attention: the cache holds a latent and one rotated key of a token, and heads attend to latents.

The score of a head is q_nope . (K latent) + q_rope . key = (q_nope K) . latent + q_rope . key, so all heads attend with
their queries [latent channels, rotated channels] to the same keys [latent, key] and values [latent]; a head's value
is its up-projection of the context (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
"""

from __future__ import annotations

import onnx_ir as ir

from onnxtools.exporter.config import LatentAttention
from onnxtools.exporter.decoder_inputs import DecoderInputs
from onnxtools.exporter.layers import Layers
from onnxtools.exporter.scores import Scores


class Latent:
    """The latent attention of layer `n`."""

    def __init__(self, layers: Layers, io: DecoderInputs, scores: Scores, c: LatentAttention, n: int) -> None:
        self.layers, self.build, self.io, self.scores, self.c, self.n = layers, layers.build, io, scores, c, n

    def __call__(self, hidden: ir.Value, weight: str, name: str) -> ir.Value:
        """[batch * sequence, hidden] to [batch, sequence, heads, value channels]."""
        c, op = self.c, self.layers.op
        nope, rope = self._split(self._queries(hidden, weight, name), c.nope_dim, c.rope_dim, f"{name}/q")
        down = self.layers.linear(hidden, f"{weight}.kv_a_proj_with_mqa", f"{name}/kv_a_proj", bias=c.bias)
        latent, key = self._split(down, c.kv_rank, c.rope_dim, f"{name}/kv")
        latent = self.layers.norm(latent, c.norm, f"{weight}.kv_a_layernorm", f"{name}/kv_a_layernorm")
        latent, key = (
            self._one_head(latent, c.kv_rank, f"{name}/latent"),
            self._one_head(key, c.rope_dim, f"{name}/key"),
        )
        rope = self.scores.rotated(rope, c.rope, c.rope_dim, f"{name}/q")
        key = self.scores.rotated(key, c.rope, c.rope_dim, f"{name}/k")
        keys, latents = self.io.cached(key, latent, self.n, name)
        absorbed = op("MatMul", [nope, self.layers.weight(f"{weight}.k_b_proj.weight")], f"{name}/k_b_proj")
        q = op("Concat", [absorbed, rope], f"{name}/query", axis=-1)
        k = op("Concat", [latents, keys], f"{name}/keys", axis=-1)
        context = self.scores.attended(q, k, latents, c, weight, name)
        turned = op("Transpose", [context], f"{name}/context", perm=[0, 1, 3, 2])
        values = op("MatMul", [self.layers.weight(f"{weight}.v_b_proj.weight"), turned], f"{name}/v_b_proj")
        return op("Transpose", [values], f"{name}/values", perm=[0, 3, 1, 2])

    def _queries(self, hidden: ir.Value, weight: str, name: str) -> ir.Value:
        """[batch, heads, sequence, head_dim]."""
        c, linear = self.c, self.layers.linear
        if c.q_rank is None:
            q = linear(hidden, f"{weight}.q_proj", f"{name}/q_proj", bias=False)
        else:
            down = linear(hidden, f"{weight}.q_a_proj", f"{name}/q_a_proj", bias=c.bias)
            normed = self.layers.norm(down, c.norm, f"{weight}.q_a_layernorm", f"{name}/q_a_layernorm")
            q = linear(normed, f"{weight}.q_b_proj", f"{name}/q_b_proj", bias=False)
        split = self.io.shaped(q, (c.heads, c.head_dim), f"{name}/q")
        return self.layers.op("Transpose", [split], f"{name}/q", perm=[0, 2, 1, 3])

    def _split(self, x: ir.Value, first: int, second: int, name: str) -> tuple[ir.Value, ir.Value]:
        sizes = self.build.constant([first, second], "latent_parts")
        a, b = self.build.ops("Split", [x, sizes], f"{name}/Split", outputs=2, axis=-1)
        return a, b

    def _one_head(self, x: ir.Value, channels: int, name: str) -> ir.Value:
        """[tokens, channels] as [batch, 1, sequence, channels]."""
        split = self.io.shaped(x, (1, channels), name)
        return self.layers.op("Transpose", [split], name, perm=[0, 2, 1, 3])
