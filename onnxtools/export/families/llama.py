"""Llama (Hugging Face `llama`): RMSNorm, rotary positions, SwiGLU, grouped-query attention. Its names are our canonical ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.export.config import DecoderConfig, activation_of, head_dim_of, need, token_ids, weight_shapes
from onnxtools.export.family import Family, Source
from onnxtools.export.rope import rope_of
from onnxtools.weights import Tensor


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    hidden, heads = need(raw, "llama", "hidden_size"), need(raw, "llama", "num_attention_heads")
    head_dim = raw.get("head_dim") or head_dim_of("llama", hidden, heads)
    bias = bool(raw.get("attention_bias", False))
    return DecoderConfig(
        family="llama", vocab_size=need(raw, "llama", "vocab_size"), hidden_size=hidden, num_hidden_layers=need(raw, "llama", "num_hidden_layers"),
        num_attention_heads=heads, num_key_value_heads=raw.get("num_key_value_heads") or heads, head_dim=head_dim,
        intermediate_size=need(raw, "llama", "intermediate_size"), max_position_embeddings=raw.get("max_position_embeddings") or 2048,
        norm="rms_norm", norm_eps=float(raw.get("rms_norm_eps") or 1e-6), activation=activation_of(raw, "llama", "hidden_act", "silu"), gated_mlp=True,
        rope=rope_of(raw, "llama", head_dim), tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)), attention_scale=head_dim**-0.5,
        attention_bias=bias, output_bias=bias, mlp_bias=bool(raw.get("mlp_bias", False)), **token_ids(raw),
    )  # fmt: skip


def weights(c: DecoderConfig, source: Source) -> dict[str, Tensor]:
    if c.tie_word_embeddings:
        source.skip("lm_head.weight")
    return {name: source.take(name, *shape) for name, shape in weight_shapes(c).items()}


FAMILY = Family(
    "llama", ("llama",), config, weights, ignored=("*.rotary_emb.inv_freq",),
    example={
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "max_position_embeddings": 4096,
    },
)  # fmt: skip
