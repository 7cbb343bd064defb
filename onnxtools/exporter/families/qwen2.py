"""Qwen2 (Hugging Face `qwen2`, also Qwen2.5): Llama with biases on queries, keys and values, windows in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.exporter.config import DecoderConfig, flag, windowed, windows_of
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, **raw}
    base = llama.config({**raw, "attention_bias": None}, "qwen2", windows=True)
    block = base.blocks[0]
    block = replace(block, attention=replace(block.attention, bias=True))
    first = raw["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ModelError(f"qwen2: max_window_layers is {shown(first)}; it must be an integer of 0 or more")
    slides = flag(raw, "qwen2", "use_sliding_window", False) and raw["sliding_window"] is not None
    kinds = ["sliding_attention" if slides and n >= first else "full_attention" for n in range(len(base.blocks))]
    return replace(base, blocks=windowed(block, windows_of(raw, "qwen2", kinds)))


FAMILY = Family(
    "qwen2", ("qwen2",), config, llama.weights, ignored=("*.rotary_emb.inv_freq",),
    example={
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
)  # fmt: skip
