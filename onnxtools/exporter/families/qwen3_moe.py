"""Qwen3-MoE (Hugging Face `qwen3_moe`): Qwen3 with a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.exporter.config import DecoderConfig
from onnxtools.exporter.families import llama, qwen2_moe, qwen3
from onnxtools.exporter.family import Family


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"head_dim": None, **raw, "layer_types": None}  # transformers reads none here
    # In this family max_window_layers does not limit the windows.
    return qwen2_moe.sparse(qwen3.config({**raw, "max_window_layers": 0}, "qwen3_moe"), raw, "qwen3_moe")


FAMILY = Family(
    "qwen3_moe", ("qwen3_moe",), config, llama.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
        "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0,
    },
)  # fmt: skip
