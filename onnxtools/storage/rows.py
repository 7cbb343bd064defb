"""Weights that are read a slab of rows at a time, so that no transform holds a whole tensor.

Every reader here reads into an ordinary buffer instead of a memory map: mapped pages count towards the resident set,
and a 10 GB model must pass through 200 MB.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxtools.base.errors import ModelError

SLAB_BYTES = 8 << 20
"""Bytes of source weights that each worker holds in memory at once."""
WORKERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that work on weights: at most the cores that Slurm, a container or `taskset` leaves to this process."""


def external_path(tensor: ir.ExternalTensor) -> Path:
    """Returns the path of the data file of `tensor` (its location is relative to the model's folder)."""
    return Path(tensor.base_dir) / tensor.location


def row_bytes(tensor: ir.TensorProtocol) -> int:
    """Returns the bytes of one row (all axes but the first); of the whole tensor if the rank is 0."""
    shape = tensor.shape.numpy()
    rows = shape[0] if shape else 1
    return tensor.nbytes // rows if rows else 0


def _working_bytes(tensor: ir.TensorProtocol) -> int:
    """Returns the bytes in memory for one row: of the tensor or of its largest source, whichever is more."""
    sources = tensor.sources if isinstance(tensor, RowTensor) else ()
    return max([row_bytes(tensor), *map(_working_bytes, sources)])


def slabs(tensor: ir.TensorProtocol, multiple: int = 1, limit: int = SLAB_BYTES) -> Iterator[tuple[int, int]]:
    """Yields ranges (start, stop) of rows of about `limit` bytes, whose starts are multiples of `multiple`."""
    shape = tensor.shape.numpy()
    rows = int(shape[0]) if shape else 1
    if isinstance(tensor, RowTensor):
        multiple = math.lcm(multiple, tensor.row_multiple)
    step = max(1, limit // max(1, _working_bytes(tensor)))
    step = max(multiple, step // multiple * multiple)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


class Scratch:
    """A buffer that one worker reuses for every slab: fresh pages for each slab cost more than the work on them."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def array(self, shape: list[int], dtype: np.dtype[Any]) -> np.ndarray:
        """Returns an uninitialized array in the buffer, which grows as needed. It is valid until the next call."""
        size = math.prod(shape) * dtype.itemsize
        if size > self._memory.nbytes:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size].view(dtype).reshape(shape)


class _Local(threading.local):
    def __init__(self) -> None:
        self.scratch = Scratch()


_local = _Local()


def thread_scratch() -> Scratch:
    """Returns the scratch of the calling thread."""
    return _local.scratch


def read_rows(tensor: ir.TensorProtocol, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
    """Returns the rows `start:stop` along the first axis, shape [stop - start, ...]. A scalar is one row, shape [1].

    The caller may overwrite the rows. With `scratch` they may lie in it. The type must have whole bytes: packed 4-bit
    tensors have no byte address for a row.

    Raises:
        ModelError: the data file ends early.
    """
    if isinstance(tensor, RowTensor):
        return tensor.rows(start, stop, scratch)
    shape = list(tensor.shape.numpy()) or [1]
    shape[0] = stop - start
    if isinstance(tensor, ir.ExternalTensor):
        dtype = tensor.dtype.numpy()
        out = np.empty(shape, dtype) if scratch is None else scratch.array(shape, dtype)
        raw = raw_bytes(out)
        with open(external_path(tensor), "rb", buffering=0) as file:
            file.seek((tensor.offset or 0) + start * row_bytes(tensor))
            read = 0
            while read < len(raw):
                count = file.readinto(raw[read:])
                if not count:
                    raise ModelError(
                        f"weight {tensor.name!r}: {external_path(tensor)} ended early; restore the data file"
                    )
                read += count
        return out
    array = tensor.numpy()
    return np.array(array.reshape(1) if array.ndim == 0 else array[start:stop])


def elements(tensor: ir.TensorProtocol) -> np.ndarray:
    """Returns all elements of a small weight of a whole-byte type. The caller may overwrite them."""
    shape = tuple(tensor.shape.numpy())
    return read_rows(tensor, 0, int(shape[0]) if shape else 1).reshape(shape)


RowFunction = Callable[[np.ndarray, int], np.ndarray]
"""(rows, index of the first row) -> the transformed rows, in place or new. The result must not depend on how the rows
were cut.
"""


class RowTensor(ir.LazyTensor):
    """A weight whose rows are computed on demand, so that it is never whole in memory.

    Subclasses implement `rows`. Only whole-byte types are supported.

    Args:
        shape: sizes of the axes.
        dtype: element type.
        name: the weight's name.
        sources: the weights that it is computed from.
        row_multiple: ranges of rows start on multiples of it, and end on multiples of it or at the last row.
    """

    __slots__ = ("row_multiple", "sources")

    row_multiple: int
    sources: tuple[ir.TensorProtocol, ...]

    def __init__(
        self,
        shape: Sequence[int],
        dtype: ir.DataType,
        name: str,
        sources: Sequence[ir.TensorProtocol] = (),
        row_multiple: int = 1,
    ) -> None:
        super().__init__(self._materialize, dtype=dtype, shape=ir.Shape(list(shape)), name=name)
        self.sources = tuple(sources)
        self.row_multiple = math.lcm(row_multiple, *(s.row_multiple for s in sources if isinstance(s, RowTensor)))

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        """Returns the rows `start:stop`, shape [stop - start, ...].

        The caller may overwrite them. They may lie in `scratch`.
        """
        raise NotImplementedError

    def _materialize(self) -> ir.TensorProtocol:
        parts = [self.rows(a, b) for a, b in slabs(self)]
        shape = list(self.shape.numpy())
        array = np.concatenate(parts).reshape(shape) if parts else np.empty(shape, self.dtype.numpy())
        return ir.Tensor(array, name=self.name, dtype=self.dtype)

    def tofile(self, file: BinaryIO) -> None:
        """Write the elements to `file` slab by slab, in ONNX's byte order."""
        for start, stop in slabs(self):
            file.write(raw_bytes(self.rows(start, stop)))


class StreamedTensor(RowTensor):
    """A weight that is a row-wise function of another weight. It is evaluated slab by slab while it is written.

    Args:
        source: the weight that is read. It is never changed.
        function: maps rows [r, ...] of `source` to rows [r, ...] of this tensor.
        dtype: element type of the result.
        row_multiple: slabs start and end on multiples of this many rows (4 when 2:4 groups lie along the rows).
        shape: shape of the result, by default the source's. The first axis must be the source's.
    """

    __slots__ = ("function",)

    def __init__(
        self, source: ir.TensorProtocol, function: RowFunction, *, dtype: ir.DataType, name: str,
        row_multiple: int = 1, shape: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(source.shape.numpy() if shape is None else shape, dtype, name, (source,), row_multiple)
        self.function = function

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        """Returns the rows `start:stop` of `function`, applied to the rows of the source."""
        return self.function(read_rows(self.sources[0], start, stop, scratch), start)


_CACHED = 1 << 15
"""Pairs of int4 elements that are packed at once, so that the temporaries stay in the cache."""


def raw_bytes(array: np.ndarray) -> memoryview:
    """Returns the bytes of `array` in ONNX order: little endian, row-major, int4 packed with the low nibble first.

    A contiguous array is not copied, except int4.
    """
    if array.dtype == ml_dtypes.int4:
        flat = array.reshape(-1).view(np.uint8)
        pairs = (np.append(flat, np.uint8(0)) if flat.size % 2 else np.ascontiguousarray(flat)).view("<u2")
        array = np.empty(len(pairs), np.uint8)
        for start in range(0, len(pairs), _CACHED):  # temporaries that stay in the cache
            part = pairs[start : start + _CACHED]
            array[start : start + _CACHED] = part & 15 | part >> 4 & 240
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_bytes(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of the open file `fd`."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
