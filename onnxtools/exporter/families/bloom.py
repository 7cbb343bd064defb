"""BLOOM (Hugging Face `bloom`): ALiBi, a norm of the embedding, fused QKV, tied head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.checkpoints.model_info import token_ids
from onnxtools.exporter.alibi import slopes
from onnxtools.exporter.config import Alibi, Block, DecoderConfig, Mlp, Norm, SelfAttention, repeated
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import check_plain, flag, head_dim_of, integer, number


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    check_plain(raw, "bloom")
    hidden = integer(raw, "bloom", "hidden_size", "n_embed")
    heads = integer(raw, "bloom", "n_head", "num_attention_heads")
    head_dim = head_dim_of("bloom", hidden, heads)
    norm = Norm("layer_norm", number(raw, "bloom", "layer_norm_epsilon", default=1e-5), bias=True)
    alibi = Alibi(slopes(heads))
    attention = SelfAttention(heads, heads, head_dim, head_dim**-0.5, bias=True, output_bias=True, alibi=alibi)
    of_norm = flag(raw, "bloom", "apply_residual_connection_post_layernorm", False)
    block = Block(attention, Mlp(4 * hidden, "gelu_tanh", bias=True), norm, normed_residual=of_norm)
    return DecoderConfig(
        family="bloom",
        vocab_size=integer(raw, "bloom", "vocab_size"),
        hidden_size=hidden,
        # ALiBi has no limit; this is the length of the training texts.
        max_position_embeddings=integer(raw, "bloom", "seq_length", "max_position_embeddings", default=2048),
        blocks=repeated("bloom", block, integer(raw, "bloom", "n_layer", "num_hidden_layers")),
        norm=norm,
        tie_word_embeddings=flag(raw, "bloom", "tie_word_embeddings", True),
        embed_norm=norm,
        **token_ids(raw),
    )


NAMES = Names(
    "transformer.h.{}",
    {
        "self_attn.o_proj": "self_attention.dense", "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    {
        "model.embed_tokens": "transformer.word_embeddings", "model.norm": "transformer.ln_f",
        "model.embed_norm": "transformer.word_embeddings_layernorm",
    },
    qkv="self_attention.query_key_value", qkv_rows="groups", prefix="transformer.",
)  # fmt: skip

FAMILY = Family(
    "bloom", ("bloom",), config, NAMES.read,
    example={"model_type": "bloom", "vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16,
        "seq_length": 2048},
)  # fmt: skip
