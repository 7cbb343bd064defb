"""Mistral (Hugging Face `mistral`): Llama in which a token may see the last `sliding_window` tokens alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.exporter.config import DecoderConfig, by_layer
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.settings import windows_of


def config(raw: Mapping[str, Any], family: str = "mistral") -> DecoderConfig:
    """The decoder of a Mistral config.json, or of a family like it.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096, **raw}
    base = llama.config(raw, family, windows=True)
    kind = "full_attention" if raw["sliding_window"] is None else "sliding_attention"
    windows = windows_of(raw, family, [kind] * len(base.blocks))
    return by_layer(base, [{"window": window} for window in windows])


FAMILY = Family(
    "mistral", ("mistral",), config, llama.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "sliding_window": 4096,
    },
)  # fmt: skip
