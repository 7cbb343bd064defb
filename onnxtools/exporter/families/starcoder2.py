"""StarCoder2 (Hugging Face `starcoder2`): LayerNorm, rotary positions, biases everywhere, a window, tied head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxtools.exporter.config import DecoderConfig, Norm, adapted, by_layer
from onnxtools.exporter.families import llama
from onnxtools.exporter.family import Family
from onnxtools.exporter.names import Names
from onnxtools.exporter.settings import activation_of, flag, number, windows_of


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    raw = {
        "max_position_embeddings": 4096, "num_key_value_heads": 2, "tie_word_embeddings": True, "sliding_window": None,
        **raw, "layer_types": None,
    }  # fmt: skip
    bias, activation = (
        flag(raw, "starcoder2", "use_bias", True),
        activation_of(raw, "starcoder2", "hidden_act", "gelu_pytorch_tanh"),
    )
    norm = Norm("layer_norm", number(raw, "starcoder2", "norm_epsilon", default=1e-5), bias=True)
    base = llama.config(
        {**raw, "hidden_act": None, "attention_bias": bias, "mlp_bias": bias}, "starcoder2", windows=True
    )
    base = replace(adapted(base, mlp={"gated": False, "activation": activation}, norm=norm), norm=norm)
    kind = "full_attention" if raw["sliding_window"] is None else "sliding_attention"
    return by_layer(base, [{"window": window} for window in windows_of(raw, "starcoder2", [kind] * len(base.blocks))])


NAMES = Names(modules={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"})

FAMILY = Family(
    "starcoder2", ("starcoder2",), config, NAMES.read, ignored=llama.ROPE_BUFFERS,
    example={
        "model_type": "starcoder2", "vocab_size": 49152, "hidden_size": 3072, "num_hidden_layers": 30,
        "num_attention_heads": 24, "num_key_value_heads": 2, "intermediate_size": 12288,
        "max_position_embeddings": 16384, "sliding_window": 4096,
    },
)  # fmt: skip
