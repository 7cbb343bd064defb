"""GLM-4-0414 (Hugging Face `glm4`): GLM-4 with norms before and behind attention and MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.exporter.config import DecoderConfig, adapted
from onnxtools.exporter.families import glm, llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    return adapted(glm.config(raw, "glm4"), placement="sandwich")


NAMES = Names(
    modules={
        "post_attention_layernorm": "post_self_attn_layernorm", "pre_feedforward_layernorm": "post_attention_layernorm",
        "post_feedforward_layernorm": "post_mlp_layernorm",
    },
    gate_up="mlp.gate_up_proj",
)  # fmt: skip

FAMILY = Family(
    "glm4", ("glm4",), config, NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "glm4", "vocab_size": 151552, "hidden_size": 4096, "num_hidden_layers": 40, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 2, "intermediate_size": 13696,
        "max_position_embeddings": 32768,
    },
)  # fmt: skip
