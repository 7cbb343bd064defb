"""Llama (Hugging Face `llama`): RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Its weight names are the canonical ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.checkpoints.model_info import token_ids
from onnxtools.exporter.config import Block, DecoderConfig, Mlp, Norm, SelfAttention, repeated
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.rope import rope_of
from onnxtools.exporter.settings import activation_of, check_plain, flag, head_dim_of, integer, number


def config(
    raw: Mapping[str, Any],
    family: str = "llama",
    partial: float | None = None,
    *,
    windows: bool = False,
    interleaved: bool = False,
) -> DecoderConfig:
    """The decoder of a Llama config.json, or of a family like it.

    Args:
        raw: the content of config.json.
        family: its name, for errors and onnxtools.json.
        partial: as in `rope_of`.
        windows: as in `check_plain`.
        interleaved: as in `rope_of`.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    check_plain(raw, family, windows=windows)
    hidden, heads = integer(raw, family, "hidden_size"), integer(raw, family, "num_attention_heads")
    head_dim = raw.get("head_dim")
    head_dim = head_dim_of(family, hidden, heads) if head_dim is None else integer(raw, family, "head_dim")
    bias = flag(raw, family, "attention_bias", False)
    attention = SelfAttention(
        heads,
        integer(raw, family, "num_key_value_heads", default=heads),
        head_dim,
        head_dim**-0.5,
        rope=rope_of(raw, family, head_dim, partial=partial, interleaved=interleaved),
        bias=bias,
        output_bias=bias,
    )
    size, activation = integer(raw, family, "intermediate_size"), activation_of(raw, family, "hidden_act", "silu")
    norm = Norm("rms_norm", number(raw, family, "rms_norm_eps", default=1e-6))
    block = Block(attention, Mlp(size, activation, gated=True, bias=flag(raw, family, "mlp_bias", False)), norm)
    return DecoderConfig(
        family=family,
        vocab_size=integer(raw, family, "vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=integer(raw, family, "max_position_embeddings", default=2048),
        blocks=repeated(family, block, integer(raw, family, "num_hidden_layers")),
        norm=norm,
        tie_word_embeddings=flag(raw, family, "tie_word_embeddings", False),
        **token_ids(raw),
    )


NAMES = Names()
ROPE_BUFFERS = ("*.rotary_emb.inv_freq",)
"""Buffers that older checkpoints hold."""

FAMILY = Family(
    "llama", ("llama",), config, NAMES.read, ignored=ROPE_BUFFERS,
    example={
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "max_position_embeddings": 4096,
    },
)  # fmt: skip
