"""MPT (Hugging Face `mpt`): ALiBi, no biases, fused QKV, tied head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.checkpoints.model_info import token_ids
from onnxtools.exporter.alibi import mpt_slopes
from onnxtools.exporter.config import Alibi, Block, DecoderConfig, Mlp, Norm, SelfAttention, repeated
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import check_plain, flag, head_dim_of, integer, number

_PLAIN: dict[str, Any] = {"attn_type": "multihead_attention", "alibi": True, "qk_ln": False, "prefix_lm": False}
"""Settings of the attention that transformers has for MPT."""


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    check_plain(raw, "mpt")
    settings = raw.get("attn_config") or {}
    if not isinstance(settings, Mapping):
        raise ModelError(f"mpt: attn_config is {shown(settings)}, not a mapping; fetch the configuration again")
    for name, value in {**_PLAIN, "no_bias": True}.items():
        found = (raw if name == "no_bias" else settings).get(name, value)
        if found != value:
            raise ModelError(f"mpt: {name} is {shown(found)}, which is not supported; {shown(value)} is")
    if raw.get("logit_scale") is not None:
        raise ModelError(f"mpt: logit_scale is {shown(raw['logit_scale'])}, which is not supported; null is")
    hidden, heads = integer(raw, "mpt", "d_model", "hidden_size"), integer(raw, "mpt", "n_heads")
    head_dim = head_dim_of("mpt", hidden, heads)
    limit = number(settings, "mpt", "alibi_bias_max", default=8)
    attention = SelfAttention(
        heads,
        heads,
        head_dim,
        number(settings, "mpt", "softmax_scale", default=head_dim**-0.5),
        alibi=Alibi(mpt_slopes(heads, limit), "slots"),
        clip=None if settings.get("clip_qkv") is None else number(settings, "mpt", "clip_qkv"),
    )
    norm = Norm("layer_norm", number(raw, "mpt", "layer_norm_epsilon", default=1e-5))
    return DecoderConfig(
        family="mpt",
        vocab_size=integer(raw, "mpt", "vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=integer(raw, "mpt", "max_seq_len", default=2048),
        blocks=repeated("mpt", Block(attention, Mlp(4 * hidden, "gelu"), norm), integer(raw, "mpt", "n_layers")),
        norm=norm,
        tie_word_embeddings=flag(raw, "mpt", "tie_word_embeddings", True),
        **token_ids(raw),
    )


NAMES = Names(
    "transformer.blocks.{}",
    {
        "self_attn.o_proj": "attn.out_proj", "mlp.up_proj": "ffn.up_proj", "mlp.down_proj": "ffn.down_proj",
        "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2",
    },
    {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.norm_f"},
    qkv="attn.Wqkv", prefix="transformer.",
)  # fmt: skip

FAMILY = Family(
    "mpt", ("mpt",), config, NAMES.read,
    example={"model_type": "mpt", "vocab_size": 50432, "d_model": 4096, "n_layers": 32, "n_heads": 32,
        "max_seq_len": 2048},
)  # fmt: skip
