"""Gemma (Hugging Face `gemma`): Llama with a scaled embedding, norms stored minus one, gated GELU, tied head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, adapted
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import activation_of


def config(raw: Mapping[str, Any], family: str = "gemma", *, windows: bool = False) -> DecoderConfig:
    """The decoder of a Gemma config.json, or of a family like it; `windows` as in `check_plain`.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {"max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True, **raw}
    base = llama.config({**raw, "hidden_act": None}, family, windows=windows)
    name = "hidden_act" if family == "gemma" else "hidden_activation"
    # "gelu" in the first configurations of Gemma 1 means the tanh form (transformers, GemmaConfig).
    is_older = family == "gemma" and raw.get(name) == "gelu"
    activation = activation_of({**raw, **({name: None} if is_older else {})}, family, name, "gelu_pytorch_tanh")
    return replace(adapted(base, mlp={"activation": activation}), embed_scale=base.hidden_size**0.5)


NAMES = Names(plus_one=True)

FAMILY = Family(
    "gemma", ("gemma",), config, NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "num_hidden_layers": 18, "head_dim": 256,
        "num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 16384,
        "max_position_embeddings": 8192,
    },
)  # fmt: skip
