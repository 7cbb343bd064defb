"""DeepSeek-V2 (Hugging Face `deepseek_v2`): latent attention, dense layers first, then experts with shared ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.exporter.config import DecoderConfig, LatentAttention, Mlp, Moe, Norm, adapted
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.rope import Rope, yarn_magnitude
from onnxtools.exporter.settings import integer, number

_METHODS = ("greedy", "group_limited_greedy")


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    method = raw.get("topk_method", "greedy")
    if method not in _METHODS:
        raise ModelError(f"deepseek_v2: topk_method {shown(method)} is not supported; {' and '.join(_METHODS)} are")
    raw = {"n_shared_experts": 2, "first_k_dense_replace": 0, "q_lora_rank": 1536, **raw}
    base = latent(raw, "deepseek_v2", interleaved=True)
    grouped = method == "group_limited_greedy"
    return mixed(
        base,
        raw,
        Moe(
            integer(raw, "deepseek_v2", "n_routed_experts", "num_experts", default=64),
            integer(raw, "deepseek_v2", "num_experts_per_tok"),
            _mlp(base),
            scale=number(raw, "deepseek_v2", "routed_scaling_factor", default=1.0),
            groups=integer(raw, "deepseek_v2", "n_group") if grouped else 1,
            top_groups=integer(raw, "deepseek_v2", "topk_group") if grouped else 1,
        ),
    )


def _mlp(base: DecoderConfig) -> Mlp:
    mlp = base.blocks[0].mlp
    assert isinstance(mlp, Mlp)
    return mlp


def latent(raw: Mapping[str, Any], family: str, *, interleaved: bool) -> DecoderConfig:
    """The decoder with latent attention and an MLP in every layer.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    rope_dim = integer(raw, family, "qk_rope_head_dim", default=64)
    base = llama.config({**raw, "head_dim": rope_dim, "num_key_value_heads": None}, family, interleaved=interleaved)
    plain = base.blocks[0].attention
    nope_dim = integer(raw, family, "qk_nope_head_dim", default=128)
    assert plain.rope is not None
    attention = LatentAttention(
        heads=plain.heads,
        q_rank=None if raw["q_lora_rank"] is None else integer(raw, family, "q_lora_rank"),
        kv_rank=integer(raw, family, "kv_lora_rank", default=512),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=integer(raw, family, "v_head_dim", default=128),
        scale=(nope_dim + rope_dim) ** -0.5 * _stretch(plain.rope) ** 2,
        rope=plain.rope,
        norm=Norm("rms_norm", 1e-6),  # transformers gives it no epsilon of the configuration
        bias=plain.bias,
        output_bias=plain.output_bias,
    )
    return adapted(base, attention=attention)


def _stretch(rope: Rope) -> float:
    """The factor of queries and keys by YaRN's mscale_all_dim (transformers, yarn_apply_mscale)."""
    all_dim = rope.scaling.get("mscale_all_dim")
    return yarn_magnitude(float(rope.scaling["factor"]), float(all_dim)) if rope.kind != "default" and all_dim else 1.0


def mixed(base: DecoderConfig, raw: Mapping[str, Any], moe: Moe) -> DecoderConfig:
    """`base` with `moe` in the layers from `first_k_dense_replace` on, and the sizes of its experts.

    Raises:
        ModelError: a setting that is missing or damaged.
    """
    size, dense = integer(raw, base.family, "moe_intermediate_size"), raw["first_k_dense_replace"]
    if isinstance(dense, bool) or not isinstance(dense, int) or dense < 0:
        raise ModelError(f"{base.family}: first_k_dense_replace is {shown(dense)}; it must be an integer of 0 or more")
    shared = size * integer(raw, base.family, "n_shared_experts")
    moe = replace(moe, expert=replace(moe.expert, size=size, bias=False), shared=replace(moe.expert, size=shared))
    return replace(base, blocks=(*base.blocks[:dense], *adapted(base, mlp=moe).blocks[dense:]))


FAMILY = Family(
    "deepseek_v2", ("deepseek_v2",), config, llama.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27,
        "num_attention_heads": 16, "intermediate_size": 10944, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408, "q_lora_rank": None, "first_k_dense_replace": 1,
        "max_position_embeddings": 32768,
    },
)  # fmt: skip
