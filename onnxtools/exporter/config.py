"""The configuration of a decoder, independent of the checkpoint format: a stream of blocks between two tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.exporter.rope import MAX_HEAD_DIM, Rope

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "relu2", "swiglu_clamped"]
"""`gelu` is the exact (erf) form, `relu2` the square of ReLU; `swiglu_clamped` is `Mlp`'s, of the gate and up."""

_LARGEST = {
    "vocab_size": 1 << 27, "hidden_size": 1 << 20, "num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14, "head_dim": MAX_HEAD_DIM, "intermediate_size": 1 << 24,
    "max_position_embeddings": 1 << 23, "num_experts": 1 << 12, "sliding_window": 1 << 31,
}  # fmt: skip
"""Upper limits, far above any model: a damaged configuration must not fill the memory with names and tables."""


@dataclass(frozen=True)
class Norm:
    """A normalization over the last axis, computed in fp32; `gain` is whether it has a weight (OLMo's has none)."""

    kind: Literal["layer_norm", "rms_norm"]
    eps: float
    bias: bool = False
    gain: bool = True


@dataclass(frozen=True)
class QkNorm:
    """A normalization of queries and keys before they are rotated.

    Attributes:
        norm: its kind.
        over: `head`: each head, one weight [head_dim] for all (Qwen3); `heads`: each head, with a weight of its own,
            [heads, head_dim] (Cohere); `all`: all channels together, [heads * head_dim] (OLMo 2).
    """

    norm: Norm
    over: Literal["head", "heads", "all"] = "head"


@dataclass(frozen=True)
class Alibi:
    """A bias of the scores, slope x (position of the key - position of the query) (Press et al., arXiv 2108.12409).

    Attributes:
        slopes: one for each query head.
        counts: what a position is: `tokens`: padding is not counted (BLOOM); `slots`: it is (MPT).
        bf16: slope x position of the key is rounded to bfloat16, as in Falcon.
        scale: factor of the bias.
    """

    slopes: tuple[float, ...]
    counts: Literal["tokens", "slots"] = "tokens"
    bf16: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class SelfAttention:
    """Causal attention with grouped keys and values.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key/value heads, a divisor of `heads`.
        head_dim: channels of a head.
        scale: the factor of q k^T.
        rope: rotation of queries and keys; None where they are not rotated.
        bias: whether the q/k/v projections have biases.
        output_bias: whether the output projection has a bias.
        window: tokens that a token sees, itself among them; None where it sees all before it.
        qk_norm: normalization of queries and keys.
        clip: queries, keys and values are limited to +- this.
        softcap: scores s become softcap x tanh(s / softcap) before they are masked.
        alibi: bias of the scores by distance.
        sinks: whether each head has a logit of no token, which takes its share of the softmax (gpt-oss).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    bias: bool = False
    output_bias: bool = False
    window: int | None = None
    qk_norm: QkNorm | None = None
    clip: float | None = None
    softcap: float | None = None
    alibi: Alibi | None = None
    sinks: bool = False

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """Heads of the cache, and the channels of its keys and of its values."""
        return self.kv_heads, self.head_dim, self.head_dim

    @property
    def context_size(self) -> int:
        """Channels that the output projection reads."""
        return self.q_size


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The cache holds a latent vector and one rotated key of a token for all heads. Heads attend to the latents, as the
    up-projections of keys and values are applied to queries and contexts instead.

    Attributes:
        heads: number of query heads.
        q_rank: channels of the latent queries; None where queries are projected at once.
        kv_rank: channels of the latent keys and values.
        nope_dim: channels of a head's key that are not rotated.
        rope_dim: channels of the rotated key.
        value_dim: channels of a head's value.
        scale: the factor of q k^T.
        rope: rotation of `rope_dim` channels.
        norm: the norm of the latents.
        bias: whether the down-projections have biases.
        output_bias: whether the output projection has a bias.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    rope: Rope
    norm: Norm
    bias: bool = False
    output_bias: bool = False
    window: None = None
    alibi: None = None

    @property
    def kv_heads(self) -> int:
        """All heads share the cache."""
        return 1

    @property
    def head_dim(self) -> int:
        """Channels of a head's query and key."""
        return self.nope_dim + self.rope_dim

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """Heads of the cache, and the channels of its keys (the rotated ones) and of its values (the latents)."""
        return 1, self.rope_dim, self.kv_rank

    @property
    def context_size(self) -> int:
        """Channels that the output projection reads."""
        return self.heads * self.value_dim


@dataclass(frozen=True)
class Mlp:
    """down(act(up(x))), or with `gated` down(act(gate(x)) * up(x)); `size` is the inner width.

    `swiglu_clamped` (gpt-oss) is (up + 1) * gate * sigmoid(alpha * gate), with gate <= limit and |up| <= limit.
    """

    size: int
    activation: Activation
    gated: bool = False
    bias: bool = False
    alpha: float = 1.0
    limit: float | None = None


@dataclass(frozen=True)
class Moe:
    """A mixture of experts: the sum of `top_k` MLPs that a router chooses for each token, weighted, and a shared one.

    Attributes:
        experts: number of experts.
        top_k: experts of a token.
        expert: the MLP of each.
        scores: of the router's logits: `softmax` over all experts, `top_softmax` over the chosen ones, `sigmoid`.
        normalized: the weights of a token's experts are divided by their sum.
        scale: factor of the weights.
        groups, top_groups: experts are chosen from the `top_groups` of `groups` equal groups with the highest score.
        group_score: a group's score is that of its best expert (`max`) or the sum of its two best (`top2`).
        bias: whether the router has a bias.
        correction: whether a bias is added to the scores while experts are chosen (DeepSeek-V3).
        shared: the MLP that every token runs.
        shared_gate: whether the shared MLP is weighted by the sigmoid of a linear layer (Qwen2-MoE).
        in_out: the experts' weights are [in, out] instead of [out, in] (gpt-oss).
    """

    experts: int
    top_k: int
    expert: Mlp
    scores: Literal["softmax", "top_softmax", "sigmoid"] = "softmax"
    normalized: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    bias: bool = False
    correction: bool = False
    shared: Mlp | None = None
    shared_gate: bool = False
    in_out: bool = False


Placement = Literal["pre", "post", "post_residual", "sandwich", "parallel", "parallel_shared"]
NORMS: dict[Placement, tuple[str, ...]] = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "parallel": ("input_layernorm", "post_attention_layernorm"),
    "parallel_shared": ("input_layernorm",),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "post_residual": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""Names of a block's norms by placement, as transformers names them in Llama, OLMo 2 and Gemma 2."""


@dataclass(frozen=True)
class Block:
    """One layer of a decoder.

    Attributes:
        attention: how tokens see each other.
        mlp: what each token runs alone.
        norm: the kind of all norms of the block.
        placement: where the norms stand.
            `pre`: x += attention(n1(x)); x += mlp(n2(x)) (GPT-2, Llama).
            `post`: x += n1(attention(x)); x += n2(mlp(x)) (OLMo 2).
            `post_residual`: x = n1(x + attention(x)); x = n2(x + mlp(x)) (the original Transformer, OPT-350M).
            `sandwich`: x += n2(attention(n1(x))); x += n4(mlp(n3(x))) (Gemma 2).
            `parallel`: x += attention(n1(x)) + mlp(n2(x)) (GPT-NeoX).
            `parallel_shared`: x += attention(n1(x)) + mlp(n1(x)) (GPT-J).
        residual_scale: factor of what attention and MLP add to the stream (Granite).
        normed_residual: with `pre`, sums start from the norms: x = n1(x) + attention(n1(x)) (an option of BLOOM).
    """

    attention: SelfAttention | LatentAttention
    mlp: Mlp | Moe
    norm: Norm
    placement: Placement = "pre"
    residual_scale: float = 1.0
    normed_residual: bool = False

    @property
    def inner(self) -> Mlp:
        """The MLP, or that of each expert."""
        return self.mlp.expert if isinstance(self.mlp, Moe) else self.mlp


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Attributes:
        blocks: the layers, first to last.
        norm: the norm before the head; None where the last block ends with one.
        learned_positions: whether learned vectors of the positions are added to the embedding.
        linear_in_out: linear weights are [in, out] (GPT-2's Conv1D) instead of [out, in].
        embed_size: width of the embedding; where it is not `hidden_size`, linear layers stand between (OPT-350M).
        embed_scale: factor of the embedding.
        embed_norm: norm of the embedding (BLOOM).
        head_bias: whether the head has a bias.
        logit_scale: factor of the logits.
        logit_softcap: logits l become softcap x tanh(l / softcap).
        eos_token_ids: ids that end a text; may be empty.
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    blocks: tuple[Block, ...]
    norm: Norm | None
    tie_word_embeddings: bool
    learned_positions: bool = False
    linear_in_out: bool = False
    embed_size: int | None = None
    embed_scale: float = 1.0
    embed_norm: Norm | None = None
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            _check_size(self.family, name, getattr(self, name))
        for block in self.kinds():
            _check_block(self.family, block)

    def kinds(self) -> Iterator[Block]:
        """The blocks; one that layers share comes once."""
        yield from {id(block): block for block in self.blocks}.values()

    @property
    def width(self) -> int:
        """Channels of the embedding."""
        return self.embed_size or self.hidden_size

    @property
    def ropes(self) -> list[Rope]:
        """The different rotations of the layers, in their order."""
        found: list[Rope] = []
        for block in self.kinds():
            rope = block.attention.rope
            if rope is not None and rope not in found:
                found.append(rope)
        return found

    def to_json(self) -> dict[str, Any]:
        """The entry `model` of onnxtools.json, in Hugging Face's names.

        The sizes are those of the first block; `blocks` is added where blocks differ, or have more than these say.
        """
        block, attention = self.blocks[0], self.blocks[0].attention
        mlp = block.inner
        said = {
            "family": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": len(self.blocks),
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "intermediate_size": mlp.size,
            "max_position_embeddings": self.max_position_embeddings,
            "norm": block.norm.kind,
            "norm_eps": block.norm.eps,
            "activation": mlp.activation,
            "gated_mlp": mlp.gated,
            "rope": _changed(attention.rope, ("dim", "theta", "kind", "scaling", "factors"))
            if attention.rope
            else None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_scale": attention.scale,
            "attention_bias": attention.bias,
            "output_bias": attention.output_bias,
            "mlp_bias": mlp.bias,
            "norm_bias": block.norm.bias,
            "linear_in_out": self.linear_in_out,
        }
        if attention.window is not None:
            said["sliding_window"] = attention.window
        more = ("embed_size", "embed_scale", "embed_norm", "head_bias", "logit_scale", "logit_softcap")
        said |= {name: value for name, value in _changed(self).items() if name in more}
        if any(other != block for other in self.blocks) or not _is_flat(block):
            said["blocks"] = [_changed(other) for other in self.blocks]
        return said

    def tokens_json(self) -> dict[str, Any]:
        """The entry `tokens` of onnxtools.json."""
        return {
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": self.eos_token_ids,
            "pad_token_id": self.pad_token_id,
        }


def _is_flat(block: Block) -> bool:
    """Whether the sizes in `to_json` say all of `block`."""
    a, mlp = block.attention, block.mlp
    if not isinstance(a, SelfAttention) or not isinstance(mlp, Mlp):
        return False
    attention = SelfAttention(a.heads, a.kv_heads, a.head_dim, a.scale, a.rope, a.bias, a.output_bias, a.window)
    plain = Mlp(mlp.size, mlp.activation, mlp.gated, mlp.bias)
    return block == Block(attention, plain, Norm(block.norm.kind, block.norm.eps, block.norm.bias))


def _changed(value: Any, always: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass that have no default, or another value than it, and those named `always`."""
    said: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        found = getattr(value, field.name)
        if field.name in always or field.default is dataclasses.MISSING or found != field.default:
            said[field.name] = _changed(found) if dataclasses.is_dataclass(found) else found
    return said


def adapted(
    config: DecoderConfig,
    *,
    attention: Mapping[str, Any] | LatentAttention | None = None,
    mlp: Mapping[str, Any] | Moe | None = None,
    **block: Any,
) -> DecoderConfig:
    """`config` with another attention or MLP in every block, or other values of them, or of the block itself."""

    def changed(old: Any, new: Any) -> Any:
        return dataclasses.replace(old, **(new or {})) if new is None or isinstance(new, Mapping) else new

    blocks = {
        id(old): dataclasses.replace(
            old, attention=changed(old.attention, attention), mlp=changed(old.mlp, mlp), **block
        )
        for old in config.kinds()
    }
    return dataclasses.replace(config, blocks=tuple(blocks[id(old)] for old in config.blocks))


def by_layer(config: DecoderConfig, attentions: Sequence[Mapping[str, Any]]) -> DecoderConfig:
    """`config` with values of each layer's attention; equal layers share a block."""
    blocks: list[Block] = []
    for old, values in zip(config.blocks, attentions, strict=True):
        new = dataclasses.replace(old, attention=dataclasses.replace(old.attention, **values))
        blocks.append(next((block for block in blocks if block == new), new))
    return dataclasses.replace(config, blocks=tuple(blocks))


def repeated(family: str, block: Block, layers: int) -> tuple[Block, ...]:
    """The same block `layers` times.

    Raises:
        ModelError: `layers` is not an integer in the supported range.
    """
    _check_size(family, "num_hidden_layers", layers)
    return (block,) * layers


def _check_size(family: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST[name]:
        raise ModelError(f"{family}: {name} is {shown(value)}; it must be an integer of 1 to {_LARGEST[name]}")


def _check_block(family: str, block: Block) -> None:
    attention, mlp = block.attention, block.mlp
    sizes = {
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": block.inner.size,
        **({"num_experts": mlp.experts} if isinstance(mlp, Moe) else {}),
        **({"sliding_window": attention.window} if attention.window is not None else {}),
    }
    for name, value in sizes.items():
        _check_size(family, name, value)
    if attention.heads % attention.kv_heads:
        raise ModelError(
            f"{family}: {attention.heads} heads do not divide into {attention.kv_heads} key/value heads; check the "
            "configuration"
        )
    rope = attention.rope
    if rope is not None and (rope.dim % 2 or not 0 < rope.dim <= attention.head_dim):
        raise ModelError(
            f"{family}: {rope.dim} of {attention.head_dim} channels of a head are rotated; it must be an even number "
            "of them"
        )
    if isinstance(mlp, Moe):
        _check_moe(family, mlp)


def _check_moe(family: str, moe: Moe) -> None:
    alone = moe.groups > 1 and moe.group_score == "top2" and moe.experts // moe.groups < 2
    if moe.groups < 1 or moe.experts % moe.groups or not 1 <= moe.top_groups <= moe.groups or alone:
        raise ModelError(
            f"{family}: {moe.top_groups} of {moe.groups} groups are chosen of {moe.experts} experts; check the "
            "configuration"
        )
    if not 1 <= moe.top_k <= moe.experts // moe.groups * moe.top_groups:
        raise ModelError(f"{family}: {moe.top_k} of {moe.experts} experts are chosen; check the configuration")
