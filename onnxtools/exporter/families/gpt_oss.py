"""gpt-oss (Hugging Face `gpt_oss`): experts with clamped SwiGLU, attention sinks, a window in every second layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, Mlp, Moe, adapted, by_layer
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family, Source
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import integer, number, windows_of
from onnxtools.storage.lazy import Tensor, columns, every_row, plane

_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {
        "head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "sliding_window": 128,
        "max_position_embeddings": 131072, "attention_bias": True, **raw,
    }  # fmt: skip
    if raw.get("rope_scaling") is None and raw.get("rope_parameters") is None:
        raw["rope_scaling"] = _ROPE
    base = llama.config(raw, "gpt_oss", windows=True)
    dense = base.blocks[0].mlp
    assert isinstance(dense, Mlp)
    expert = replace(
        dense,
        activation="swiglu_clamped",
        bias=True,
        alpha=number(raw, "gpt_oss", "swiglu_alpha", default=1.702),
        limit=number(raw, "gpt_oss", "swiglu_limit", default=7.0),
    )
    moe = Moe(
        integer(raw, "gpt_oss", "num_local_experts", "num_experts", default=128),
        integer(raw, "gpt_oss", "num_experts_per_tok", "experts_per_token", default=4),
        expert,
        scores="top_softmax",
        bias=True,
        in_out=raw.get("_quant_method") != "mxfp4",
    )
    kinds = ["full_attention" if n % 2 else "sliding_attention" for n in range(len(base.blocks))]
    windows = windows_of(raw, "gpt_oss", kinds)
    return by_layer(adapted(base, attention={"sinks": True}, mlp=moe), [{"window": window} for window in windows])


def weights(c: DecoderConfig, source: Source) -> dict[str, Tensor]:
    """The weights by canonical name; experts are cut from stacks, in which gate and up take turns.

    The stacks are [experts, in, out], or [experts, out, in] where they were MXFP4.
    """
    own: dict[str, Tensor] = {}
    for n, block in enumerate(c.blocks):
        moe, name = block.mlp, f"model.layers.{n}.mlp.experts"
        assert isinstance(moe, Moe)
        experts, size, hidden = moe.experts, moe.expert.size, c.hidden_size
        wide, narrow = (hidden, 2 * size), (size, hidden)
        gate_up = source.take(f"{name}.gate_up_proj", experts, *(wide if moe.in_out else wide[::-1]))
        down = source.take(f"{name}.down_proj", experts, *(narrow if moe.in_out else narrow[::-1]))
        gate_up_bias = source.take(f"{name}.gate_up_proj_bias", experts, 2 * size)
        down_bias = source.take(f"{name}.down_proj_bias", experts, hidden)
        for e in range(experts):
            both = plane(gate_up, e)
            for part, first in (("gate", 0), ("up", 1)):
                weight = columns(both, first, 2 * size, 2) if moe.in_out else every_row(both, first, 2)
                own[f"{name}.{e}.{part}_proj.weight"] = weight
                own[f"{name}.{e}.{part}_proj.bias"] = plane(columns(gate_up_bias, first, 2 * size, 2), e)
            own[f"{name}.{e}.down_proj.weight"], own[f"{name}.{e}.down_proj.bias"] = plane(down, e), plane(down_bias, e)
    return Names(modules={"mlp.gate": "mlp.router"}).read(c, source, own)


FAMILY = Family(
    "gpt_oss", ("gpt_oss",), config, weights, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": 24, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 2880, "num_local_experts": 32,
        "num_experts_per_tok": 4, "max_position_embeddings": 131072,
    },
)  # fmt: skip
