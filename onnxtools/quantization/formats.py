"""Number formats of quantized values and weights, and weights that are quantized while they are written.

All are symmetric: x is stored as round(x / scale) to nearest even, saturated, as QuantizeLinear defines it; the zero point
is 0. A scale is rounded to the type it is stored in first, and the stored value is what weights are divided by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxtools.errors import ModelError
from onnxtools.fp8 import E4M3_MAX, to_e4m3
from onnxtools.tensors import StreamedTensor, read_rows, slabs

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
    return np.asarray(np.clip(np.rint(x), -128, 127).astype(np.int8))


def _to_int4(x: Array) -> Array:
    return np.asarray(np.clip(np.rint(x), -8, 7).astype(np.int8).astype(ml_dtypes.int4))


FP8 = Format("FP8 E4M3", ir.DataType.FLOAT8E4M3FN, E4M3_MAX, to_e4m3, 19)
INT8 = Format("INT8", ir.DataType.INT8, 127.0, _to_int8, 19)
INT4 = Format("INT4", ir.DataType.INT4, 7.0, _to_int4, 21)


def scale_of(amax: Array, form: Format, dtype: ir.DataType) -> Array:
    """amax / top in the stored type; 1 where all is zero, never so small that it is denormal."""
    scale = np.asarray(amax, np.float32) / np.float32(form.top)
    tiny = float(ml_dtypes.finfo(dtype.numpy()).tiny)  # type: ignore[no-untyped-call]
    return np.where(scale == 0, np.float32(1), np.maximum(scale, tiny)).astype(dtype.numpy())


def magnitudes(tensor: ir.TensorProtocol, axis: int, block: int = 0) -> Array:
    """Largest magnitude, float32: of each index of the other axis where `block` is 0, else of each block of `block` along `axis`.

    Args:
        tensor: a matrix; read a slab at a time.
        axis: the axis that is summed over in the product (K).
        block: must divide K. The result keeps the matrix's rank, with K / block along `axis`.
    Raises:
        ModelError: an element is infinite or NaN.
    """
    columns = int(tensor.shape.numpy()[1])
    parts = []
    for start, stop in slabs(tensor, block if block and axis == 0 else 1):
        size = np.abs(read_rows(tensor, start, stop)).astype(np.float32, copy=False)
        if block:
            shape = (stop - start, columns // block, block) if axis == 1 else ((stop - start) // block, block, columns)
            found = size.reshape(shape).max(axis=2 if axis == 1 else 1)
        else:
            found = size.max(axis=axis)
        if not np.isfinite(found).all():
            raise ModelError(f"weight {tensor.name!r} has infinite or NaN elements; restore it, or leave it out with --exclude")
        parts.append(found)
    if block or axis == 1:
        return np.concatenate(parts)
    return np.asarray(np.max(parts, axis=0))


def quantized(tensor: ir.TensorProtocol, form: Format, scale: Array, axis: int, block: int = 0) -> StreamedTensor:
    """`tensor` stored as `form`.

    Args:
        scale: one element; or one for each output channel (the axis that is not `axis`); or, with `block`, of the rank of
            the matrix, one for each block along `axis`.
    """
    wide = np.asarray(scale).astype(np.float32)

    def rows(part: Array, start: int) -> Array:
        return form.cast(_divided(part, _spread(wide, start, len(part), axis, block)))

    return StreamedTensor(tensor, rows, dtype=form.dtype, name=tensor.name or "", row_multiple=block if block and axis == 0 else 1)


def dequantized(stored: Array, scale: Array, axis: int, block: int = 0) -> Array:
    """What DequantizeLinear makes of all rows of a quantized matrix, float32."""
    wide = _spread(np.asarray(scale).astype(np.float32), 0, len(stored), axis, block)
    return np.asarray(stored.astype(np.float32) * wide)


def _spread(scale: Array, start: int, count: int, axis: int, block: int) -> Array:
    """The scale of each element of rows start : start + count, in a shape that broadcasts."""
    if scale.size == 1 and not block:
        return scale.reshape(())
    if not block:
        return scale[start : start + count, None] if axis == 1 else scale[None, :]
    if axis == 1:
        return np.repeat(scale[start : start + count], block, axis=1)
    return np.repeat(scale[start // block : -(-(start + count) // block)], block, axis=0)


def _divided(rows: Array, scale: Array) -> Array:
    """rows / scale in float32; what overflows saturates later."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(rows.astype(np.float32, copy=False) / scale)


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
