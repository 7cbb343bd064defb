"""Weights that are read a slab of rows at a time, so that no transform holds a whole tensor.

Every reader here uses `pread` into an ordinary buffer instead of a memory map: mapped pages count towards the
resident set, and a 10 GB model must pass through 200 MB.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from onnxtools.errors import ModelError

SLAB_BYTES = 8 << 20
"""Bytes of source weight that are in memory at once for each worker."""


def external_path(tensor: ir.ExternalTensor) -> Path:
    """The data file of `tensor` (its location is relative to the model's folder)."""
    return Path(tensor.base_dir) / tensor.location


def row_bytes(tensor: ir.TensorProtocol) -> int:
    """Bytes of one row (all axes but the first); the whole tensor where the rank is 0."""
    shape = tensor.shape.numpy()
    rows = shape[0] if shape else 1
    return tensor.nbytes // rows if rows else 0


def slabs(tensor: ir.TensorProtocol, multiple: int = 1, limit: int = SLAB_BYTES) -> Iterator[tuple[int, int]]:
    """Cut the rows of `tensor` into ranges of about `limit` bytes whose bounds are multiples of `multiple`."""
    shape = tensor.shape.numpy()
    rows = int(shape[0]) if shape else 1
    step = max(1, limit // max(1, row_bytes(tensor)))
    step = max(multiple, step // multiple * multiple)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def read_rows(tensor: ir.TensorProtocol, start: int, stop: int) -> np.ndarray:
    """Rows `start:stop` along the first axis, shape [stop - start, ...]; a scalar counts as one row, shape [1].

    Only whole-byte dtypes: packed 4-bit tensors have no byte address for a row.
    """
    if isinstance(tensor, StreamedTensor):
        return tensor.rows(start, stop)
    shape = list(tensor.shape.numpy()) or [1]
    shape[0] = stop - start
    if isinstance(tensor, ir.ExternalTensor):
        out = np.empty(shape, dtype=tensor.dtype.numpy())
        raw = raw_bytes(out)
        with open(external_path(tensor), "rb", buffering=0) as file:
            file.seek((tensor.offset or 0) + start * row_bytes(tensor))
            read = 0
            while read < len(raw):
                count = file.readinto(raw[read:])
                if not count:
                    raise ModelError(f"weight {tensor.name!r}: {external_path(tensor)} ended early; restore the data file")
                read += count
        return out
    array = tensor.numpy()
    return array.reshape(1) if array.ndim == 0 else array[start:stop]


RowFunction = Callable[[np.ndarray, int], np.ndarray]
"""(rows, index of the first row) -> the transformed rows; must not depend on how rows were cut."""


class StreamedTensor(ir.LazyTensor):
    """A weight defined as a row-wise function of another weight; evaluated slab by slab while it is written.

    Args:
        source: the weight that is read, never changed.
        function: maps rows [r, ...] of `source` to rows [r, ...] of this tensor.
        dtype: element type of the result (whole-byte types only).
        row_multiple: slabs start and end on multiples of this many rows (4 when 2:4 groups lie along the rows).
        shape: of the result, the source's by default; the first axis must be the source's.
    """

    __slots__ = ("function", "row_multiple", "source")

    row_multiple: int

    def __init__(
        self, source: ir.TensorProtocol, function: RowFunction, *, dtype: ir.DataType, name: str,
        row_multiple: int = 1, shape: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        sizes = list(source.shape.numpy()) if shape is None else list(shape)
        super().__init__(self._materialize, dtype=dtype, shape=ir.Shape(sizes), name=name)
        self.source = source
        self.function = function
        inner = source.row_multiple if isinstance(source, StreamedTensor) else 1
        self.row_multiple = math.lcm(row_multiple, inner)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.function(read_rows(self.source, start, stop), start)

    def _materialize(self) -> ir.TensorProtocol:
        parts = [self.rows(a, b) for a, b in slabs(self.source, self.row_multiple)]
        shape = list(self.shape.numpy())
        array = np.concatenate(parts).reshape(shape) if parts else np.empty(shape, self.dtype.numpy())
        return ir.Tensor(array, name=self.name, dtype=self.dtype)

    def tofile(self, file: BinaryIO) -> None:
        for start, stop in slabs(self.source, self.row_multiple):
            file.write(raw_bytes(self.rows(start, stop)))


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of `array` in ONNX order (little endian, row-major) without a copy where it is contiguous."""
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_rows(fd: int, array: np.ndarray, offset: int) -> None:
    """Write all of `array` at `offset` of the open file `fd`."""
    view = raw_bytes(array)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
