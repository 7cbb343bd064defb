"""Observers against plain numpy over all rows at once."""

from __future__ import annotations

import numpy as np
import pytest

from onnxtools.calibration.statistics import Histogram, RotationRange, TokenSample
from onnxtools.numerics.formats import FP8, INT8
from onnxtools.passes.quantize.ranges import largest

PARTS = [
    np.random.default_rng(seed).standard_normal((n, 8)).astype(np.float32) * 3 for seed, n in enumerate((5, 100, 1, 44))
]
WHOLE = np.concatenate(PARTS)


def test_a_sample_is_every_nth_row_of_the_whole() -> None:
    sample = TokenSample(limit=20, total=len(WHOLE))
    for part in PARTS:
        sample.add(part)
    np.testing.assert_array_equal(sample.rows, WHOLE[::7][:20])


@pytest.mark.parametrize("quantile", [50.0, 90.0, 99.99])
def test_percentiles_are_numpys_within_a_bin(quantile: float, monkeypatch: pytest.MonkeyPatch) -> None:
    histogram = Histogram()
    for part in PARTS:
        histogram.add(part)
    monkeypatch.setattr("onnxtools.passes.quantize.ranges.PERCENTILE", quantile)
    expected = np.percentile(np.abs(WHOLE), quantile, method="inverted_cdf")
    assert largest(histogram, "percentile", FP8) == pytest.approx(expected, rel=2**-7)


def test_least_squared_error_beats_the_largest_magnitude() -> None:
    """One outlier at 1000: INT8 of the rest is far better where it is cut."""
    x = np.append(WHOLE.reshape(-1), np.float32(1000))
    histogram = Histogram()
    histogram.add(x[:, None])
    found = largest(histogram, "mse", INT8)

    def error(amax: float) -> float:
        scale = amax / 127
        return float(((np.clip(np.rint(x / scale), -128, 127) * scale - x) ** 2).sum())

    tried = 1000 * np.geomspace(1, 0.01, 64)
    assert error(found) <= min(map(error, tried)) * 1.05


@pytest.mark.parametrize("neighbours", [False, True])
def test_the_range_of_keys_holds_at_every_position(neighbours: bool) -> None:
    """Turn the keys by many angles: no channel exceeds its range, and one comes near it."""
    keys = np.random.default_rng(3).standard_normal((1, 2, 6, 8)).astype(np.float32)
    observer = RotationRange(6, neighbours)
    observer.add(keys)
    first, second = ([0, 2, 4], [1, 3, 5]) if neighbours else ([0, 1, 2], [3, 4, 5])
    turned = np.zeros(8)
    for angle in np.linspace(0, 2 * np.pi, 720):
        a, b = keys[..., first], keys[..., second]
        made = keys.copy()
        made[..., first], made[..., second] = (
            a * np.cos(angle) - b * np.sin(angle),
            b * np.cos(angle) + a * np.sin(angle),
        )
        turned = np.maximum(turned, np.abs(made).max(axis=(0, 1, 2)))
    assert (turned <= observer.amax * (1 + 1e-6)).all()
    np.testing.assert_allclose(turned, observer.amax, rtol=1e-4)
