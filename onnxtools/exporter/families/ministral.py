"""Ministral (Hugging Face `ministral`: Ministral-8B): Mistral whose layers may differ in their windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.exporter.config import DecoderConfig
from onnxtools.exporter.families import llama, mistral
from onnxtools.exporter.family import Family


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    return mistral.config(raw, "ministral")


FAMILY = Family(
    "ministral", ("ministral",), config, llama.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "ministral", "vocab_size": 131072, "hidden_size": 4096, "num_hidden_layers": 36, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12288,
        "max_position_embeddings": 32768, "sliding_window": 32768, "rope_theta": 100000000.0,
    },
)  # fmt: skip
