"""What INT8 and FP8 take from calibration: SmoothQuant's factors and the ranges of activations, called directly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnxtools.calibration.statistics import Histogram
from onnxtools.numerics.formats import INT8
from onnxtools.passes.quantize import linear
from onnxtools.passes.quantize.ranges import largest


@pytest.mark.parametrize("alpha", [0.3, 0.8])
def test_factors_are_smoothquants_equation_4(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha): with alpha 0.5 the two exponents could be taken for each other."""
    activations, weights = np.array([2.0, 16.0, 0.5, 0.0]), np.array([4.0, 0.25, 3.0, 1.0])
    monkeypatch.setattr(linear, "column_amax", lambda products: weights)
    scheme = linear.LinearScheme(INT8, 0, None, frozenset(), alpha, per_token=False, per_channel=False, method="max")
    group: Any = SimpleNamespace(fold=SimpleNamespace(tied=lambda factors: factors), products=())
    expected = [a**alpha / w ** (1 - alpha) for a, w in zip(activations[:3], weights[:3], strict=True)]
    np.testing.assert_allclose(scheme._factors(group, activations), [*expected, 1.0], rtol=1e-12)


def test_a_percentile_leaves_one_in_ten_thousand_above() -> None:
    histogram = Histogram()
    histogram.add(np.arange(1, 1_000_001, dtype=np.float32).reshape(-1, 1))
    assert largest(histogram, "percentile", INT8) == pytest.approx(999_900, rel=2**-8)
    few = Histogram()
    few.add(
        np.r_[np.ones(99_980, np.float32), np.full(20, 50.0, np.float32)].reshape(-1, 1)
    )  # 0.02% is more than one in ten thousand
    assert largest(few, "percentile", INT8) == pytest.approx(50, rel=2**-8)
    rare = Histogram()
    rare.add(np.r_[np.ones(99_995, np.float32), np.full(5, 50.0, np.float32)].reshape(-1, 1))
    assert largest(rare, "percentile", INT8) == pytest.approx(1, rel=2**-8)


def test_max_is_the_largest_magnitude_and_mse_cuts_a_lonely_one() -> None:
    values = np.r_[np.linspace(-1, 1, 100_000, dtype=np.float32), np.float32(8)].reshape(-1, 1)
    histogram = Histogram()
    histogram.add(values)
    found = largest(histogram, "mse", INT8)
    rounding = {
        amax: np.square(values - np.clip(np.rint(values / (amax / 127)), -128, 127) * amax / 127).sum()
        for amax in (found, 1.0, 8.0)
    }
    assert rounding[found] < rounding[1.0] and rounding[found] < rounding[8.0]
