"""Number formats of quantized values and weights, and weights that are quantized while they are written.

All are symmetric: x is stored as round(x / scale) to nearest even, saturated, as QuantizeLinear defines it; the zero
point is 0. A scale is rounded to the type it is stored in first, and the stored value is what weights are divided by.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxtools.base.errors import ModelError
from onnxtools.numerics.fp8 import E4M3_MAX, to_e4m3
from onnxtools.storage.rows import WORKERS, StreamedTensor, read_rows, slabs, thread_scratch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Format:
    """A stored type.

    Attributes:
        top: the magnitude that the largest value is scaled to.
        cast: float32 to the stored type, saturating.
        opset: the first operator set whose DequantizeLinear takes it, as it is used here.
    """

    name: str
    dtype: ir.DataType
    top: float
    cast: Callable[[Array], Array]
    opset: int


def _to_int8(x: Array) -> Array:
    return _integers(x, -128, 127)


def _to_int4(x: Array) -> Array:
    return _integers(x, -8, 7).view(ml_dtypes.int4)  # a byte each, whose lower half counts


def _integers(x: Array, low: int, high: int) -> Array:
    rounded = np.rint(x)
    return np.clip(rounded, np.float32(low), np.float32(high), out=rounded).astype(np.int8)


FP8 = Format("FP8 E4M3", ir.DataType.FLOAT8E4M3FN, E4M3_MAX, to_e4m3, 19)
INT8 = Format("INT8", ir.DataType.INT8, 127.0, _to_int8, 19)
INT4 = Format("INT4", ir.DataType.INT4, 7.0, _to_int4, 21)


_CACHED = 1 << 16
"""Elements that are worked on at once."""


def scale_of(amax: Array, form: Format, dtype: ir.DataType) -> Array:
    """amax / top in the stored type; 1 where all is zero, never so small that it is denormal."""
    scale = np.asarray(amax, np.float32) / np.float32(form.top)
    tiny = float(ml_dtypes.finfo(dtype.numpy()).tiny)  # type: ignore[no-untyped-call]
    return np.where(scale == 0, np.float32(1), np.maximum(scale, tiny)).astype(dtype.numpy())


def magnitudes(tensor: ir.TensorProtocol, axis: int, block: int = 0) -> Array:
    """Largest magnitude, float32: of each index of the other axis where `block` is 0, else of each block of `block`
    along `axis`.

    Args:
        tensor: a matrix; read a slab a core at a time.
        axis: the axis that is summed over in the product (K).
        block: must divide K. The result keeps the matrix's rank, with K / block along `axis`.
    Raises:
        ModelError: an element is infinite or NaN.
    """
    columns = int(tensor.shape.numpy()[1])

    def part(bounds: tuple[int, int]) -> Array:
        start, stop = bounds
        size = _magnitude_keys(read_rows(tensor, start, stop, thread_scratch()))
        if block:
            shape = (stop - start, columns // block, block) if axis == 1 else ((stop - start) // block, block, columns)
            keys = size.reshape(shape).max(axis=2 if axis == 1 else 1)
        else:
            keys = size.max(axis=axis)
        found = np.asarray(keys.view(tensor.dtype.numpy()).astype(np.float32))
        if not np.isfinite(found).all():
            raise ModelError(
                f"weight {tensor.name!r} has infinite or NaN elements; restore it, or leave it out with --exclude"
            )
        return found

    with ThreadPoolExecutor(WORKERS) as pool:
        parts = list(pool.map(part, slabs(tensor, block if block and axis == 0 else 1)))
    if block or axis == 1:
        return np.concatenate(parts)
    return np.asarray(np.max(parts, axis=0))


def _magnitude_keys(rows: Array) -> Array:
    """The bits without the sign, which order as the magnitudes do (IEEE 754-2019, 5.10), NaN above all; made in
    place.
    """
    bits = rows.view(f"u{rows.dtype.itemsize}")
    return np.asarray(np.bitwise_and(bits, bits.dtype.type(np.iinfo(bits.dtype).max >> 1), out=bits))


def quantized(tensor: ir.TensorProtocol, form: Format, scale: Array, axis: int, block: int = 0) -> StreamedTensor:
    """`tensor` stored as `form`.

    Args:
        scale: one element; or one for each output channel (the axis that is not `axis`); or, with `block`, of the rank
            of the matrix, one for each block along `axis`.
    """
    wide = np.asarray(scale).astype(np.float32)

    def rows(part: Array, start: int) -> Array:
        out = np.empty(part.shape, form.dtype.numpy())
        step = max(1, _CACHED // max(part.shape[1], 1))
        step = max(1, step // block) * block if block and axis == 0 else step
        for low in range(0, len(part), step):  # a piece that stays in the cache from step to step
            piece = part[low : low + step]
            along = _along(wide, start + low, len(piece), axis, block)
            out[low : low + step] = form.cast(_divided(_blocks(piece, axis, block), along)).reshape(piece.shape)
        return out

    return StreamedTensor(
        tensor, rows, dtype=form.dtype, name=tensor.name or "", row_multiple=block if block and axis == 0 else 1
    )


def _blocks(rows: Array, axis: int, block: int) -> Array:
    """Rows [r, columns] with the blocks along `axis` as an axis of their own."""
    if not block:
        return rows
    return rows.reshape(len(rows), -1, block) if axis == 1 else rows.reshape(-1, block, rows.shape[1])


def _along(scale: Array, start: int, count: int, axis: int, block: int) -> Array:
    """The scales of rows start : start + count, in a shape that broadcasts with `_blocks`."""
    if block:
        return (
            scale[start : start + count, :, None]
            if axis == 1
            else scale[start // block : -(-(start + count) // block), None, :]
        )
    if scale.size == 1:
        return scale.reshape(())
    return scale[start : start + count, None] if axis == 1 else scale[None, :]


def _divided(rows: Array, scale: Array) -> Array:
    """rows / scale in float32; what overflows saturates later."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = _widened(rows)
        return np.asarray(np.divide(wide, scale, out=wide if wide is not rows else None))


def _widened(rows: Array) -> Array:
    """Finite elements as float32, float16 four times as fast as by numpy, which converts one after the other.

    Exponent and fraction are moved to where float32 has them; the bias differs by 127 - 15 (IEEE 754-2019, 3.4), so
    2^112 makes up for it, of denormals too.
    """
    if rows.dtype != np.float16:
        return rows.astype(np.float32, copy=False)
    bits = rows.view(np.int16).astype(np.int32)  # the sign spreads over the upper half
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, -0x70002000, out=bits)  # the sign, five bits of exponent, ten of fraction
    wide = bits.view(np.float32)
    return np.multiply(wide, np.float32(2.0**112), out=wide)


def scaled(tensor: ir.TensorProtocol, factors: Array, axis: int, dtype: ir.DataType | None = None) -> StreamedTensor:
    """`tensor` times a factor for each index of `axis`, in its own type or `dtype`."""
    kind = dtype or tensor.dtype
    wide = np.asarray(factors, np.float32)

    def rows(part: Array, start: int) -> Array:
        along = wide[start : start + len(part)] if axis == 0 else wide
        shape = [1] * part.ndim
        shape[axis] = len(along)
        return np.asarray((part.astype(np.float32) * along.reshape(shape)).astype(kind.numpy()))

    return StreamedTensor(tensor, rows, dtype=kind, name=tensor.name or "")
