"""EXAONE 4 (Hugging Face `exaone4`): OLMo 2 with norms of each head, windows, and no rotation where all is seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.exporter.config import DecoderConfig, QkNorm, adapted, by_layer
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.settings import integer, windows_of


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4, **raw, "attention_bias": None}
    base = llama.config(raw, "exaone4", windows=True)
    layers = len(base.blocks)
    rope, hybrid = base.blocks[0].attention.rope, raw["sliding_window"] is not None
    windows = windows_of(raw, "exaone4", _kinds(raw, layers) if hybrid else ["full_attention"] * layers)
    base = adapted(base, attention={"qk_norm": QkNorm(base.blocks[0].norm)}, placement="post")
    rotated = [not hybrid or window is not None for window in windows]
    return by_layer(base, [{"window": windows[n], "rope": rope if rotated[n] else None} for n in range(layers)])


def _kinds(raw: Mapping[str, Any], layers: int) -> list[str]:
    """The attention of each layer by `sliding_window_pattern`: 4 or "LLLG" is three windows and a full layer."""
    pattern = raw["sliding_window_pattern"]
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        kinds = ["sliding_attention" if pattern[n % len(pattern)] == "L" else "full_attention" for n in range(layers)]
        return [*kinds[:-1], "full_attention"]
    every = integer(raw, "exaone4", "sliding_window_pattern", default=4)
    return ["full_attention" if (n + 1) % every == 0 else "sliding_attention" for n in range(layers)]


FAMILY = Family(
    "exaone4", ("exaone4",), config, llama.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "exaone4", "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 30,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 4096, "sliding_window": None,
        "max_position_embeddings": 65536, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
)  # fmt: skip
