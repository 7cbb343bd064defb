"""Nemotron (Hugging Face `nemotron`: Minitron-4B).

It has LayerNorm1p, squared ReLU, partial rotary embedding and grouped-query attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, Norm, adapted
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import activation_of, number


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    base = llama.config({"max_position_embeddings": 4096, **raw, "hidden_act": None}, "nemotron", 0.5)
    norm = Norm("layer_norm", number(raw, "nemotron", "norm_eps", default=1e-5), bias=True)
    activation = activation_of(raw, "nemotron", "hidden_act", "relu2")
    return replace(adapted(base, mlp={"gated": False, "activation": activation}, norm=norm), norm=norm)


FAMILY = Family(
    "nemotron", ("nemotron",), config, Names(plus_one=True).read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "nemotron", "vocab_size": 256000, "hidden_size": 3072, "num_hidden_layers": 32,
        "num_attention_heads": 24, "num_key_value_heads": 8,
        "intermediate_size": 9216, "max_position_embeddings": 4096, "head_dim": 128,
    },
)  # fmt: skip
