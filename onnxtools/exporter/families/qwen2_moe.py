"""Qwen1.5-MoE, Qwen2-MoE (Hugging Face `qwen2_moe`): Qwen2 with experts, one of which every token runs, weighted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.exporter.config import DecoderConfig, Mlp, Moe, adapted, by_layer
from onnxtools.exporter.families import llama, qwen2
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import flag, integer, windows_of


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"max_position_embeddings": 32768, **raw}
    base = llama.config({**raw, "attention_bias": None}, "qwen2_moe", windows=True)
    raw = {"sliding_window": 4096, "max_window_layers": 28, **raw}
    slides = flag(raw, "qwen2_moe", "use_sliding_window", False)
    first = qwen2.first_window(raw, "qwen2_moe")  # in this family the layers from here on see all
    kinds = [
        "sliding_attention" if slides and n % 2 == 0 and n < first else "full_attention"
        for n in range(len(base.blocks))
    ]
    base = by_layer(base, [{"window": window} for window in windows_of(raw, "qwen2_moe", kinds)])
    base = adapted(base, attention={"bias": flag(raw, "qwen2_moe", "qkv_bias", True)})
    return sparse(
        base, raw, "qwen2_moe", shared=integer(raw, "qwen2_moe", "shared_expert_intermediate_size", default=5632)
    )


def sparse(base: DecoderConfig, raw: Mapping[str, Any], family: str, shared: int | None = None) -> DecoderConfig:
    """`base` with experts in every `decoder_sparse_step`-th layer that is not in `mlp_only_layers`.

    Args:
        base: the decoder with its MLPs, which the other layers keep.
        raw: the content of config.json.
        family: its name, for errors.
        shared: inner width of the expert that every token runs.

    Raises:
        ModelError: a setting that is damaged.
    """
    dense = base.blocks[0].mlp
    assert isinstance(dense, Mlp)
    moe = Moe(
        integer(raw, family, "num_experts", "num_local_experts", default=60 if shared else 128),
        integer(raw, family, "num_experts_per_tok", default=4 if shared else 8),
        replace(dense, size=integer(raw, family, "moe_intermediate_size", default=1408 if shared else 768)),
        normalized=flag(raw, family, "norm_topk_prob", False),
        shared=replace(dense, size=shared) if shared else None,
        shared_gate=shared is not None,
    )
    step, without = integer(raw, family, "decoder_sparse_step", default=1), raw.get("mlp_only_layers") or []
    if not isinstance(without, list):
        raise ModelError(f"{family}: mlp_only_layers is {shown(without)}; it must be a list of layers")
    made = adapted(base, mlp=moe)
    sparse_layers = [n not in without and (n + 1) % step == 0 for n in range(len(base.blocks))]
    blocks = (made.blocks[n] if is_sparse else base.blocks[n] for n, is_sparse in enumerate(sparse_layers))
    return replace(base, blocks=tuple(blocks))


NAMES = Names(
    modules={f"mlp.shared_experts.{part}_proj": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")}
)

FAMILY = Family(
    "qwen2_moe", ("qwen2_moe",), config, NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 5632, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "max_position_embeddings": 8192,
    },
)  # fmt: skip
