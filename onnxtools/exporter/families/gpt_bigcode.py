"""GPTBigCode (Hugging Face `gpt_bigcode`: SantaCoder, StarCoder).

It is GPT-2 with multi-query attention and Linear weights [out, in].
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, SelfAttention, flag, repeated
from onnxtools.exporter.families import gpt2
from onnxtools.exporter.family import Family, Source
from onnxtools.storage.lazy import Tensor, pick_rows, row_range


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    base = gpt2.config({"activation_function": "gelu_pytorch_tanh", **raw}, "gpt_bigcode")
    block = base.blocks[0]
    if flag(raw, "gpt_bigcode", "multi_query", True):
        block = replace(block, attention=replace(block.attention, kv_heads=1))
    return replace(base, blocks=repeated("gpt_bigcode", block, len(base.blocks)), linear_in_out=False)


def weights(c: DecoderConfig, source: Source) -> dict[str, Tensor]:
    """The weights by canonical name; the fused QKV weight is split by rows."""
    h, kv, inner = c.hidden_size, c.blocks[0].attention.kv_size, c.blocks[0].mlp.size
    tensors = {
        "model.embed_tokens.weight": source.take("transformer.wte.weight", c.vocab_size, h),
        "model.embed_positions.weight": source.take("transformer.wpe.weight", c.max_position_embeddings, h),
    }
    tensors |= source.head(c, "lm_head.weight", tensors["model.embed_tokens.weight"])
    parts = [
        ("self_attn.o_proj", "attn.c_proj", h, h),
        ("mlp.up_proj", "mlp.c_fc", inner, h),
        ("mlp.down_proj", "mlp.c_proj", h, inner),
    ]
    norms = [("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")]
    for n in range(len(c.blocks)):
        to, of = f"model.layers.{n}", f"transformer.h.{n}"
        for kind, shape in (("weight", (h + 2 * kv, h)), ("bias", (h + 2 * kv,))):
            fused = source.take(f"{of}.attn.c_attn.{kind}", *shape)
            for name, part in zip("qkv", _split(fused, c.blocks[n].attention), strict=True):
                tensors[f"{to}.self_attn.{name}_proj.{kind}"] = part
        for name, theirs, outputs, inputs in parts:
            tensors[f"{to}.{name}.weight"] = source.take(f"{of}.{theirs}.weight", outputs, inputs)
            tensors[f"{to}.{name}.bias"] = source.take(f"{of}.{theirs}.bias", outputs)
        for name, theirs in norms:
            tensors |= {f"{to}.{name}.{kind}": source.take(f"{of}.{theirs}.{kind}", h) for kind in ("weight", "bias")}
    return tensors | {f"model.norm.{kind}": source.take(f"transformer.ln_f.{kind}", h) for kind in ("weight", "bias")}


def _split(fused: Tensor, c: SelfAttention) -> list[Tensor]:
    """Queries, keys and values of a fused tensor.

    Its rows are all queries, the key head and the value head (multi-query), or [heads, 3, head_dim] (multi-head).
    """
    if c.kv_heads == 1 and c.heads > 1:
        ends = (0, c.q_size, c.q_size + c.kv_size, c.q_size + 2 * c.kv_size)
        return [row_range(fused, start, stop) for start, stop in itertools.pairwise(ends)]
    d = c.head_dim
    return [
        pick_rows(fused, [((3 * head + i) * d, (3 * head + i + 1) * d) for head in range(c.heads)], "qkv"[i])
        for i in range(3)
    ]


FAMILY = Family(
    "gpt_bigcode", ("gpt_bigcode",), config, weights, ignored=("*.attn.bias", "*.attn.masked_bias"),
    example={"model_type": "gpt_bigcode", "vocab_size": 49280, "n_embd": 2048, "n_layer": 24, "n_head": 16,
        "n_positions": 2048},
)  # fmt: skip
