"""DeepSeek-V3, R1 (Hugging Face `deepseek_v3`): DeepSeek-V2 with sigmoid scores and a correction of the choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.exporter.config import DecoderConfig, Mlp, Moe
from onnxtools.exporter.families import deepseek_v2, llama
from onnxtools.exporter.family import Family, Source
from onnxtools.exporter.settings import flag, integer, number
from onnxtools.storage.lazy import Tensor


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {
        "n_shared_experts": 1, "first_k_dense_replace": 3, "q_lora_rank": 1536, "moe_intermediate_size": 2048,
        "max_position_embeddings": 4096, **raw,
    }  # fmt: skip
    base = deepseek_v2.latent(raw, "deepseek_v3", interleaved=flag(raw, "deepseek_v3", "rope_interleave", True))
    expert = base.blocks[0].mlp
    assert isinstance(expert, Mlp)
    moe = Moe(
        integer(raw, "deepseek_v3", "n_routed_experts", "num_local_experts", default=256),
        integer(raw, "deepseek_v3", "num_experts_per_tok", default=8),
        expert,
        scores="sigmoid",
        normalized=flag(raw, "deepseek_v3", "norm_topk_prob", True),
        scale=number(raw, "deepseek_v3", "routed_scaling_factor", default=2.5),
        groups=integer(raw, "deepseek_v3", "n_group", default=8),
        top_groups=integer(raw, "deepseek_v3", "topk_group", default=4),
        group_score="top2",
        correction=True,
    )
    return deepseek_v2.mixed(base, raw, moe)


def weights(c: DecoderConfig, source: Source) -> dict[str, Tensor]:
    """The weights by canonical name; those of the layers that guess further tokens are left out."""
    for name in source.tensors:
        layer = name.removeprefix("model.layers.").partition(".")[0]
        if layer.isdigit() and int(layer) >= len(c.blocks):
            source.skip(name)
    return llama.NAMES.read(c, source)


FAMILY = Family(
    "deepseek_v3", ("deepseek_v3",), config, weights, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61,
        "num_attention_heads": 128, "intermediate_size": 18432, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "max_position_embeddings": 4096,
    },
)  # fmt: skip
