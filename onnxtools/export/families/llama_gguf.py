"""Llama from GGUF (llama.cpp): other names, and queries and keys in neighbouring rotary pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxtools.errors import ModelError
from onnxtools.export.config import DecoderConfig, head_dim_of, integer, number, weight_shapes
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
    def whole(name: str, default: int | None = None) -> int:
        return integer(raw, "llama-gguf", f"llama.{name}", default=default)

    def real(name: str, default: float | None = None) -> float:
        return number(raw, "llama-gguf", f"llama.{name}", default=default)

    hidden, heads = whole("embedding_length"), whole("attention.head_count")
    head_dim = whole("attention.key_length") if "llama.attention.key_length" in raw else head_dim_of("llama-gguf", hidden, heads)
    # llama.cpp (load_hparams): without a type the scaling is linear, by the factor or its older name.
    kind = raw.get("llama.rope.scaling.type", "linear")
    theta, dim = real("rope.freq_base", 10000.0), whole("rope.dimension_count", head_dim)
    if kind not in ("none", "linear"):
        raise ModelError(f"llama-gguf: the rope scaling {kind!r} is not supported; none and linear are")
    factor = number(raw, "llama-gguf", "llama.rope.scaling.factor", "llama.rope.scale_linear", default=1.0)
    scaled = Rope(dim, theta, "linear", {"factor": factor}) if kind == "linear" and factor != 1 else Rope(dim, theta)
    tokens = raw.get("tokenizer.ggml.tokens") or []
    return DecoderConfig(
        family="llama", vocab_size=whole("vocab_size", len(tokens)), hidden_size=hidden, num_hidden_layers=whole("block_count"),
        num_attention_heads=heads, num_key_value_heads=whole("attention.head_count_kv", heads), head_dim=head_dim,
        intermediate_size=whole("feed_forward_length"), max_position_embeddings=whole("context_length"), norm="rms_norm",
        norm_eps=float(np.float32(real("attention.layer_norm_rms_epsilon"))), activation="silu", gated_mlp=True, rope=scaled,
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
