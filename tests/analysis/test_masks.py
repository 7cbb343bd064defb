"""Reading the rule of a mask off its elements: every causal and windowed mask, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from onnxtools.analysis.masks import MaskError, Pattern, hidden_by_addition, pattern_of, prime_above, square
from tests.support import Array, normal


def hidden(size: int, causal: bool, window: int | None) -> Array:
    """Element by element, as the definition says it."""
    return np.array(
        [[(causal and j > i) or (window is not None and i - j >= window) for j in range(size)] for i in range(size)]
    )


@pytest.mark.parametrize("size", [7, 13])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 1), (True, 3), (True, 6), (False, 2), (False, 5)])
def test_rules_are_recognised(size: int, causal: bool, window: int | None) -> None:
    mask = hidden(size, causal, window)
    assert pattern_of(mask) == Pattern(causal, window)
    assert np.array_equal(Pattern(causal, window).blocked(size), mask)


def test_nothing_hidden_is_no_mask() -> None:
    assert pattern_of(np.zeros((7, 7), bool)) is None


@pytest.mark.parametrize("kind", ["random", "one place", "prefix", "blocks", "strict", "all", "dilated"])
def test_anything_else_is_an_error(kind: str) -> None:
    i, j = np.indices((12, 12))
    mask = {
        "random": normal(12, 12) > 0,
        "one place": (i == 3) & (j == 5),
        "prefix": (j > i) & (j >= 4),
        "blocks": j // 3 > i // 3,
        "strict": j >= i,
        "all": i >= 0,
        "dilated": (j > i) | ((i - j) % 2 == 1),
    }[kind]
    with pytest.raises(MaskError):
        pattern_of(mask)


@pytest.mark.parametrize("low", [-1e4, -65504.0, float(np.finfo(np.float32).min), -np.inf])
def test_additive_masks(low: float) -> None:
    mask = hidden(7, True, None)
    found, fill = hidden_by_addition(np.where(mask, low, 0).astype(np.float32))
    assert np.array_equal(found, mask) and fill == pytest.approx(low)


@pytest.mark.parametrize("other", [-1.0, 1e-6, 5.0])
def test_a_bias_is_no_mask(other: float) -> None:
    array = np.where(hidden(7, True, None), -1e4, 0)
    array[3, 1] = other
    with pytest.raises(MaskError, match="bias"):
        hidden_by_addition(array)


def test_a_broadcast_mask_is_one_matrix() -> None:
    mask = hidden(7, True, None)
    assert np.array_equal(square(np.broadcast_to(mask, (2, 3, 7, 7)), 7), mask)
    assert square(mask, 5) is None and square(mask[0], 7) is None
    with pytest.raises(MaskError, match="differs between heads"):
        square(np.stack([mask, ~mask]), 7)


@pytest.mark.parametrize(("number", "prime"), [(1, 2), (2, 3), (10, 11), (24, 29), (4097, 4099)])
def test_primes(number: int, prime: int) -> None:
    assert prime_above(number) == prime
