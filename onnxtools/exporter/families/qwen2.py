"""Qwen2 (Hugging Face `qwen2`, also Qwen2.5): Llama with biases on queries, keys and values, windows in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.exporter.config import DecoderConfig, adapted, by_layer
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.settings import flag, windows_of


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"max_position_embeddings": 32768, **raw}
    base = llama.config({**raw, "attention_bias": None}, "qwen2", windows=True)
    return adapted(sliding(base, raw, "qwen2"), attention={"bias": True})


def sliding(base: DecoderConfig, raw: Mapping[str, Any], family: str) -> DecoderConfig:
    """`base` with the windows of Qwen: in the layers from `max_window_layers` on, if `use_sliding_window`.

    Raises:
        ModelError: a setting that is damaged.
    """
    raw = {"sliding_window": 4096, "max_window_layers": 28, **raw}
    first = first_window(raw, family)
    slides = flag(raw, family, "use_sliding_window", False) and raw["sliding_window"] is not None
    kinds = ["sliding_attention" if slides and n >= first else "full_attention" for n in range(len(base.blocks))]
    return by_layer(base, [{"window": window} for window in windows_of(raw, family, kinds)])


def first_window(raw: Mapping[str, Any], family: str) -> int:
    """`max_window_layers`, an integer of 0 or more.

    Raises:
        ModelError: it is none.
    """
    first = raw["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ModelError(f"{family}: max_window_layers is {shown(first)}; it must be an integer of 0 or more")
    return first


FAMILY = Family(
    "qwen2", ("qwen2",), config, llama.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
)  # fmt: skip
