"""GPT-NeoX (Hugging Face `gpt_neox`, Pythia): parallel residual, a rotated quarter of each head, fused QKV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, Norm, adapted
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import activation_of, flag, number


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    older = {"partial_rotary_factor": raw.get("rotary_pct"), "rope_theta": raw.get("rotary_emb_base")}
    raw = {"attention_bias": True, **raw, **{k: v for k, v in older.items() if v is not None}, "head_dim": None}
    activation = activation_of(raw, "gpt_neox", "hidden_act", "gelu")
    norm = Norm("layer_norm", number(raw, "gpt_neox", "layer_norm_eps", default=1e-5), bias=True)
    base = llama.config({**raw, "hidden_act": None, "mlp_bias": True, "num_key_value_heads": None}, "gpt_neox", 0.25)
    return replace(
        adapted(
            base,
            mlp={"gated": False, "activation": activation},
            norm=norm,
            placement="parallel" if flag(raw, "gpt_neox", "use_parallel_residual", True) else "pre",
        ),
        norm=norm,
    )


NAMES = Names(
    "gpt_neox.layers.{}",
    {
        "self_attn.o_proj": "attention.dense", "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    {"model.embed_tokens": "gpt_neox.embed_in", "model.norm": "gpt_neox.final_layer_norm", "lm_head": "embed_out"},
    qkv="attention.query_key_value", qkv_rows="groups", prefix="gpt_neox.",
)  # fmt: skip

FAMILY = Family(
    "gpt_neox", ("gpt_neox",), config, NAMES.read,
    ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
    example={
        "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 8, "intermediate_size": 8192, "max_position_embeddings": 2048,
    },
)  # fmt: skip
