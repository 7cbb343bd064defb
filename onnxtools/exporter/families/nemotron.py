"""Nemotron (Hugging Face `nemotron`: Minitron-4B).

It has LayerNorm1p, squared ReLU, partial rotary embedding and grouped-query attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, Norm, activation_of, number, repeated
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family, Source
from onnxtools.storage.lazy import Tensor, plus_one


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    base = llama.config({"max_position_embeddings": 4096, **raw, "hidden_act": None}, "nemotron", 0.5)
    norm = Norm("layer_norm", number(raw, "nemotron", "norm_eps", default=1e-5), bias=True)
    block = base.blocks[0]
    mlp = replace(block.mlp, gated=False, activation=activation_of(raw, "nemotron", "hidden_act", "relu2"))
    return replace(base, norm=norm, blocks=repeated("nemotron", replace(block, mlp=mlp, norm=norm), len(base.blocks)))


def weights(c: DecoderConfig, source: Source) -> dict[str, Tensor]:
    """The weights by canonical name, as of Llama; the checkpoint stores the gains of norms minus one."""
    tensors = llama.weights(c, source)
    return {name: plus_one(tensor) if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()}


FAMILY = Family(
    "nemotron", ("nemotron",), config, weights, ignored=("*.rotary_emb.inv_freq",),
    example={
        "model_type": "nemotron", "vocab_size": 256000, "hidden_size": 3072, "num_hidden_layers": 32,
        "num_attention_heads": 24, "num_key_value_heads": 8,
        "intermediate_size": 9216, "max_position_embeddings": 4096, "head_dim": 128,
    },
)  # fmt: skip
