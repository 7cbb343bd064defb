"""The weights of a decoder: their canonical names, which are Hugging Face's names of Llama and its kin, and shapes."""

from __future__ import annotations

from collections.abc import Iterator

from onnxtools.exporter.config import NORMS, DecoderConfig, LatentAttention, Mlp, Moe, Norm, QkNorm, SelfAttention

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def weight_shapes(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the model by its canonical name and shape."""
    return dict(_Shapes(c).all())


class _Shapes:
    def __init__(self, c: DecoderConfig) -> None:
        self.c = c

    def all(self) -> Shapes:
        c = self.c
        yield "model.embed_tokens.weight", (c.vocab_size, c.width)
        if c.learned_positions:
            yield "model.embed_positions.weight", (c.max_position_embeddings, c.hidden_size)
        if c.width != c.hidden_size:
            yield from self.linear("model.project_in", c.hidden_size, c.width, bias=False)
        if c.embed_norm is not None:
            yield from self.norm("model.embed_norm", c.embed_norm)
        for n, block in enumerate(c.blocks):
            layer = f"model.layers.{n}"
            first, *others = NORMS[block.placement]
            yield from self.norm(f"{layer}.{first}", block.norm)
            yield from self.attention(f"{layer}.self_attn", block.attention)
            for name in others:
                yield from self.norm(f"{layer}.{name}", block.norm)
            yield from self.mlp(f"{layer}.mlp", block.mlp)
        if c.norm is not None:
            yield from self.norm("model.norm", c.norm)
        if c.width != c.hidden_size:
            yield from self.linear("model.project_out", c.width, c.hidden_size, bias=False)
        if not c.tie_word_embeddings:
            yield "lm_head.weight", (c.vocab_size, c.width)
        if c.head_bias:
            yield "lm_head.bias", (c.vocab_size,)

    def linear(self, name: str, outputs: int, inputs: int, *, bias: bool, in_out: bool = False) -> Shapes:
        yield f"{name}.weight", (inputs, outputs) if in_out or self.c.linear_in_out else (outputs, inputs)
        if bias:
            yield f"{name}.bias", (outputs,)

    def norm(self, name: str, kind: Norm, *shape: int) -> Shapes:
        shape = shape or (self.c.hidden_size,)
        if kind.gain:
            yield f"{name}.weight", shape
        if kind.bias:
            yield f"{name}.bias", shape

    def attention(self, name: str, a: SelfAttention | LatentAttention) -> Shapes:
        if isinstance(a, LatentAttention):
            yield from self.latent(name, a)
        else:
            hidden = self.c.hidden_size
            yield from self.linear(f"{name}.q_proj", a.q_size, hidden, bias=a.bias)
            yield from self.linear(f"{name}.k_proj", a.kv_size, hidden, bias=a.bias)
            yield from self.linear(f"{name}.v_proj", a.kv_size, hidden, bias=a.bias)
            if a.qk_norm is not None:
                yield from self.norm(f"{name}.q_norm", a.qk_norm.norm, *_normed(a.qk_norm, a.heads, a.head_dim))
                yield from self.norm(f"{name}.k_norm", a.qk_norm.norm, *_normed(a.qk_norm, a.kv_heads, a.head_dim))
            if a.sinks:
                yield f"{name}.sinks", (a.heads,)
        yield from self.linear(f"{name}.o_proj", self.c.hidden_size, a.context_size, bias=a.output_bias)

    def latent(self, name: str, a: LatentAttention) -> Shapes:
        hidden, q_size = self.c.hidden_size, a.heads * a.head_dim
        if a.q_rank is None:
            yield from self.linear(f"{name}.q_proj", q_size, hidden, bias=False)
        else:
            yield from self.linear(f"{name}.q_a_proj", a.q_rank, hidden, bias=a.bias)
            yield from self.norm(f"{name}.q_a_layernorm", a.norm, a.q_rank)
            yield from self.linear(f"{name}.q_b_proj", q_size, a.q_rank, bias=False)
        yield from self.linear(f"{name}.kv_a_proj_with_mqa", a.kv_rank + a.rope_dim, hidden, bias=a.bias)
        yield from self.norm(f"{name}.kv_a_layernorm", a.norm, a.kv_rank)
        yield f"{name}.k_b_proj.weight", (a.heads, a.nope_dim, a.kv_rank)
        yield f"{name}.v_b_proj.weight", (a.heads, a.value_dim, a.kv_rank)

    def mlp(self, name: str, mlp: Mlp | Moe) -> Shapes:
        if isinstance(mlp, Mlp):
            yield from self.dense(name, mlp)
            return
        hidden = self.c.hidden_size
        yield from self.linear(f"{name}.gate", mlp.experts, hidden, bias=mlp.bias)
        if mlp.correction:
            yield f"{name}.gate.e_score_correction_bias", (mlp.experts,)
        for e in range(mlp.experts):
            yield from self.dense(f"{name}.experts.{e}", mlp.expert, in_out=mlp.in_out)
        if mlp.shared is not None:
            yield from self.dense(f"{name}.shared_experts", mlp.shared)
        if mlp.shared_gate:
            yield from self.linear(f"{name}.shared_expert_gate", 1, hidden, bias=False)

    def dense(self, name: str, mlp: Mlp, *, in_out: bool = False) -> Shapes:
        hidden = self.c.hidden_size
        if mlp.gated:
            yield from self.linear(f"{name}.gate_proj", mlp.size, hidden, bias=mlp.bias, in_out=in_out)
        yield from self.linear(f"{name}.up_proj", mlp.size, hidden, bias=mlp.bias, in_out=in_out)
        yield from self.linear(f"{name}.down_proj", hidden, mlp.size, bias=mlp.bias, in_out=in_out)


def _normed(kind: QkNorm, heads: int, channels: int) -> tuple[int, ...]:
    """The shape of a weight that normalizes heads."""
    return {"head": (channels,), "heads": (heads, channels), "all": (heads * channels,)}[kind.over]
