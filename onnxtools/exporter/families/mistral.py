"""Mistral (Hugging Face `mistral`): Llama in which a token may see the last `sliding_window` tokens alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, windowed, windows_of
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096, **raw}
    base = llama.config(raw, "mistral", windows=True)
    kind = "full_attention" if raw["sliding_window"] is None else "sliding_attention"
    windows = windows_of(raw, "mistral", [kind] * len(base.blocks))
    return replace(base, blocks=windowed(base.blocks[0], windows))


FAMILY = Family(
    "mistral", ("mistral",), config, llama.weights, ignored=("*.rotary_emb.inv_freq",),
    example={
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "sliding_window": 4096,
    },
)  # fmt: skip
