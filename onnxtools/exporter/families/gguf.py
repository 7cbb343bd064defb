"""GGUF files (llama.cpp) of the architectures that keep Hugging Face's rotary pairs: Qwen 2 and 3, Gemma, Phi-3.

Their metadata become the settings of a config.json, which the Hugging Face family reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.checkpoints.gguf import ROPE_FACTORS
from onnxtools.exporter.config import DecoderConfig
from onnxtools.exporter.families import gemma, gemma2, gemma3_text, phi3, qwen2, qwen3
from onnxtools.exporter.family import Family, Source
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import head_dim_of, integer
from onnxtools.storage.lazy import Tensor

_KEYS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta", "vocab_size": "vocab_size",
    "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip
"""Metadata behind the architecture's name to settings of config.json (gguf-py, constants.py, Keys)."""
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_SANDWICH = {
    **_LAYER, "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


@dataclass(frozen=True)
class _Architecture:
    """How an architecture is read.

    Attributes:
        config: makes the decoder of the settings.
        modules: canonical module of a layer to GGUF's name.
        qkv, gate_up: modules that hold fused weights.
        more: further settings from the metadata.
    """

    config: Callable[[Mapping[str, Any]], DecoderConfig]
    modules: Mapping[str, str]
    qkv: str | None = None
    gate_up: str | None = None
    more: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] = lambda metadata, settings: {}


def _gemma_scale(metadata: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Scores are scaled by the head size, in the 27B models by hidden size / heads (llama.cpp, llm_build_gemma2/3)."""
    is_27b = settings.get("num_hidden_layers") in (46, 62)
    if not is_27b:
        return {"query_pre_attn_scalar": settings.get("head_dim")}
    hidden, heads = (
        integer(settings, "gemma-gguf", "hidden_size"),
        integer(settings, "gemma-gguf", "num_attention_heads"),
    )
    return {"query_pre_attn_scalar": head_dim_of("gemma-gguf", hidden, heads)}


def _phi3_rope(metadata: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A rotated share of the head, and LongRoPE where the file has its factors."""
    family = "phi3-gguf"
    hidden, heads = integer(settings, family, "hidden_size"), integer(settings, family, "num_attention_heads")
    head_dim = head_dim_of(family, hidden, heads)
    share = {
        "partial_rotary_factor": integer(metadata, family, "phi3.rope.dimension_count", default=head_dim) / head_dim
    }
    factors = metadata.get("_rope_factors", {})
    short, long = (factors.get(name) for name in ROPE_FACTORS[1:])
    if short is None or long is None:
        return share
    longest = integer(settings, family, "max_position_embeddings")
    original = integer(metadata, family, "phi3.rope.scaling.original_context_length", default=longest)
    scaling = {"rope_type": "longrope", "short_factor": list(short), "long_factor": list(long)}
    attention = metadata.get("phi3.rope.scaling.attn_factor")
    if attention is not None:
        scaling["attention_factor"] = attention
    return {**share, "rope_scaling": scaling, "original_max_position_embeddings": original}


_ARCHITECTURES = {
    "qwen2": _Architecture(qwen2.config, _LAYER),
    "qwen3": _Architecture(qwen3.config, _LAYER),
    "gemma": _Architecture(gemma.config, _LAYER),
    "gemma2": _Architecture(gemma2.config, _SANDWICH, more=_gemma_scale),
    "gemma3": _Architecture(gemma3_text.config, _SANDWICH, more=_gemma_scale),
    "phi3": _Architecture(phi3.config, _LAYER, qkv="attn_qkv", gate_up="ffn_up", more=_phi3_rope),
}


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of GGUF metadata.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    name = raw["general.architecture"]
    settings = {theirs: raw[f"{name}.{key}"] for key, theirs in _KEYS.items() if raw.get(f"{name}.{key}") is not None}
    tokens = {theirs: raw.get(f"tokenizer.ggml.{key}") for key, theirs in _TOKENS.items()}
    settings = {"vocab_size": len(raw.get("tokenizer.ggml.tokens") or []) or None, **settings, **tokens}
    settings["tie_word_embeddings"] = "output.weight" not in raw["_tensors"]
    settings |= _scaling(raw, name)
    return _ARCHITECTURES[name].config({**settings, **_ARCHITECTURES[name].more(raw, settings)})


def _scaling(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind = raw.get(f"{name}.rope.scaling.type", "none")
    if kind in ("none", "longrope"):
        return {}
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{name} (gguf): the rope scaling {shown(kind)} is not supported; none, linear and yarn are")
    scaling = {"rope_type": kind, "factor": raw.get(f"{name}.rope.scaling.factor")}
    original = raw.get(f"{name}.rope.scaling.original_context_length")
    return {"rope_scaling": {**scaling, **({"original_max_position_embeddings": original} if original else {})}}


def weights(c: DecoderConfig, source: Source) -> dict[str, Tensor]:
    """The weights by canonical name; llama.cpp's converter has added the 1 to Gemma's gains."""
    made = _ARCHITECTURES[source.config["general.architecture"]]
    return Names("blk.{}", made.modules, _TOP, qkv=made.qkv, gate_up=made.gate_up).read(c, source)


FAMILY = Family("gguf", tuple(f"{name} (gguf)" for name in _ARCHITECTURES), config, weights, ignored=ROPE_FACTORS)
