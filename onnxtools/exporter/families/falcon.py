"""Falcon (Hugging Face `falcon`): one norm or two before attention and MLP beside each other, or ALiBi (Falcon-RW)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.checkpoints.model_info import token_ids
from onnxtools.exporter.alibi import slopes
from onnxtools.exporter.config import Alibi, Block, DecoderConfig, Mlp, Norm, Placement, SelfAttention, repeated
from onnxtools.exporter.family import Family, Source
from onnxtools.exporter.names import Names
from onnxtools.exporter.rope import rope_of
from onnxtools.exporter.settings import activation_of, check_plain, flag, head_dim_of, integer, number
from onnxtools.storage.lazy import Tensor


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    check_plain(raw, "falcon")
    hidden, heads = integer(raw, "falcon", "hidden_size"), integer(raw, "falcon", "num_attention_heads", "n_head")
    head_dim, bias = head_dim_of("falcon", hidden, heads), flag(raw, "falcon", "bias", False)
    kv_heads = integer(raw, "falcon", "num_kv_heads", "n_head_kv", default=heads)
    if not flag(raw, "falcon", "new_decoder_architecture", False):
        kv_heads = 1 if flag(raw, "falcon", "multi_query", True) else heads
    alibi = Alibi(slopes(heads), bf16=True, scale=head_dim**-0.5) if flag(raw, "falcon", "alibi", False) else None
    attention = SelfAttention(
        heads,
        kv_heads,
        head_dim,
        head_dim**-0.5,
        None if alibi is not None else rope_of(raw, "falcon", head_dim),
        bias,
        bias,
        alibi=alibi,
    )
    norm = Norm("layer_norm", number(raw, "falcon", "layer_norm_epsilon", default=1e-5), bias=True)
    size = integer(raw, "falcon", "ffn_hidden_size", default=4 * hidden)
    mlp = Mlp(size, activation_of(raw, "falcon", "activation", "gelu"), bias=bias)
    return DecoderConfig(
        family="falcon",
        vocab_size=integer(raw, "falcon", "vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=integer(raw, "falcon", "max_position_embeddings", default=2048),
        blocks=repeated(
            "falcon",
            Block(attention, mlp, norm, _placement(raw)),
            integer(raw, "falcon", "num_hidden_layers", "n_layer"),
        ),
        norm=norm,
        tie_word_embeddings=flag(raw, "falcon", "tie_word_embeddings", True),
        **token_ids(raw),
    )


def _placement(raw: Mapping[str, Any]) -> Placement:
    new, beside = (
        flag(raw, "falcon", "new_decoder_architecture", False),
        flag(raw, "falcon", "parallel_attn", True),
    )
    if not beside:
        if new:
            raise ModelError("falcon: new_decoder_architecture without parallel_attn is not supported; no model has it")
        return "pre"
    norms = integer(raw, "falcon", "num_ln_in_parallel_attn", default=2 if new else 1)
    return "parallel" if new and norms == 2 else "parallel_shared"


_MODULES = {
    "self_attn.o_proj": "self_attention.dense", "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}  # fmt: skip
_TOP = {"model.embed_tokens": "transformer.word_embeddings", "model.norm": "transformer.ln_f"}


def weights(c: DecoderConfig, source: Source) -> dict[str, Tensor]:
    """The weights by canonical name; rows of the fused QKV are groups of queries with their key and value."""
    two = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}
    modules = {**_MODULES, **(two if c.blocks[0].placement == "parallel" else {})}
    names = Names(
        "transformer.h.{}", modules, _TOP,
        qkv="self_attention.query_key_value", qkv_rows="groups", prefix="transformer.",
    )  # fmt: skip
    return names.read(c, source)


FAMILY = Family(
    "falcon", ("falcon",), config, weights, ignored=("*.rotary_emb.inv_freq", "*.inv_freq"),
    example={
        "model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32,
        "num_attention_heads": 71, "ffn_hidden_size": 18176, "max_position_embeddings": 2048,
    },
)  # fmt: skip
