"""GPTBigCode (Hugging Face `gpt_bigcode`: SantaCoder, StarCoder).

It is GPT-2 with multi-query attention and Linear weights [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, adapted
from onnxtools.exporter.families import gpt2
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import flag


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    # transformers does not scale by layer in this family.
    raw = {"activation_function": "gelu_pytorch_tanh", **raw, "scale_attn_by_inverse_layer_idx": None}
    base = gpt2.config(raw, "gpt_bigcode")
    shared = {"kv_heads": 1} if flag(raw, "gpt_bigcode", "multi_query", True) else {}
    return replace(adapted(base, attention=shared), linear_in_out=False)


# One key/value head, or one for each query head: in both, rows are groups of queries with their key and value.
NAMES = Names("transformer.h.{}", gpt2.MODULES, gpt2.TOP, qkv="attn.c_attn", qkv_rows="groups", prefix="transformer.")

FAMILY = Family(
    "gpt_bigcode", ("gpt_bigcode",), config, NAMES.read, ignored=gpt2.BUFFERS,
    example={"model_type": "gpt_bigcode", "vocab_size": 49280, "n_embd": 2048, "n_layer": 24, "n_head": 16,
        "n_positions": 2048},
)  # fmt: skip
