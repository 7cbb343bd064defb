"""Gemma 2 (Hugging Face `gemma2`): Gemma with four norms a layer, soft caps, and a window in every second layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, adapted, by_layer
from onnxtools.exporter.families import gemma, llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.settings import number, windows_of


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    return capped({"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, **raw}, "gemma2", every=2)


def capped(raw: Mapping[str, Any], family: str, every: int) -> DecoderConfig:
    """The decoder of Gemma 2 and 3: every `every`-th layer sees all tokens.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"sliding_window": 4096, **raw}
    base = gemma.config(raw, family, windows=True)
    kinds = ["full_attention" if (n + 1) % every == 0 else "sliding_attention" for n in range(len(base.blocks))]
    scale = number(raw, family, "query_pre_attn_scalar", default=256) ** -0.5
    attention = {"scale": scale, "softcap": _cap(raw, family, "attn_logit_softcapping")}
    base = adapted(base, attention=attention, placement="sandwich")
    windows = windows_of(raw, family, kinds)
    base = by_layer(base, [{"window": window} for window in windows])
    return replace(base, logit_softcap=_cap(raw, family, "final_logit_softcapping"))


def _cap(raw: Mapping[str, Any], family: str, name: str) -> float | None:
    return None if raw.get(name) is None else number(raw, family, name)


FAMILY = Family(
    "gemma2", ("gemma2",), config, gemma.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "num_hidden_layers": 26, "head_dim": 256,
        "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 9216,
        "max_position_embeddings": 8192,
    },
)  # fmt: skip
