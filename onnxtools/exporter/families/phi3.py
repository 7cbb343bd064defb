"""Phi-3, Phi-4 (Hugging Face `phi3`): Llama with fused QKV and gate-up, LongRoPE, a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.exporter.config import DecoderConfig, by_layer
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import windows_of


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "sliding_window": None,
        "rms_norm_eps": 1e-5, **raw, "attention_bias": None, "layer_types": None,
    }  # fmt: skip
    for name in ("rope_scaling", "rope_parameters"):
        scaling = raw.get(name)
        if isinstance(scaling, Mapping) and "long_factor" in scaling:  # "su" and "yarn" are older names
            raw[name] = {**scaling, "rope_type": "longrope"}
    base = llama.config(raw, "phi3", 1.0, windows=True)
    kind = "full_attention" if raw["sliding_window"] is None else "sliding_attention"
    return by_layer(base, [{"window": window} for window in windows_of(raw, "phi3", [kind] * len(base.blocks))])


NAMES = Names(qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj")

FAMILY = Family(
    "phi3", ("phi3",), config, NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "sliding_window": 2047,
    },
)  # fmt: skip
