"""Qwen3 (Hugging Face `qwen3`): Llama with a norm of each head's queries and keys, windows in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.exporter.config import DecoderConfig, QkNorm, adapted
from onnxtools.exporter.families import llama, qwen2
from onnxtools.exporter.family import Family


def config(raw: Mapping[str, Any], family: str = "qwen3") -> DecoderConfig:
    """The decoder of a Qwen3 config.json, or of a family like it.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"max_position_embeddings": 32768, "head_dim": 128, **raw}
    base = qwen2.sliding(llama.config(raw, family, windows=True), raw, family)
    return adapted(base, attention={"qk_norm": QkNorm(base.blocks[0].norm)})


FAMILY = Family(
    "qwen3", ("qwen3",), config, llama.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28, "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960, "tie_word_embeddings": True,
    },
)  # fmt: skip
