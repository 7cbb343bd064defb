"""GPT-2 (Hugging Face `gpt2`): learned positions, fused QKV, Conv1D weights [in, out], tied head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.checkpoints.model_info import token_ids
from onnxtools.exporter.config import Block, DecoderConfig, Mlp, Norm, SelfAttention, by_layer, repeated
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import activation_of, check_plain, flag, head_dim_of, integer, number


def config(raw: Mapping[str, Any], family: str = "gpt2") -> DecoderConfig:
    """The decoder of a GPT-2 config.json, or of a family like it.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    check_plain(raw, family)
    hidden, heads = integer(raw, family, "n_embd", "hidden_size"), integer(raw, family, "n_head", "num_attention_heads")
    head_dim = head_dim_of(family, hidden, heads)
    scale = head_dim**-0.5 if flag(raw, family, "scale_attn_weights", True) else 1.0
    size, activation = (
        integer(raw, family, "n_inner", default=4 * hidden),
        activation_of(raw, family, "activation_function", "gelu_new"),
    )
    norm = Norm("layer_norm", number(raw, family, "layer_norm_epsilon", default=1e-5), bias=True)
    block = Block(
        SelfAttention(heads, heads, head_dim, scale, bias=True, output_bias=True),
        Mlp(size, activation, bias=True),
        norm,
    )
    base = DecoderConfig(
        family=family,
        vocab_size=integer(raw, family, "vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=integer(raw, family, "n_positions", "max_position_embeddings"),
        blocks=repeated(family, block, integer(raw, family, "n_layer", "num_hidden_layers")),
        norm=norm,
        tie_word_embeddings=flag(raw, family, "tie_word_embeddings", True),
        learned_positions=True,
        linear_in_out=True,
        **token_ids(raw),
    )
    if not flag(raw, family, "scale_attn_by_inverse_layer_idx", False):
        return base
    return by_layer(base, [{"scale": scale / (n + 1)} for n in range(len(base.blocks))])


MODULES = {
    "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
    "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
}  # fmt: skip
TOP = {
    "model.embed_tokens": "transformer.wte", "model.embed_positions": "transformer.wpe",
    "model.norm": "transformer.ln_f",
}  # fmt: skip
BUFFERS = ("*.attn.bias", "*.attn.masked_bias")
"""Masks that older checkpoints hold."""

FAMILY = Family(
    "gpt2", ("gpt2",), config,
    Names("transformer.h.{}", MODULES, TOP, qkv="attn.c_attn", prefix="transformer.").read, ignored=BUFFERS,
    example={"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "n_positions": 1024},
)  # fmt: skip
