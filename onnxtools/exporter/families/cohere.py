"""Command R (Hugging Face `cohere`): attention and MLP beside each other on one norm, scaled logits, tied head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, Norm, QkNorm, adapted
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.settings import flag, number


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": True, **raw}
    norm = Norm("layer_norm", number(raw, "cohere", "layer_norm_eps", default=1e-5))
    per_head = QkNorm(norm, "heads") if flag(raw, "cohere", "use_qk_norm", False) else None
    base = llama.config(raw, "cohere", interleaved=True)
    base = adapted(base, attention={"qk_norm": per_head}, norm=norm, placement="parallel_shared")
    return replace(base, norm=norm, logit_scale=number(raw, "cohere", "logit_scale", default=0.0625))


FAMILY = Family(
    "cohere", ("cohere",), config, llama.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "cohere", "vocab_size": 256000, "hidden_size": 8192, "num_hidden_layers": 40,
        "num_attention_heads": 64, "num_key_value_heads": 64, "intermediate_size": 22528,
        "max_position_embeddings": 8192,
    },
)  # fmt: skip
