"""What a decoder is, whatever checkpoint it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.exporter.rope import MAX_HEAD_DIM, Rope, is_positive

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "relu2"]
"""`gelu` is the exact (erf) form, `relu2` is the square of ReLU."""

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "silu": "silu", "swish": "silu",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip
"""Hugging Face's names of activations (transformers.activations.ACT2FN)."""


_LARGEST = {
    "vocab_size": 1 << 27, "hidden_size": 1 << 20, "num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14,
    "head_dim": MAX_HEAD_DIM, "intermediate_size": 1 << 24, "max_position_embeddings": 1 << 23,
}  # fmt: skip
"""Far above any model; a damaged configuration must not fill the memory with names and tables."""


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with pre-norm blocks. Names are Hugging Face's.

    Attributes:
        attention_bias, output_bias, mlp_bias, norm_bias: whether q/k/v, the attention's output, the MLP and the norms have biases.
        attention_scale: what q k^T is multiplied by.
        linear_in_out: linear weights are [in, out] (GPT-2's Conv1D) instead of [out, in].
        eos_token_ids: ids that end a text; may be empty.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    norm: Literal["layer_norm", "rms_norm"]
    norm_eps: float
    activation: Activation
    gated_mlp: bool
    rope: Rope | None
    tie_word_embeddings: bool
    attention_scale: float
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    linear_in_out: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
        for name in (*sizes, "max_position_embeddings"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST[name]:
                raise ModelError(f"{self.family}: {name} is {shown(value)}; it must be an integer of 1 to {_LARGEST[name]}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"{self.family}: {self.num_attention_heads} heads do not divide into {self.num_key_value_heads} key/value heads; check the configuration"
            )
        if self.rope is not None and (self.rope.dim % 2 or not 0 < self.rope.dim <= self.head_dim):
            raise ModelError(f"{self.family}: {self.rope.dim} of {self.head_dim} channels of a head are rotated; it must be an even number of them")

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


def integer(config: Mapping[str, Any], family: str, *names: str, default: int | None = None) -> int:
    """The first of `names` that is not null; spellings of one thing must agree.

    Raises:
        ModelError: no positive integer, two that differ, or none and no default.
    """
    found = {name: config[name] for name in names if config.get(name) is not None}
    if len({shown(value) for value in found.values()}) > 1:
        raise ModelError(f"{family}: {' and '.join(f'{name} is {shown(value)}' for name, value in found.items())}; they mean the same, correct one")
    if not found:
        if default is None:
            raise ModelError(f"{family}: the configuration has no {' or '.join(names)}; fetch the checkpoint's own configuration")
        return default
    name, value = next(iter(found.items()))
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{family}: {name} is {shown(value)}; it must be a positive integer")
    return value


def number(config: Mapping[str, Any], family: str, *names: str, default: float | None = None) -> float:
    """As `integer`, a positive finite number."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if not is_positive(value):
            raise ModelError(f"{family}: {name} is {shown(value)}; it must be a positive number")
        return float(value)
    if default is None:
        raise ModelError(f"{family}: the configuration has no {' or '.join(names)}; fetch the checkpoint's own configuration")
    return default


def flag(config: Mapping[str, Any], family: str, name: str, default: bool) -> bool:
    """True or false.

    Raises:
        ModelError: anything else; `"false"` is no boolean.
    """
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelError(f"{family}: {name} is {shown(value)}; it must be true or false")
    return value


_REFUSED: dict[str, object] = {"add_cross_attention": True, "is_causal": False}
"""Settings of Hugging Face configurations that make another model, and the value that does."""


def check_plain(config: Mapping[str, Any], family: str) -> None:
    """Raises: ModelError for stored quantization, cross-attention, or attention that is not causal."""
    if config.get("quantization_config"):
        raise ModelError(f"{family}: has a quantization_config: its weights are stored quantized, which is not supported; export the original checkpoint")
    for name, value in _REFUSED.items():
        if config.get(name) is value:
            raise ModelError(f"{family}: {name} is {str(value).lower()}, which is not supported; only causal decoders are")


def head_dim_of(family: str, hidden: Any, heads: Any) -> int:
    """hidden_size / heads, which must be whole."""
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise ModelError(f"{family}: hidden size {shown(hidden)} is not divisible by {shown(heads)} heads; check the configuration")
    return hidden // heads


def need(config: Mapping[str, Any], family: str, *names: str) -> Any:
    """The first of `names` that the configuration has.

    Raises:
        ModelError: it has none of them.
    """
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise ModelError(f"{family}: the configuration has no {' or '.join(names)}; fetch the checkpoint's own configuration")


def activation_of(config: Mapping[str, Any], family: str, name: str, default: str) -> Activation:
    """The activation that a Hugging Face configuration names."""
    wanted = default if config.get(name) is None else config[name]
    if not isinstance(wanted, str):
        raise ModelError(f"{family}: {name} is {shown(wanted)}; it must be the name of an activation")
    if wanted not in ACTIVATIONS:
        raise ModelError(f"{family}: the activation {shown(wanted)} is not supported; {', '.join(ACTIVATIONS)} are")
    return ACTIVATIONS[wanted]


def weight_shapes(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the model by its canonical name (Hugging Face's names of Llama) and shape."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    if c.rope is None:
        shapes["model.embed_positions.weight"] = (c.max_position_embeddings, c.hidden_size)

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (inputs, outputs) if c.linear_in_out else (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (c.hidden_size,)
        if c.norm_bias:
            shapes[f"{name}.bias"] = (c.hidden_size,)

    for n in range(c.num_hidden_layers):
        layer = f"model.layers.{n}"
        norm(f"{layer}.input_layernorm")
        linear(f"{layer}.self_attn.q_proj", c.q_size, c.hidden_size, c.attention_bias)
        linear(f"{layer}.self_attn.k_proj", c.kv_size, c.hidden_size, c.attention_bias)
        linear(f"{layer}.self_attn.v_proj", c.kv_size, c.hidden_size, c.attention_bias)
        linear(f"{layer}.self_attn.o_proj", c.hidden_size, c.q_size, c.output_bias)
        norm(f"{layer}.post_attention_layernorm")
        if c.gated_mlp:
            linear(f"{layer}.mlp.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias)
        linear(f"{layer}.mlp.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias)
        linear(f"{layer}.mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias)
    norm("model.norm")
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes
