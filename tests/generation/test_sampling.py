"""Penalties and filters against transformers' own processors, the draw against the probabilities."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers", reason="its logits processors are the reference (make setup installs it)")
import torch
from transformers.generation import logits_process as theirs

from onnxtools.base.errors import UsageError
from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.sampling import draw, filtered, log_softmax, penalized

LOGITS = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32) * 3
TEXTS = [[1, 2, 2, 7], [0], [49, 3]]


@pytest.mark.parametrize("settings", [
    {"temperature": 0.6}, {"top_k": 5}, {"top_k": 80}, {"top_p": 0.7}, {"top_p": 1.0}, {"top_p": 0.01},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.5},
])  # fmt: skip
def test_filters_equal_transformers(settings: dict[str, float]) -> None:
    expected = torch.tensor(LOGITS)
    for name, make in (
        ("temperature", theirs.TemperatureLogitsWarper),
        ("top_k", theirs.TopKLogitsWarper),
        ("top_p", theirs.TopPLogitsWarper),
    ):
        if name in settings:
            expected = make(settings[name])(None, expected)
    found = filtered(LOGITS, GenerationOptions(**settings))  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.5])
def test_penalty_equals_transformers(penalty: float) -> None:
    for row, text in enumerate(TEXTS):
        expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([text]), torch.tensor(LOGITS[row : row + 1])
        )
        np.testing.assert_allclose(penalized(LOGITS, TEXTS, penalty)[row], expected.numpy()[0], rtol=1e-6)


def test_log_softmax_equals_torch() -> None:
    np.testing.assert_allclose(log_softmax(LOGITS), torch.log_softmax(torch.tensor(LOGITS), -1).numpy(), atol=1e-6)


def test_draws_follow_the_probabilities_and_never_take_what_is_ruled_out() -> None:
    logits = np.tile(np.log(np.array([0.5, 0.2, 0.3, 0.0], np.float32) + 1e-30), (20_000, 1))
    logits[:, 3] = -np.inf
    counts = np.bincount(draw(logits, np.random.default_rng(1)), minlength=4) / 20_000
    np.testing.assert_allclose(counts, [0.5, 0.2, 0.3, 0], atol=0.015)
    assert counts[3] == 0


@pytest.mark.parametrize("settings", [
    {"temperature": 1e-5}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"num_beams": 0},
    {"max_new_tokens": 0},
    {"repetition_penalty": 0.0}, {"num_beams": 2, "top_k": 3}, {"num_return_sequences": 2}, {"min_new_tokens": 30},
])  # fmt: skip
def test_impossible_options_are_refused_by_name(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError) as error:
        GenerationOptions(**settings)  # type: ignore[arg-type]
    assert next(iter(settings)).replace("_", "-") in str(error.value) or "beam search" in str(error.value)


@pytest.mark.parametrize("others", [{}, {"top_k": 5}, {"top_p": 0.5}, {"num_beams": 3}, {"seed": 4}])
def test_a_temperature_of_0_is_greedy(others: dict[str, float]) -> None:
    """As in vLLM, llama.cpp and OpenAI's interface; without the others it is what no temperature is."""
    options = GenerationOptions(temperature=0.0, **others)  # type: ignore[arg-type]
    assert not options.samples
    assert (
        not GenerationOptions().samples
        and GenerationOptions(temperature=0.5).samples
        and GenerationOptions(top_k=5).samples
    )
