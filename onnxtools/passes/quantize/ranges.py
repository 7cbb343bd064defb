"""The magnitude that an activation's scale is made from."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from onnxtools.calibration.statistics import Histogram
from onnxtools.numerics.formats import Format

Method = Literal["max", "percentile", "mse"]
PERCENTILE = 99.99
_STEPS = 64


def largest(histogram: Histogram, method: Method, form: Format) -> float:
    """`percentile`: the magnitude below which 99.99% lie.

    `mse`: the one whose rounding error is the least, of 64 from the largest down to 1% of it.
    """
    counts, centres = histogram.counts, Histogram.centres()
    filled = np.flatnonzero(counts)
    top = float(centres[filled[-1]]) if len(filled) else 0.0
    if method == "percentile":
        place = int(np.searchsorted(counts.cumsum(), counts.sum() * PERCENTILE / 100))
        return float(centres[min(place, len(centres) - 1)])
    values, weights = centres[filled], counts[filled]
    candidates = top * np.geomspace(1, 0.01, _STEPS)
    return float(candidates[int(np.argmin([_error(values, weights, amax, form) for amax in candidates]))])


def _error(values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], amax: float, form: Format) -> float:
    scale = amax / form.top or 1.0
    made = form.cast((values / scale).astype(np.float32)).astype(np.float64) * scale
    return float((weights * (values - made) ** 2).sum())
