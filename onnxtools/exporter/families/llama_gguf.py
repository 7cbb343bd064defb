"""Llama from GGUF (llama.cpp): other names, and queries and keys in neighbouring rotary pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.checkpoints.gguf import ROPE_FACTORS
from onnxtools.exporter.config import Block, DecoderConfig, Mlp, Norm, SelfAttention, repeated
from onnxtools.exporter.family import Family, Source
from onnxtools.exporter.rope import Rope, yarn_magnitude
from onnxtools.exporter.settings import head_dim_of, integer, number
from onnxtools.exporter.weight_shapes import weight_shapes
from onnxtools.storage.lazy import Tensor, half_rotation

_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Canonical name of a layer's module to GGUF's name (gguf-py, constants.py, TENSOR_NAMES)."""
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of GGUF metadata (keys `llama.*` and `tokenizer.ggml.*`).

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """

    def whole(name: str, default: int | None = None) -> int:
        return integer(raw, "llama-gguf", f"llama.{name}", default=default)

    def real(name: str, default: float | None = None) -> float:
        return number(raw, "llama-gguf", f"llama.{name}", default=default)

    hidden, heads = whole("embedding_length"), whole("attention.head_count")
    head_dim = (
        whole("attention.key_length")
        if "llama.attention.key_length" in raw
        else head_dim_of("llama-gguf", hidden, heads)
    )
    tokens = raw.get("tokenizer.ggml.tokens") or []
    attention = SelfAttention(
        heads,
        whole("attention.head_count_kv", heads),
        head_dim,
        head_dim**-0.5,
        rope=_rope(raw, whole("rope.dimension_count", head_dim), whole("context_length")),
    )
    norm = Norm("rms_norm", float(np.float32(real("attention.layer_norm_rms_epsilon"))))
    block = Block(attention, Mlp(whole("feed_forward_length"), "silu", gated=True), norm)
    return DecoderConfig(
        family="llama",
        vocab_size=whole("vocab_size", len(tokens)),
        hidden_size=hidden,
        max_position_embeddings=whole("context_length"),
        blocks=repeated("llama-gguf", block, whole("block_count")),
        norm=norm,
        tie_word_embeddings="output.weight" not in raw["_tensors"],
        bos_token_id=raw.get("tokenizer.ggml.bos_token_id"),
        pad_token_id=raw.get("tokenizer.ggml.padding_token_id"),
        eos_token_ids=tuple(i for i in (raw.get("tokenizer.ggml.eos_token_id"),) if i is not None),
    )


def _rope(raw: Mapping[str, Any], dim: int, positions: int) -> Rope:
    """The rotation as llama.cpp's load_hparams and rope_yarn read it.

    Without a type the scaling is linear, by `scaling.factor` or its older name `scale_linear`.
    """

    def real(name: str, default: float) -> float:
        return number(raw, "llama-gguf", f"llama.rope.{name}", default=default)

    kind = raw.get("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"llama-gguf: the rope scaling {shown(kind)} is not supported; none, linear and yarn are")
    for name in _OTHER_YARN:
        if real(f"scaling.{name}", 1.0) != 1 and (kind != "yarn" or name != "attn_factor"):
            raise ModelError(
                f"llama-gguf: rope.scaling.{name} is {raw[f'llama.rope.scaling.{name}']} with the scaling {kind}; only "
                "1 is supported"
            )
    theta, factors = real("freq_base", 10000.0), raw.get("_rope_factors", {}).get(ROPE_FACTORS[0], ())
    factor = number(raw, "llama-gguf", "llama.rope.scaling.factor", "llama.rope.scale_linear", default=1.0)
    if kind == "none" or factor == 1:
        return Rope(dim, theta, factors=factors)
    if kind == "linear":
        return Rope(dim, theta, "linear", {"factor": factor}, factors)
    scaling = {
        "factor": factor,
        "original_max_position_embeddings": integer(
            raw, "llama-gguf", "llama.rope.scaling.original_context_length", default=positions
        ),
        "beta_fast": real("scaling.yarn_beta_fast", 32.0),
        "beta_slow": real("scaling.yarn_beta_slow", 1.0),
        "attention_factor": real("scaling.attn_factor", 1.0) * yarn_magnitude(factor),
    }
    return Rope(dim, theta, "yarn", scaling, factors)


_OTHER_YARN = ("attn_factor", "yarn_ext_factor", "yarn_attn_factor")
"""Extra factors of llama.cpp; each must be 1, except YaRN's attn_factor."""


def weights(c: DecoderConfig, source: Source) -> dict[str, Tensor]:
    """The weights by canonical name; rows of queries and keys are reordered from neighbouring pairs to halves."""
    tensors, attention = {}, c.blocks[0].attention
    for name, shape in weight_shapes(c).items():
        tensor = source.take(_their_name(name), *shape)
        heads = {"q_proj": attention.heads, "k_proj": attention.kv_heads}.get(name.split(".")[-2])
        tensors[name] = half_rotation(tensor, heads) if heads else tensor
    return tensors


def _their_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    layer, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_LAYER[part]}.{kind}"


FAMILY = Family("llama-gguf", ("llama (gguf)",), config, weights, ignored=ROPE_FACTORS)
