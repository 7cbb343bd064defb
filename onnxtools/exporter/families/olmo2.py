"""OLMo 2 (Hugging Face `olmo2`): Llama with norms behind attention and MLP, and norms of all queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.exporter.config import DecoderConfig, QkNorm, adapted
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    base = llama.config({"rms_norm_eps": 1e-5, **raw}, "olmo2")
    return adapted(base, attention={"qk_norm": QkNorm(base.blocks[0].norm, "all")}, placement="post")


FAMILY = Family(
    "olmo2", ("olmo2",), config, llama.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "olmo2", "vocab_size": 100352, "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "rope_theta": 500000.0,
    },
)  # fmt: skip
