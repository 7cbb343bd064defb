"""FP8 E4M3 and MX (E8M0-scaled) quantization of stored weights, exactly as ONNX's QuantizeLinear defines it."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

E4M3_MAX = 448.0
"""Largest finite value of float8_e4m3fn (OCP 8-bit floating point specification, table 1)."""
MX_BLOCK = 32
"""Elements that share one E8M0 scale (OCP microscaling formats specification, section 5.2)."""


def to_e4m3(x: Array) -> Array:
    """Round to float8_e4m3fn, to nearest even, saturating at 448 (QuantizeLinear-19 with `saturate=1`).

    NaN stays NaN. ml_dtypes alone would turn 500 into NaN, so the values are clipped first.

    float32 is first rounded to odd: the upper 16 bits are kept, and the last of them is set if a lower bit is. The
    result has 7 bits of fraction, more than the 3 + 2 that make a second rounding exact (Boldo and Melquiond, IEEE TC
    57, 2008). It has only 65,536 values, so a table replaces the conversion and is four times as fast.

    Args:
        x: float32, or another floating-point type, of any shape.

    Returns:
        float8_e4m3fn of the shape of `x`.
    """
    if x.dtype != np.float32:
        return np.clip(x, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    bits = np.ascontiguousarray(x).view(np.uint32)
    upper = (bits >> np.uint32(16)).astype(np.uint16)
    upper |= (bits.view(np.uint16)[..., ::2] if bits.ndim else bits.astype(np.uint16)) != 0
    return np.take(_e4m3_table(), upper).view(ml_dtypes.float8_e4m3fn)


@functools.cache
def _e4m3_table() -> Array:
    """Returns the E4M3 byte of every float32 whose lower 16 bits are zero, indexed by its upper 16 bits."""
    every = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        return np.clip(every, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def _divide(x: Array, scale: Any) -> Array:
    """Returns x / scale in float32. An overflow becomes infinite, and `to_e4m3` saturates it."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x.astype(np.float32) / scale)


def mx_scale_rows(rows: Array, start: int) -> Array:
    """Returns the E8M0 scales [r, K/32] of rows [r, K]: the smallest power of two >= amax/448.

    TransformerEngine's kernels round in the same way. Blocks of zeros get 2^-127, the smallest E8M0 value.
    """
    blocks = np.abs(rows.astype(np.float32)).reshape(*rows.shape[:-1], -1, MX_BLOCK).max(axis=-1)
    ratio = blocks / np.float32(E4M3_MAX)
    # ratio = mantissa * 2^exponent with the mantissa in [0.5, 1): exact, where log2 rounds
    mantissa, exponent = np.frexp(ratio)
    exponent = np.where(ratio == 0, -127, exponent - (mantissa == 0.5))
    code = np.clip(exponent + 127, 0, 254).astype(np.uint8)
    return np.asarray(code.view(ml_dtypes.float8_e8m0fnu))


def mx_data_rows(rows: Array, start: int) -> Array:
    """Returns float8_e4m3fn data [r, K] of rows [r, K]: each block of 32 is divided by its `mx_scale_rows` scale."""
    scale = np.repeat(mx_scale_rows(rows, start).astype(np.float32), MX_BLOCK, axis=-1)
    return to_e4m3(_divide(rows, scale))
