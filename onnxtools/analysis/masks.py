"""Recognizes attention masks by their evaluated elements, not by the nodes that compute them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts
from onnxtools.ir.query import is_op

Array = np.ndarray[Any, Any]
BLOCKING = -1e3
"""An added value at or below this removes a key from the softmax.

Exporters write -1e4, -65504, the lowest float or -inf.
"""
HIDDEN = -1e4
"""Added to the scores of hidden keys; exp(-1e4) is 0 in every floating type, and fp16 can hold -1e4."""
HALF_LOWEST = {
    ir.DataType.FLOAT: -3.4e38 / 2, ir.DataType.FLOAT16: -65504.0 / 2, ir.DataType.BFLOAT16: -3.38e38 / 2,
}  # fmt: skip
"""Added to the scores of hidden keys where these may be large; the sum with a score stays finite."""


class MaskError(Exception):
    """The mask follows no rule that extends to longer sequences."""


@dataclass(frozen=True)
class Pattern:
    """The keys j that a query i may see: j <= i if `causal`, and i - j < window if there is a `window`."""

    causal: bool
    window: int | None = None

    def blocked(self, size: int) -> Array:
        """Returns booleans [size, size], True where key j is hidden from query i."""
        distance = np.arange(size)[:, None] - np.arange(size)[None, :]
        hidden = distance < 0 if self.causal else np.zeros((size, size), dtype=bool)
        return hidden | (distance >= self.window) if self.window is not None else hidden


def square(array: Array, size: int) -> Array | None:
    """Returns the one [size, size] matrix that a broadcast mask [..., size, size] repeats; None for other shapes.

    Raises:
        MaskError: the matrices of the mask differ.
    """
    if array.ndim < 2 or array.shape[-2:] != (size, size):
        return None
    flat = array.reshape(-1, size, size)
    if not all(np.array_equal(flat[0], other) for other in flat[1:]):
        raise MaskError("differs between heads or batch rows")
    return flat[0]  # type: ignore[no-any-return]


def pattern_of(blocked: Array) -> Pattern | None:
    """Returns the rule of a boolean matrix [queries, keys] of hidden keys; None if no key is hidden.

    Raises:
        MaskError: no causal or sliding-window rule gives this matrix.
    """
    size = len(blocked)
    if not blocked.any():
        return None
    visible = ~blocked[-1]
    window = int(visible.sum()) if visible[-1] and not visible[0] else None
    for candidate in (Pattern(True), Pattern(True, window), Pattern(False, window)):
        if np.array_equal(candidate.blocked(size), blocked):
            return candidate
    raise MaskError("is neither causal nor a sliding window")


def hidden_by_addition(array: Array) -> tuple[Array, float]:
    """Splits an additive mask.

    Returns:
        The hidden keys, booleans of the mask's shape, and the lowest value, 0.0 if no key is hidden.

    Raises:
        MaskError: the mask holds values other than zero and blocking ones: a position bias.
    """
    numbers = array.astype(np.float64)
    hidden = numbers <= BLOCKING
    if np.any(numbers[~hidden] != 0):
        raise MaskError("adds a bias that depends on the position")
    return hidden, float(numbers.min()) if hidden.any() else 0.0


SENTINEL = 1 << 30
"""Exporters write integers of this size or more for "to the end". They are no window."""


def mask_constants(value: ir.Value, facts: Facts) -> set[int]:
    """Returns the magnitudes of the scalars that the mask is computed from, rounded down.

    A window of w shows only in a sequence longer than w, so a caller needs the candidates for w.
    """
    scalars: set[int] = set()
    seen: set[ir.Value] = set()
    todo = [value]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        node = current.producer()
        if is_op(node, "Shape", "Size"):
            continue  # the constants above describe other values
        if node is not None and node.op_type != "Constant":
            todo.extend(v for v in node.inputs if v is not None)
            continue
        array = facts[current].value
        if array is None or array.size != 1 or array.dtype.kind not in "iuf":
            continue
        number = abs(float(array.reshape(-1)[0]))
        if number < SENTINEL and (array.dtype.kind != "f" or number < -BLOCKING):
            scalars.add(int(number))
    return scalars


def prime_above(number: int) -> int:
    """Returns the smallest prime greater than `number`, for `number` >= 1."""
    from itertools import count
    from math import isqrt

    return next(n for n in count(number + 1) if all(n % d for d in range(2, isqrt(n) + 1)))
