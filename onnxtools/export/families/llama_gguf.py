"""Llama from GGUF (llama.cpp): other names, and queries and keys in neighbouring rotary pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxtools.errors import ModelError
from onnxtools.export.config import DecoderConfig, head_dim_of, need, weight_shapes
from onnxtools.export.family import Family, Source
from onnxtools.export.rope import Rope
from onnxtools.weights import Tensor, half_rotation

_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Canonical part of a layer to GGUF's (gguf-py, constants.py, TENSOR_NAMES)."""
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    def get(name: str, default: Any = None) -> Any:
        value = raw.get(f"llama.{name}", default)
        return value if value is not None else need(raw, "llama-gguf", f"llama.{name}")

    hidden, heads = get("embedding_length"), get("attention.head_count")
    head_dim = raw.get("llama.attention.key_length") or head_dim_of("llama-gguf", hidden, heads)
    kind = raw.get("llama.rope.scaling.type", "none")
    theta, dim = float(get("rope.freq_base", 10000.0)), int(get("rope.dimension_count", head_dim))
    if kind not in ("none", "linear"):
        raise ModelError(f"llama-gguf: the rope scaling {kind!r} is not supported; none and linear are")
    scaled = Rope(dim, theta, "linear", {"factor": float(get("rope.scaling.factor"))}) if kind == "linear" else Rope(dim, theta)
    tokens = raw.get("tokenizer.ggml.tokens") or []
    return DecoderConfig(
        family="llama", vocab_size=raw.get("llama.vocab_size") or len(tokens), hidden_size=hidden, num_hidden_layers=get("block_count"),
        num_attention_heads=heads, num_key_value_heads=get("attention.head_count_kv", heads), head_dim=head_dim,
        intermediate_size=get("feed_forward_length"), max_position_embeddings=get("context_length"), norm="rms_norm",
        norm_eps=float(np.float32(get("attention.layer_norm_rms_epsilon"))), activation="silu", gated_mlp=True, rope=scaled,
        tie_word_embeddings="output.weight" not in raw["_tensors"], attention_scale=head_dim**-0.5,
        bos_token_id=raw.get("tokenizer.ggml.bos_token_id"), pad_token_id=raw.get("tokenizer.ggml.padding_token_id"),
        eos_token_ids=tuple(i for i in (raw.get("tokenizer.ggml.eos_token_id"),) if i is not None),
    )  # fmt: skip


def weights(c: DecoderConfig, source: Source) -> dict[str, Tensor]:
    found = {}
    for name, shape in weight_shapes(c).items():
        tensor = source.take(_their_name(name), *shape)
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        found[name] = half_rotation(tensor, heads) if heads else tensor
    return found


def _their_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    layer, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_LAYER[part]}.{kind}"


FAMILY = Family("llama-gguf", ("llama (gguf)",), config, weights)
