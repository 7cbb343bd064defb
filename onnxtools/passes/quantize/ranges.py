"""The largest magnitude that an activation's scale covers, by calibration method."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from onnxtools.calibration.statistics import Histogram
from onnxtools.numerics.formats import Format

Method = Literal["max", "percentile", "mse"]
PERCENTILE = 99.99
_STEPS = 64


def largest(histogram: Histogram, method: Method, form: Format) -> float:
    """The largest magnitude that the scale of an activation covers.

    `percentile`: the magnitude below which 99.99% of the elements lie. `mse`, and any other method: of 64 magnitudes,
    from the largest down to 1% of it, the one with the least squared rounding error.
    """
    counts, centres = histogram.counts, Histogram.centres()
    filled = np.flatnonzero(counts)
    top = float(centres[filled[-1]]) if len(filled) else 0.0
    if method == "percentile":
        bin_index = int(np.searchsorted(counts.cumsum(), counts.sum() * PERCENTILE / 100))
        return float(centres[min(bin_index, len(centres) - 1)])
    values, weights = centres[filled], counts[filled]
    candidates = top * np.geomspace(1, 0.01, _STEPS)
    return float(candidates[int(np.argmin([_error(values, weights, amax, form) for amax in candidates]))])


def _error(values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], amax: float, form: Format) -> float:
    scale = amax / form.top or 1.0
    rounded = form.cast((values / scale).astype(np.float32)).astype(np.float64) * scale
    return float((weights * (values - rounded) ** 2).sum())
