"""Granite (Hugging Face `granite`): Llama with factors of embedding, scores, residual sums and logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, adapted
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.settings import number


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    base = llama.config(raw, "granite")

    def factor(name: str) -> float:
        return number(raw, "granite", name, default=1.0)

    return replace(
        adapted(
            base,
            attention={"scale": factor("attention_multiplier")},
            residual_scale=factor("residual_multiplier"),
        ),
        embed_scale=factor("embedding_multiplier"),
        logit_scale=1 / factor("logits_scaling"),
    )


FAMILY = Family(
    "granite", ("granite",), config, llama.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "granite", "vocab_size": 49155, "hidden_size": 2048, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0,
    },
)  # fmt: skip
