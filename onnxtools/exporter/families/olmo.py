"""OLMo (Hugging Face `olmo`): Llama with LayerNorms without weights, and limited queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, Norm, adapted
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.settings import number


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    norm = Norm("layer_norm", 1e-5, gain=False)
    clip = None if raw.get("clip_qkv") is None else number(raw, "olmo", "clip_qkv")
    return replace(adapted(llama.config(raw, "olmo"), attention={"clip": clip}, norm=norm), norm=norm)


FAMILY = Family(
    "olmo", ("olmo",), config, llama.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "olmo", "vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 8192,
        "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
)  # fmt: skip
