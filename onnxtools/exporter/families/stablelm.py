"""StableLM (Hugging Face `stablelm`): LayerNorm, a rotated quarter of each head, SwiGLU, parallel residual or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, Norm, QkNorm, SelfAttention, adapted
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family, Source
from onnxtools.exporter.settings import flag, number
from onnxtools.storage.lazy import Tensor, folded, vstack


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"max_position_embeddings": 4096, **raw, "head_dim": None, "attention_bias": None}
    norm = Norm("layer_norm", number(raw, "stablelm", "layer_norm_eps", default=1e-5), bias=True)
    per_head = QkNorm(replace(norm, bias=False), "heads") if flag(raw, "stablelm", "qk_layernorm", False) else None
    return replace(
        adapted(
            llama.config(raw, "stablelm", 0.25),
            attention={"bias": flag(raw, "stablelm", "use_qkv_bias", False), "qk_norm": per_head},
            norm=norm,
            placement="parallel_shared" if flag(raw, "stablelm", "use_parallel_residual", False) else "pre",
        ),
        norm=norm,
    )


def weights(c: DecoderConfig, source: Source) -> dict[str, Tensor]:
    """The weights by canonical name; the norms of single heads are joined."""
    own: dict[str, Tensor] = {}
    for n, block in enumerate(c.blocks):
        a = block.attention
        if not isinstance(a, SelfAttention) or a.qk_norm is None:
            continue
        for part, heads in (("q", a.heads), ("k", a.kv_heads)):
            name = f"model.layers.{n}.self_attn.{part}_layernorm.norms"
            gains = [source.take(f"{name}.{head}.weight", a.head_dim) for head in range(heads)]
            own[f"model.layers.{n}.self_attn.{part}_norm.weight"] = folded(vstack(gains, name), heads)
    return llama.NAMES.read(c, source, own)


FAMILY = Family(
    "stablelm", ("stablelm",), config, weights, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "stablelm", "vocab_size": 100352, "hidden_size": 2048, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 5632,
        "max_position_embeddings": 4096, "use_qkv_bias": True,
    },
)  # fmt: skip
