"""The configuration of a decoder, independent of the checkpoint format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.exporter.rope import MAX_HEAD_DIM, Rope, is_positive

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "relu2"]
"""`gelu` is the exact (erf) form, `relu2` is the square of ReLU."""

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "silu": "silu",
    "swish": "silu", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
"""Hugging Face's names of activations (transformers.activations.ACT2FN)."""


_LARGEST = {
    "vocab_size": 1 << 27, "hidden_size": 1 << 20, "num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14, "head_dim": MAX_HEAD_DIM, "intermediate_size": 1 << 24,
    "max_position_embeddings": 1 << 23,
}  # fmt: skip
"""Upper limits, far above any model: a damaged configuration must not fill the memory with names and tables."""


@dataclass(frozen=True)
class Norm:
    """A normalization over the hidden axis, computed in fp32."""

    kind: Literal["layer_norm", "rms_norm"]
    eps: float
    bias: bool = False


@dataclass(frozen=True)
class SelfAttention:
    """Causal attention with grouped keys and values.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key/value heads, a divisor of `heads`.
        head_dim: channels of a head.
        scale: the factor of q k^T.
        rope: rotation of queries and keys; None for learned positions.
        bias: whether the q/k/v projections have biases.
        output_bias: whether the output projection has a bias.
        window: tokens that a token sees, itself among them; None where it sees all before it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    bias: bool = False
    output_bias: bool = False
    window: int | None = None

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Mlp:
    """down(act(up(x))), or with `gated` down(act(gate(x)) * up(x)); `size` is the inner width."""

    size: int
    activation: Activation
    gated: bool = False
    bias: bool = False


Placement = Literal["pre", "post", "sandwich", "parallel"]
NORMS: dict[Placement, tuple[str, ...]] = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "parallel": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
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
        norm: the kind of all norms of the block.
        placement: where the norms stand.
            `pre`: x += attention(n1(x)); x += mlp(n2(x)) (GPT-2, Llama).
            `post`: x += n1(attention(x)); x += n2(mlp(x)) (OLMo 2).
            `sandwich`: x += n2(attention(n1(x))); x += n4(mlp(n3(x))) (Gemma 2).
            `parallel`: x += attention(n1(x)) + mlp(n2(x)) (GPT-NeoX).
    """

    attention: SelfAttention
    mlp: Mlp
    norm: Norm
    placement: Placement = "pre"


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Attributes:
        blocks: the layers, first to last.
        norm: the norm before the head.
        linear_in_out: linear weights are [in, out] (GPT-2's Conv1D) instead of [out, in].
        eos_token_ids: ids that end a text; may be empty.
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    blocks: tuple[Block, ...]
    norm: Norm
    tie_word_embeddings: bool
    linear_in_out: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            _check_size(self.family, name, getattr(self, name))
        for block in {id(block): block for block in self.blocks}.values():  # layers mostly share one Block
            _check_block(self.family, block)

    @property
    def rope(self) -> Rope | None:
        """The rotation of all layers; None where positions are learned."""
        return self.blocks[0].attention.rope

    def to_json(self) -> dict[str, Any]:
        """The entry `model` of onnxtools.json, in Hugging Face's names.

        The sizes are those of the first block; `blocks` is added where blocks differ or are not pre-norm.
        """
        block, attention, mlp = self.blocks[0], self.blocks[0].attention, self.blocks[0].mlp
        plain = block.placement == "pre" and all(other == block for other in self.blocks)
        return {
            "family": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": len(self.blocks),
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "intermediate_size": mlp.size,
            "max_position_embeddings": self.max_position_embeddings,
            "norm": self.norm.kind,
            "norm_eps": self.norm.eps,
            "activation": mlp.activation,
            "gated_mlp": mlp.gated,
            "rope": dataclasses.asdict(attention.rope) if attention.rope is not None else None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_scale": attention.scale,
            "attention_bias": attention.bias,
            "output_bias": attention.output_bias,
            "mlp_bias": mlp.bias,
            "norm_bias": self.norm.bias,
            "linear_in_out": self.linear_in_out,
            **({} if attention.window is None else {"sliding_window": attention.window}),
            **({} if plain else {"blocks": [dataclasses.asdict(other) for other in self.blocks]}),
        }

    def tokens_json(self) -> dict[str, Any]:
        """The entry `tokens` of onnxtools.json."""
        return {
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": self.eos_token_ids,
            "pad_token_id": self.pad_token_id,
        }


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
    attention = block.attention
    sizes = {
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": block.mlp.size,
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


def integer(config: Mapping[str, Any], family: str, *names: str, default: int | None = None) -> int:
    """The value of the first of `names` that is not null; all spellings of one setting must agree.

    Raises:
        ModelError: the value is no positive integer, two spellings differ, or there is neither a value nor a default.
    """
    values = {name: config[name] for name in names if config.get(name) is not None}
    if len({shown(value) for value in values.values()}) > 1:
        raise ModelError(
            f"{family}: {' and '.join(f'{name} is {shown(value)}' for name, value in values.items())}; they mean the "
            "same, correct one"
        )
    if not values:
        if default is None:
            raise ModelError(
                f"{family}: the configuration has no {' or '.join(names)}; fetch the checkpoint's own configuration"
            )
        return default
    name, value = next(iter(values.items()))
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{family}: {name} is {shown(value)}; it must be a positive integer")
    return value


def number(config: Mapping[str, Any], family: str, *names: str, default: float | None = None) -> float:
    """The value of the first of `names` that is not null, as a float.

    Raises:
        ModelError: the value is no positive finite number, or there is neither a value nor a default.
    """
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if not is_positive(value):
            raise ModelError(f"{family}: {name} is {shown(value)}; it must be a positive number")
        return float(value)
    if default is None:
        raise ModelError(
            f"{family}: the configuration has no {' or '.join(names)}; fetch the checkpoint's own configuration"
        )
    return default


def flag(config: Mapping[str, Any], family: str, name: str, default: bool) -> bool:
    """The boolean `name`, or `default` where it is null.

    Raises:
        ModelError: the value is no boolean; the string "false" is none.
    """
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelError(f"{family}: {name} is {shown(value)}; it must be true or false")
    return value


_REFUSED: dict[str, object] = {"add_cross_attention": True, "is_causal": False}
"""Settings of Hugging Face configurations, each with the value that makes a model of another kind."""


def check_plain(config: Mapping[str, Any], family: str, *, windows: bool = False) -> None:
    """Refuse configurations of models that are no plain causal decoder.

    Args:
        windows: the family reads sliding windows itself (`windows_of`).

    Raises:
        ModelError: stored quantization, cross-attention, or attention that is not causal.
    """
    if config.get("quantization_config"):
        raise ModelError(
            f"{family}: has a quantization_config: its weights are stored quantized, which is not supported; export "
            "the original checkpoint"
        )
    known = ("full_attention", "sliding_attention") if windows else ("full_attention",)
    kinds = config.get("layer_types") or ()
    others = [kind for kind in kinds if kind not in known] if isinstance(kinds, (list, tuple)) else [kinds]
    if others or (not windows and config.get("use_sliding_window") is True):
        raise ModelError(
            f"{family}: has layers of {shown(others[0]) if others else 'sliding_window'} attention, which is not "
            f"supported; {' and '.join(known)} {'are' if windows else 'is'}"
        )
    for name, value in _REFUSED.items():
        if config.get(name) is value:
            raise ModelError(
                f"{family}: {name} is {str(value).lower()}, which is not supported; only causal decoders are"
            )


def windows_of(config: Mapping[str, Any], family: str, kinds: Sequence[str]) -> list[int | None]:
    """The window of each layer, None where a token sees all before it.

    Args:
        kinds: `full_attention` or `sliding_attention` of each layer, where the configuration has no layer_types.

    Raises:
        ModelError: layer_types are not one for each layer, or there is no window for a sliding layer.
    """
    stated = config.get("layer_types")
    if stated is not None and (not isinstance(stated, list) or len(stated) != len(kinds)):
        raise ModelError(f"{family}: layer_types is {shown(stated)}; it names the attention of {len(kinds)} layers")
    layers = stated or kinds
    sliding = "sliding_attention" in layers
    window = integer(config, family, "sliding_window") if sliding else None
    return [window if kind == "sliding_attention" else None for kind in layers]


def windowed(block: Block, windows: Sequence[int | None]) -> tuple[Block, ...]:
    """`block` with a window for each layer; layers of one window share their block."""
    blocks = {
        window: dataclasses.replace(block, attention=dataclasses.replace(block.attention, window=window))
        for window in windows
    }
    return tuple(blocks[window] for window in windows)


def head_dim_of(family: str, hidden: Any, heads: Any) -> int:
    """hidden_size / heads.

    Raises:
        ModelError: `hidden` is not divisible by `heads`, or one of them is no integer.
    """
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise ModelError(
            f"{family}: hidden size {shown(hidden)} is not divisible by {shown(heads)} heads; check the configuration"
        )
    return hidden // heads


def need(config: Mapping[str, Any], family: str, *names: str) -> Any:
    """The value of the first of `names` that is not null.

    Raises:
        ModelError: the configuration has none of them.
    """
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise ModelError(
        f"{family}: the configuration has no {' or '.join(names)}; fetch the checkpoint's own configuration"
    )


def activation_of(config: Mapping[str, Any], family: str, name: str, default: str) -> Activation:
    """The activation that a Hugging Face configuration names, or `default`.

    Raises:
        ModelError: it is no string, or not a supported activation.
    """
    activation = default if config.get(name) is None else config[name]
    if not isinstance(activation, str):
        raise ModelError(f"{family}: {name} is {shown(activation)}; it must be the name of an activation")
    if activation not in ACTIVATIONS:
        raise ModelError(f"{family}: the activation {shown(activation)} is not supported; {', '.join(ACTIVATIONS)} are")
    return ACTIVATIONS[activation]


def weight_shapes(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the model by its canonical name (Hugging Face's names of Llama) and shape."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    if c.rope is None:
        shapes["model.embed_positions.weight"] = (c.max_position_embeddings, c.hidden_size)

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (inputs, outputs) if c.linear_in_out else (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str, kind: Norm) -> None:
        shapes[f"{name}.weight"] = (c.hidden_size,)
        if kind.bias:
            shapes[f"{name}.bias"] = (c.hidden_size,)

    for n, block in enumerate(c.blocks):
        layer, attention, mlp = f"model.layers.{n}", block.attention, block.mlp
        first, *others = NORMS[block.placement]
        norm(f"{layer}.{first}", block.norm)
        linear(f"{layer}.self_attn.q_proj", attention.q_size, c.hidden_size, attention.bias)
        linear(f"{layer}.self_attn.k_proj", attention.kv_size, c.hidden_size, attention.bias)
        linear(f"{layer}.self_attn.v_proj", attention.kv_size, c.hidden_size, attention.bias)
        linear(f"{layer}.self_attn.o_proj", c.hidden_size, attention.q_size, attention.output_bias)
        for name in others:
            norm(f"{layer}.{name}", block.norm)
        if mlp.gated:
            linear(f"{layer}.mlp.gate_proj", mlp.size, c.hidden_size, mlp.bias)
        linear(f"{layer}.mlp.up_proj", mlp.size, c.hidden_size, mlp.bias)
        linear(f"{layer}.mlp.down_proj", c.hidden_size, mlp.size, mlp.bias)
    norm("model.norm", c.norm)
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes
