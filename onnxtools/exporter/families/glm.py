"""GLM-4 (Hugging Face `glm`): Llama with neighbouring channels of half a head rotated, fused gate-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.exporter.config import DecoderConfig, adapted
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names


def config(raw: Mapping[str, Any], family: str = "glm") -> DecoderConfig:
    """The decoder of a GLM config.json, or of a family like it.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {
        "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7,
        "attention_bias": True, **raw,
    }  # fmt: skip
    return adapted(llama.config(raw, family, 0.5, interleaved=True), attention={"output_bias": False})


FAMILY = Family(
    "glm", ("glm",), config, Names(gate_up="mlp.gate_up_proj").read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "glm", "vocab_size": 151552, "hidden_size": 4096, "num_hidden_layers": 40, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 2, "intermediate_size": 13696, "attention_bias": True,
        "max_position_embeddings": 8192,
    },
)  # fmt: skip
