"""GPT-2 (Hugging Face `gpt2`): learned positions, fused QKV, Conv1D weights [in, out], tied head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.checkpoints.model_info import token_ids
from onnxtools.exporter.config import (
    Block,
    DecoderConfig,
    Mlp,
    Norm,
    SelfAttention,
    activation_of,
    check_plain,
    flag,
    head_dim_of,
    integer,
    number,
    repeated,
)
from onnxtools.exporter.family import Family, Source
from onnxtools.storage.lazy import Tensor, columns


def config(raw: Mapping[str, Any], family: str = "gpt2") -> DecoderConfig:
    """The decoder of a GPT-2 config.json, or of a family like it.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    check_plain(raw, family)
    if flag(raw, family, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError(f"{family}: scale_attn_by_inverse_layer_idx is not supported; only models without it are")
    hidden, heads = integer(raw, family, "n_embd", "hidden_size"), integer(raw, family, "n_head", "num_attention_heads")
    head_dim = head_dim_of(family, hidden, heads)
    scale = head_dim**-0.5 if flag(raw, family, "scale_attn_weights", True) else 1.0
    size, activation = (
        integer(raw, family, "n_inner", default=4 * hidden),
        activation_of(raw, family, "activation_function", "gelu_new"),
    )
    norm = Norm("layer_norm", number(raw, family, "layer_norm_epsilon", default=1e-5), bias=True)
    block = Block(
        SelfAttention(heads, heads, head_dim, scale, bias=True, output_bias=True),
        Mlp(size, activation, bias=True),
        norm,
    )
    return DecoderConfig(
        family=family,
        vocab_size=integer(raw, family, "vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=integer(raw, family, "n_positions", "max_position_embeddings"),
        blocks=repeated(family, block, integer(raw, family, "n_layer", "num_hidden_layers")),
        norm=norm,
        tie_word_embeddings=flag(raw, family, "tie_word_embeddings", True),
        linear_in_out=True,
        **token_ids(raw),
    )


def weights(c: DecoderConfig, source: Source) -> dict[str, Tensor]:
    """The weights by canonical name; the fused QKV weight is split by columns."""
    # A saved GPT2Model has names without the prefix that GPT2LMHeadModel adds.
    root = "transformer." if "transformer.wte.weight" in source else ""
    h, inner = c.hidden_size, c.blocks[0].mlp.size
    tensors = {
        "model.embed_tokens.weight": source.take(f"{root}wte.weight", c.vocab_size, h),
        "model.embed_positions.weight": source.take(f"{root}wpe.weight", c.max_position_embeddings, h),
    }
    tensors |= source.head(c, "lm_head.weight", tensors["model.embed_tokens.weight"])
    parts = [
        ("self_attn.o_proj", "attn.c_proj", h, h),
        ("mlp.up_proj", "mlp.c_fc", h, inner),
        ("mlp.down_proj", "mlp.c_proj", inner, h),
    ]
    for n in range(len(c.blocks)):
        to, of = f"model.layers.{n}", f"{root}h.{n}"
        qkv = {
            "weight": source.take(f"{of}.attn.c_attn.weight", h, 3 * h),
            "bias": source.take(f"{of}.attn.c_attn.bias", 3 * h),
        }
        for index, name in enumerate("qkv"):
            for kind, tensor in qkv.items():
                tensors[f"{to}.self_attn.{name}_proj.{kind}"] = columns(tensor, index * h, (index + 1) * h)
        for name, theirs, inputs, outputs in parts:
            tensors[f"{to}.{name}.weight"] = source.take(f"{of}.{theirs}.weight", inputs, outputs)
            tensors[f"{to}.{name}.bias"] = source.take(f"{of}.{theirs}.bias", outputs)
        tensors |= _norm(source, f"{to}.input_layernorm", f"{of}.ln_1", h) | _norm(
            source, f"{to}.post_attention_layernorm", f"{of}.ln_2", h
        )
    return tensors | _norm(source, "model.norm", f"{root}ln_f", h)


def _norm(source: Source, name: str, theirs: str, size: int) -> dict[str, Tensor]:
    return {f"{name}.{kind}": source.take(f"{theirs}.{kind}", size) for kind in ("weight", "bias")}


FAMILY = Family(
    "gpt2", ("gpt2",), config, weights, ignored=("*.attn.bias", "*.attn.masked_bias"),
    example={"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "n_positions": 1024},
)  # fmt: skip
