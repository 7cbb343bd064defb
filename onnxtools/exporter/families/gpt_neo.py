"""GPT-Neo (Hugging Face `gpt_neo`): learned positions, scores without a factor, a window in every second layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.checkpoints.model_info import token_ids
from onnxtools.exporter.config import Block, DecoderConfig, Mlp, Norm, SelfAttention, by_layer, repeated
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import activation_of, check_plain, flag, head_dim_of, integer, number


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    check_plain(raw, "gpt_neo")
    hidden, heads = integer(raw, "gpt_neo", "hidden_size"), integer(raw, "gpt_neo", "num_heads")
    layers, head_dim = integer(raw, "gpt_neo", "num_layers"), head_dim_of("gpt_neo", hidden, heads)
    size = integer(raw, "gpt_neo", "intermediate_size", default=4 * hidden)
    activation = activation_of(raw, "gpt_neo", "activation_function", "gelu_new")
    norm = Norm("layer_norm", number(raw, "gpt_neo", "layer_norm_epsilon", default=1e-5), bias=True)
    block = Block(SelfAttention(heads, heads, head_dim, 1.0, output_bias=True), Mlp(size, activation, bias=True), norm)
    base = DecoderConfig(
        family="gpt_neo",
        vocab_size=integer(raw, "gpt_neo", "vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=integer(raw, "gpt_neo", "max_position_embeddings", default=2048),
        blocks=repeated("gpt_neo", block, layers),
        norm=norm,
        tie_word_embeddings=flag(raw, "gpt_neo", "tie_word_embeddings", True),
        learned_positions=True,
        **token_ids(raw),
    )
    window = integer(raw, "gpt_neo", "window_size", default=256)
    return by_layer(base, [{"window": window if kind == "local" else None} for kind in _kinds(raw, layers)])


_MOST = 1 << 12
"""Layers that a pattern may name."""


def _kinds(raw: Mapping[str, Any], layers: int) -> list[str]:
    """`global` or `local` for each layer: attention_types are [[[kinds], times], ...]."""
    types = raw.get("attention_types") or [[["global", "local"], -(-layers // 2)]]
    try:
        if any(len(pattern) * times > _MOST for pattern, times in types):
            raise ValueError("too many layers")
        kinds = [str(kind) for pattern, times in types for _ in range(times) for kind in pattern]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) < layers or not set(kinds) <= {"global", "local"}:
        raise ModelError(
            f"gpt_neo: attention_types is {shown(types)}; it must name global or local attention for {layers} layers"
        )
    return kinds[:layers]


_ATTENTION = {f"self_attn.{part}_proj": f"attn.attention.{part}_proj" for part in ("q", "k", "v")}
NAMES = Names(
    "transformer.h.{}",
    {
        **_ATTENTION, "self_attn.o_proj": "attn.attention.out_proj", "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
    },
    {
        "model.embed_tokens": "transformer.wte", "model.embed_positions": "transformer.wpe",
        "model.norm": "transformer.ln_f",
    },
    prefix="transformer.",
)  # fmt: skip

FAMILY = Family(
    "gpt_neo", ("gpt_neo",), config, NAMES.read,
    ignored=("*.attn.attention.bias", "*.attn.attention.masked_bias"),
    example={"model_type": "gpt_neo", "vocab_size": 50257, "hidden_size": 2048, "num_layers": 24, "num_heads": 16,
        "intermediate_size": 8192, "max_position_embeddings": 2048},
)  # fmt: skip
