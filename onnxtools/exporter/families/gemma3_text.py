"""Gemma 3 (Hugging Face `gemma3_text`): Gemma 2 with norms of queries and keys, and its own rotation in windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.exporter.config import DecoderConfig, QkNorm, adapted, by_layer
from onnxtools.exporter.families import gemma, gemma2, llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.rope import Rope, rope_of
from onnxtools.exporter.settings import integer

_KINDS = ("full_attention", "sliding_attention")


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"max_position_embeddings": 131072, **raw}
    every = integer(raw, "gemma3_text", "sliding_window_pattern", default=6)
    # transformers caps no scores of this family.
    plain = {**raw, "rope_parameters": None, "rope_scaling": None, "attn_logit_softcapping": None}
    base = gemma2.capped(plain, "gemma3_text", every)
    head_dim, norm = base.blocks[0].attention.head_dim, base.blocks[0].norm
    full, local = _ropes(raw, head_dim)
    base = adapted(base, attention={"qk_norm": QkNorm(norm)})
    return by_layer(base, [{"rope": full if b.attention.window is None else local} for b in base.blocks])


def _ropes(raw: Mapping[str, Any], head_dim: int) -> tuple[Rope, Rope]:
    """The rotation of layers that see all tokens, and of those with a window.

    They are read from `rope_parameters` by layer type (transformers 5), or from rope_theta with rope_scaling and
    rope_local_base_freq.
    """
    parameters = raw.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or not all(name in _KINDS for name in parameters):
        raise ModelError(
            f"gemma3_text: rope_parameters is {shown(parameters)}; it must be a mapping of {' and '.join(_KINDS)}"
        )
    full = {"rope_theta": 1e6, **raw, "rope_parameters": parameters.get(_KINDS[0])}
    theta = raw.get("rope_local_base_freq", 10000.0)
    local = {**raw, "rope_theta": theta, "rope_scaling": None, "rope_parameters": parameters.get(_KINDS[1])}
    return rope_of(full, "gemma3_text", head_dim), rope_of(local, "gemma3_text", head_dim)


FAMILY = Family(
    "gemma3_text", ("gemma3_text",), config, gemma.NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "num_hidden_layers": 26,
        "head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "sliding_window": 512,
    },
)  # fmt: skip
