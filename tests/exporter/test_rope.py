"""Frequencies of rotary embedding: their factors, YaRN as llama.cpp spells it, and sizes that no model has."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from onnxtools.base.errors import ModelError
from onnxtools.checkpoints.gguf import ROPE_FACTORS
from onnxtools.exporter.families import llama_gguf
from onnxtools.exporter.rope import Rope, rope_of

BASE = {
    "llama.embedding_length": 64, "llama.attention.head_count": 4, "llama.block_count": 1,
    "llama.feed_forward_length": 96, "llama.context_length": 256,
    "llama.vocab_size": 50, "llama.attention.layer_norm_rms_epsilon": 1e-5, "_tensors": frozenset({"output.weight"}),
}  # fmt: skip


def rope(**metadata: Any) -> Rope:
    made = llama_gguf.config({**BASE,
        **{f"llama.rope.{name.replace('__', '.')}": value for name, value in metadata.items() if name[0] != "_"},
                              **{name: value for name, value in metadata.items() if name[0] == "_"}}).ropes  # fmt: skip
    return made[0]


def test_factors_divide_the_frequencies_also_of_scaled_ones() -> None:
    factors = tuple(float(f) for f in np.linspace(0.5, 9, 8))
    position = 37.0
    frequencies = 500.0 ** (-np.arange(0, 16, 2) / 16)
    plain = rope(freq_base=500.0, _rope_factors={ROPE_FACTORS[0]: factors}).tables(38)[0][37]
    np.testing.assert_allclose(plain, np.cos(position * frequencies / factors), rtol=1e-12)
    scaled = rope(freq_base=500.0, scaling__factor=4.0, _rope_factors={ROPE_FACTORS[0]: factors}).tables(38)[1][37]
    np.testing.assert_allclose(scaled, np.sin(position * frequencies / factors / 4), rtol=1e-12)


@pytest.mark.parametrize(
    "factors", [(1.0,) * 7, (1.0,) * 9, (1.0,) * 7 + (0.0,), (1.0,) * 7 + (float("nan"),), (1.0,) * 7 + (-2.0,)]
)
def test_factors_that_are_none_are_refused(factors: tuple[float, ...]) -> None:
    with pytest.raises(ModelError, match="must be 8 positive numbers"):
        rope(_rope_factors={ROPE_FACTORS[0]: factors})


@pytest.mark.parametrize("attention", [1.0, 0.7])
def test_yarn_is_that_of_transformers(attention: float) -> None:
    """The attention factor of llama.cpp multiplies YaRN's own."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference (make setup installs it)")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=parameters
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    made = rope(
        scaling__type="yarn", scaling__factor=8.0, scaling__original_context_length=32, scaling__attn_factor=attention
    )
    cos, sin = made.tables(20)
    np.testing.assert_allclose(cos[19], np.cos(19 * frequencies.double().numpy()) * factor * attention, atol=1e-5)
    np.testing.assert_allclose(sin[19], np.sin(19 * frequencies.double().numpy()) * factor * attention, atol=1e-5)


@pytest.mark.parametrize(("metadata", "message"), [
    ({"scaling__type": "longrope"}, "rope scaling 'longrope' is not supported"),
    ({"scaling__type": [1] * 9999}, "rope scaling .* is not supported"),
    ({"scaling__attn_factor": 1.2, "scaling__factor": 2.0}, "attn_factor is 1.2 with the scaling linear"),
    ({"scaling__type": "yarn", "scaling__yarn_ext_factor": 0.5, "scaling__factor": 2.0}, "yarn_ext_factor is 0.5"),
    ({"dimension_count": 2**31}, "2147483648 channels"),
])  # fmt: skip
def test_what_is_not_supported_is_named(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        rope(**metadata)


@pytest.mark.parametrize("head_dim", [2**17, 2**31, 2**62])
def test_a_size_is_refused_before_a_table_of_it_is_made(head_dim: int) -> None:
    tracemalloc.start()
    with pytest.raises(ModelError, match="channels of a head are rotated"):
        rope_of({"max_position_embeddings": 32}, "llama", head_dim)
    with pytest.raises(ModelError, match="tables of 8388608 positions"):
        Rope(1 << 12, 1e4).tables(1 << 23)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
