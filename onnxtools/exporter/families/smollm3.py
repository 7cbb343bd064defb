"""SmolLM3 (Hugging Face `smollm3`): Llama in which every fourth layer has no rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.exporter.config import DecoderConfig, by_layer
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.settings import flag, integer, windows_of


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2000000.0,
        "tie_word_embeddings": True, "sliding_window": None, **raw,
    }  # fmt: skip
    base = llama.config(raw, "smollm3", windows=True)
    layers = len(base.blocks)
    every = integer(raw, "smollm3", "no_rope_layer_interval", default=4)
    rotated = raw.get("no_rope_layers") or [int((n + 1) % every != 0) for n in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers:
        raise ModelError(
            f"smollm3: no_rope_layers is {shown(rotated)}; it must have 0 or 1 for each of {layers} layers"
        )
    slides = flag(raw, "smollm3", "use_sliding_window", False) and raw["sliding_window"] is not None
    kinds = ["sliding_attention" if slides and not rotated[n] else "full_attention" for n in range(layers)]
    windows = windows_of(raw, "smollm3", kinds)
    rope = base.blocks[0].attention.rope
    return by_layer(base, [{"window": windows[n], "rope": rope if rotated[n] else None} for n in range(layers)])


FAMILY = Family(
    "smollm3", ("smollm3",), config, llama.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 11008,
        "max_position_embeddings": 65536,
    },
)  # fmt: skip
