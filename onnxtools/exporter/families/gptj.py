"""GPT-J (Hugging Face `gptj`): attention and MLP beside each other on one norm, neighbouring channels rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.checkpoints.model_info import token_ids
from onnxtools.exporter.config import Block, DecoderConfig, Mlp, Norm, SelfAttention, repeated
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.rope import Rope
from onnxtools.exporter.settings import activation_of, check_plain, flag, head_dim_of, integer, number


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    check_plain(raw, "gptj")
    hidden, heads = integer(raw, "gptj", "n_embd", "hidden_size"), integer(raw, "gptj", "n_head", "num_attention_heads")
    head_dim = head_dim_of("gptj", hidden, heads)
    rope = Rope(integer(raw, "gptj", "rotary_dim", default=64), 10000.0, interleaved=True)
    size = integer(raw, "gptj", "n_inner", default=4 * hidden)
    activation = activation_of(raw, "gptj", "activation_function", "gelu_new")
    norm = Norm("layer_norm", number(raw, "gptj", "layer_norm_epsilon", default=1e-5), bias=True)
    attention = SelfAttention(heads, heads, head_dim, head_dim**-0.5, rope)
    block = Block(attention, Mlp(size, activation, bias=True), norm, "parallel_shared")
    return DecoderConfig(
        family="gptj",
        vocab_size=integer(raw, "gptj", "vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=integer(raw, "gptj", "n_positions", "max_position_embeddings", default=2048),
        blocks=repeated("gptj", block, integer(raw, "gptj", "n_layer", "num_hidden_layers")),
        norm=norm,
        tie_word_embeddings=flag(raw, "gptj", "tie_word_embeddings", False),
        head_bias=True,
        **token_ids(raw),
    )


NAMES = Names(
    "transformer.h.{}",
    {
        "self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v_proj",
        "self_attn.o_proj": "attn.out_proj", "mlp.up_proj": "mlp.fc_in", "mlp.down_proj": "mlp.fc_out",
        "input_layernorm": "ln_1",
    },
    {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f"},
    prefix="transformer.",
)  # fmt: skip

FAMILY = Family(
    "gptj", ("gptj",), config, NAMES.read, ignored=("*.attn.bias", "*.attn.masked_bias", "*embed_positions"),
    example={"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16,
        "n_positions": 2048, "rotary_dim": 64},
)  # fmt: skip
