"""Phi-1, Phi-2 (Hugging Face `phi`): attention and MLP beside each other on one norm, biases, a head with a bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, Norm, QkNorm, adapted
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import activation_of, flag, number


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    activation = activation_of(raw, "phi", "hidden_act", "gelu_new")
    norm = Norm("layer_norm", number(raw, "phi", "layer_norm_eps", default=1e-5), bias=True)
    base = llama.config({**raw, "hidden_act": None, "attention_bias": True, "mlp_bias": True}, "phi", 0.5)
    qk_norm = QkNorm(norm) if flag(raw, "phi", "qk_layernorm", False) else None
    return replace(
        adapted(
            base,
            attention={"qk_norm": qk_norm},
            mlp={"gated": False, "activation": activation},
            norm=norm,
            placement="parallel_shared",
        ),
        norm=norm,
        head_bias=True,
    )


NAMES = Names(
    modules={
        "self_attn.o_proj": "self_attn.dense", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2",
        "self_attn.q_norm": "self_attn.q_layernorm", "self_attn.k_norm": "self_attn.k_layernorm",
    },
    top={"model.norm": "model.final_layernorm"},
)  # fmt: skip

FAMILY = Family(
    "phi", ("phi",), config, NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 32, "intermediate_size": 10240, "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.4,
    },
)  # fmt: skip
