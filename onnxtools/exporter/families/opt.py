"""OPT (Hugging Face `opt`): learned positions, ReLU, tied head; OPT-350M has norms of the sums, a narrow embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.checkpoints.model_info import token_ids
from onnxtools.exporter.config import Block, DecoderConfig, Mlp, Norm, SelfAttention, repeated
from onnxtools.exporter.family import Family, Source
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import activation_of, check_plain, flag, head_dim_of, integer
from onnxtools.storage.lazy import Tensor, row_range

_OFFSET = 2
"""Rows of the position table before that of position 0 (transformers, OPTLearnedPositionalEmbedding)."""


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    check_plain(raw, "opt")
    hidden, heads = integer(raw, "opt", "hidden_size"), integer(raw, "opt", "num_attention_heads")
    head_dim, bias = head_dim_of("opt", hidden, heads), flag(raw, "opt", "enable_bias", True)
    affine = flag(raw, "opt", "layer_norm_elementwise_affine", True)
    norm = Norm("layer_norm", 1e-5, bias=affine, gain=affine)
    before = flag(raw, "opt", "do_layer_norm_before", True)
    size, activation = integer(raw, "opt", "ffn_dim"), activation_of(raw, "opt", "activation_function", "relu")
    block = Block(
        SelfAttention(heads, heads, head_dim, head_dim**-0.5, bias=bias, output_bias=bias),
        Mlp(size, activation, bias=bias),
        norm,
        "pre" if before else "post_residual",
    )
    return DecoderConfig(
        family="opt",
        vocab_size=integer(raw, "opt", "vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=integer(raw, "opt", "max_position_embeddings", default=2048),
        blocks=repeated("opt", block, integer(raw, "opt", "num_hidden_layers")),
        norm=norm if before and not flag(raw, "opt", "_remove_final_layer_norm", False) else None,
        tie_word_embeddings=flag(raw, "opt", "tie_word_embeddings", True),
        learned_positions=True,
        embed_size=integer(raw, "opt", "word_embed_proj_dim", default=hidden),
        **token_ids(raw),
    )


_MODULES = {
    "self_attn.o_proj": "self_attn.out_proj", "mlp.up_proj": "fc1", "mlp.down_proj": "fc2",
    "input_layernorm": "self_attn_layer_norm", "post_attention_layernorm": "final_layer_norm",
}  # fmt: skip
_AFTER = {"post_attention_layernorm": "self_attn_layer_norm", "post_feedforward_layernorm": "final_layer_norm"}
_TOP = {
    "model.embed_tokens": "model.decoder.embed_tokens", "model.norm": "model.decoder.final_layer_norm",
    "model.project_in": "model.decoder.project_in", "model.project_out": "model.decoder.project_out",
}  # fmt: skip


def weights(c: DecoderConfig, source: Source) -> dict[str, Tensor]:
    """The weights by canonical name; the position table loses its first rows."""
    modules = _MODULES if c.blocks[0].placement == "pre" else {**_MODULES, **_AFTER}
    names = Names("model.decoder.layers.{}", modules, _TOP)
    rows, name = c.max_position_embeddings + _OFFSET, "model.decoder.embed_positions.weight"
    table = source.take(name if name in source else name.removeprefix("model."), rows, c.hidden_size)
    return names.read(c, source, {"model.embed_positions.weight": row_range(table, _OFFSET, rows)})


FAMILY = Family(
    "opt", ("opt",), config, weights,
    example={
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "ffn_dim": 3072, "max_position_embeddings": 2048,
    },
)  # fmt: skip
