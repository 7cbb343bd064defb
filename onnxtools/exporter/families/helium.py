"""Helium (Hugging Face `helium`): Llama with neighbouring channels rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.exporter.config import DecoderConfig, adapted
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"max_position_embeddings": 4096, "head_dim": 128, "rms_norm_eps": 1e-8, "rope_theta": 100000.0, **raw}
    return adapted(llama.config(raw, "helium", interleaved=True), attention={"output_bias": False})


FAMILY = Family(
    "helium", ("helium",), config, llama.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "helium", "vocab_size": 48000, "hidden_size": 2560, "num_hidden_layers": 24, "head_dim": 128,
        "num_attention_heads": 20, "num_key_value_heads": 20, "intermediate_size": 7040,
        "max_position_embeddings": 4096,
    },
)  # fmt: skip
