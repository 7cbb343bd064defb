"""Mixtral (Hugging Face `mixtral`): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.exporter.config import DecoderConfig, Mlp, Moe, adapted
from onnxtools.exporter.families import llama, mistral
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import integer


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"rope_theta": 1000000.0, "sliding_window": None, "rms_norm_eps": 1e-5, **raw, "layer_types": None}
    base = mistral.config(raw, "mixtral")
    expert = base.blocks[0].mlp
    assert isinstance(expert, Mlp)
    experts = integer(raw, "mixtral", "num_local_experts", "num_experts", default=8)
    top_k = integer(raw, "mixtral", "num_experts_per_tok", default=2)
    return adapted(base, mlp=Moe(experts, top_k, expert, normalized=True))


NAMES = Names(
    modules={
        "mlp.gate": "block_sparse_moe.gate", "mlp.experts.{}.gate_proj": "block_sparse_moe.experts.{}.w1",
        "mlp.experts.{}.down_proj": "block_sparse_moe.experts.{}.w2",
        "mlp.experts.{}.up_proj": "block_sparse_moe.experts.{}.w3",
    },
)  # fmt: skip

FAMILY = Family(
    "mixtral", ("mixtral",), config, NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8,
        "max_position_embeddings": 32768,
    },
)  # fmt: skip
