"""Number formats of quantized values, and weights that are quantized while they are written.

All formats are symmetric: x is stored as round(x / scale) to nearest even, saturated, as QuantizeLinear defines it, and
the zero point is 0. A scale is first rounded to its stored type, and weights are divided by the stored value.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxtools.base.errors import ModelError
from onnxtools.numerics.fp8 import E4M3_MAX, to_e4m3
from onnxtools.storage.rows import WORKERS, RowFunction, StreamedTensor, read_rows, slabs, thread_scratch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        name: the format's name in messages.
        dtype: the stored element type.
        top: the magnitude that the largest value is scaled to.
        cast: converts float32 to the stored type, with saturation.
        opset: the first operator set whose DequantizeLinear accepts the format as used here.
    """

    name: str
    dtype: ir.DataType
    top: float
    cast: Callable[[Array], Array]
    opset: int


def _to_int8(x: Array) -> Array:
    return _integers(x, -128, 127)


def _to_int4(x: Array) -> Array:
    return _integers(x, -8, 7).view(ml_dtypes.int4)  # one byte an element; its low nibble is the value


def _integers(x: Array, low: int, high: int) -> Array:
    rounded = np.rint(x)
    return np.clip(rounded, np.float32(low), np.float32(high), out=rounded).astype(np.int8)


FP8 = Format("FP8 E4M3", ir.DataType.FLOAT8E4M3FN, E4M3_MAX, to_e4m3, 19)
INT8 = Format("INT8", ir.DataType.INT8, 127.0, _to_int8, 19)
INT4 = Format("INT4", ir.DataType.INT4, 7.0, _to_int4, 21)


_EXPONENT = np.int16(0x7C00)
"""The exponent of float16; all of its bits are set in infinities and NaN alone."""
_CACHED = 1 << 16
"""Elements of a piece that stays in the cache."""


def scale_of(amax: Array, form: Format, dtype: ir.DataType) -> Array:
    """Returns the scale amax / top in the type `dtype`: 1 where amax is zero, and never denormal.

    Args:
        amax: largest magnitudes, any shape.
        form: the format, whose `top` is used.
        dtype: the floating-point type of the stored scale.
    """
    scale = np.asarray(amax, np.float32) / np.float32(form.top)
    tiny = float(ml_dtypes.finfo(dtype.numpy()).tiny)  # type: ignore[no-untyped-call]
    return np.where(scale == 0, np.float32(1), np.maximum(scale, tiny)).astype(dtype.numpy())


def magnitudes(tensor: ir.TensorProtocol, axis: int, block: int = 0) -> Array:
    """Returns the largest magnitudes of a matrix, float32: one for each output channel or for each block.

    Args:
        tensor: a matrix of a floating-point type; each thread reads one slab at a time.
        axis: the axis that the product sums over (K).
        block: 0 for one magnitude for each index of the other axis, shape [N]. Otherwise the elements of a block along
            `axis`; it must divide K. The result then keeps the matrix's rank, with K / block along `axis`.

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
        amax = np.asarray(keys.view(tensor.dtype.numpy()).astype(np.float32))
        if not np.isfinite(amax).all():
            raise ModelError(
                f"weight {tensor.name!r} has infinite or NaN elements; restore it, or leave it out with --exclude"
            )
        return amax

    with ThreadPoolExecutor(WORKERS) as pool:
        parts = list(pool.map(part, slabs(tensor, block if block and axis == 0 else 1)))
    if block or axis == 1:
        return np.concatenate(parts)
    return np.asarray(np.max(parts, axis=0))


def _magnitude_keys(rows: Array) -> Array:
    """Clears the sign bits of `rows` in place and returns the bits as unsigned integers.

    They have the order of the magnitudes (IEEE 754-2019, 5.10), with NaN largest.
    """
    bits = rows.view(f"u{rows.dtype.itemsize}")
    return np.asarray(np.bitwise_and(bits, bits.dtype.type(np.iinfo(bits.dtype).max >> 1), out=bits))


def quantized(tensor: ir.TensorProtocol, form: Format, scale: Array, axis: int, block: int = 0) -> StreamedTensor:
    """Returns `tensor` quantized to `form`: round(tensor / scale), of the same shape. It divides in float32.

    Args:
        tensor: a matrix of a floating-point type; with one scale, a tensor of any rank.
        form: the number format.
        scale: one element; or one for each output channel (the axis other than `axis`); or, with `block`, an array of
            rank 2 with one element for each block along `axis`.
        axis: the axis that the product sums over (K).
        block: elements of a block along `axis`; 0 for none.
    """
    wide = np.asarray(scale).astype(np.float32)
    if wide.size == 1 and not block and tensor.dtype.itemsize == 2:
        rows = _looked_up(form, wide.reshape(()), tensor.dtype)
    else:
        rows = _piece_by_piece(form, wide, axis, block)
    return StreamedTensor(
        tensor, rows, dtype=form.dtype, name=tensor.name or "", row_multiple=block if block and axis == 0 else 1
    )


def _looked_up(form: Format, scale: Array, dtype: ir.DataType) -> RowFunction:
    """A 16-bit type has 65,536 values: each is quantized once, then elements are looked up."""

    @functools.cache
    def table() -> Array:
        every = np.arange(1 << 16, dtype=np.uint16).view(dtype.numpy())
        with np.errstate(over="ignore", invalid="ignore"):  # of NaN and infinity, for which casts have a rule
            return form.cast(every.astype(np.float32) / scale).view(np.uint8)

    def rows(part: Array, start: int) -> Array:
        return np.take(table(), part.view(np.uint16)).view(form.dtype.numpy())

    return rows


def _piece_by_piece(form: Format, scale: Array, axis: int, block: int) -> RowFunction:
    def rows(part: Array, start: int) -> Array:
        out = np.empty(part.shape, form.dtype.numpy())
        step = max(1, _CACHED // max(math.prod(part.shape[1:]), 1))
        step = max(1, step // block) * block if block and axis == 0 else step
        for low in range(0, len(part), step):  # a piece stays in the CPU cache from step to step
            piece = part[low : low + step]
            along = _along(scale, start + low, len(piece), axis, block)
            out[low : low + step] = form.cast(_divided(_blocks(piece, axis, block), along)).reshape(piece.shape)
        return out

    return rows


def _blocks(rows: Array, axis: int, block: int) -> Array:
    """Returns rows [r, columns] with a separate axis for the elements of a block along `axis`."""
    if not block:
        return rows
    return rows.reshape(len(rows), -1, block) if axis == 1 else rows.reshape(-1, block, rows.shape[1])


def _along(scale: Array, start: int, count: int, axis: int, block: int) -> Array:
    """Returns the scales of the rows start : start + count, in a shape that broadcasts with `_blocks`."""
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
    """Returns rows / scale in float32. An overflow becomes infinite, and the cast saturates it."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = _widened(rows)
        return np.asarray(np.divide(wide, scale, out=wide if wide is not rows else None))


def _widened(rows: Array) -> Array:
    """Converts to float32; finite float16 four times as fast as numpy, which converts one element at a time.

    Exponent and fraction are shifted to their places in float32. The biases differ by 127 - 15 (IEEE 754-2019, 3.4), so
    the result is multiplied by 2^112, which is right for denormals too.
    """
    if rows.dtype != np.float16:
        return rows.astype(np.float32, copy=False)
    bits = rows.view(np.int16)
    if (bits & _EXPONENT == _EXPONENT).any():
        return rows.astype(np.float32)
    bits = bits.astype(np.int32)  # the sign spreads over the upper half
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, -0x70002000, out=bits)  # the sign, five bits of exponent, ten of fraction
    wide = bits.view(np.float32)
    return np.multiply(wide, np.float32(2.0**112), out=wide)


def scaled(tensor: ir.TensorProtocol, factors: Array, axis: int, dtype: ir.DataType | None = None) -> StreamedTensor:
    """Returns `tensor` multiplied by a factor for each index of `axis`. The product is computed in float32.

    Args:
        tensor: a weight of any rank.
        factors: one factor for each index of `axis`.
        axis: the axis that the factors run along.
        dtype: element type of the result, by default the tensor's.
    """
    kind = dtype or tensor.dtype
    wide = np.asarray(factors, np.float32)

    def rows(part: Array, start: int) -> Array:
        along = wide[start : start + len(part)] if axis == 0 else wide
        shape = [1] * part.ndim
        shape[axis] = len(along)
        return np.asarray((part.astype(np.float32) * along.reshape(shape)).astype(kind.numpy()))

    return StreamedTensor(tensor, rows, dtype=kind, name=tensor.name or "")
