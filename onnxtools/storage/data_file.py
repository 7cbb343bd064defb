"""Lays out and writes a data file: the kernel copies source bytes, and computed weights are streamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxtools.base.errors import ModelError
from onnxtools.base.progress import progress
from onnxtools.storage.rows import (
    WORKERS,
    RowTensor,
    external_path,
    raw_bytes,
    read_rows,
    slabs,
    thread_scratch,
    write_bytes,
)

ALIGNMENT = 4096
"""Offset alignment of weights of at least this size: lets file systems share extents and runtimes map pages."""


@dataclass
class Move:
    """A byte range of the new data file, and the initializers that it holds.

    Attributes:
        values: the initializers and their tensors. All have the same bytes, each has its own type and shape.
        offset: where the bytes start in the new data file.
    """

    values: list[tuple[ir.Value, ir.TensorProtocol]]
    offset: int = 0

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The tensor whose bytes are written."""
        _, tensor = self.values[0]
        return tensor

    @property
    def is_copy(self) -> bool:
        """Whether the bytes already lie in a data file."""
        return isinstance(self.tensor, ir.ExternalTensor)


def layout(moving: list[tuple[ir.Value, ir.TensorProtocol]]) -> list[Move]:
    """Give every distinct weight an offset, in bytes.

    Neighbours in one source file stay neighbours, so that one copy moves a run of them. Weights with the same bytes in
    a source file share one `Move`.
    """
    moves: list[Move] = []
    by_source: dict[tuple[object, ...], Move] = {}
    for value, tensor in moving:
        key: tuple[object, ...] = (id(tensor),)
        if isinstance(tensor, ir.ExternalTensor):
            key = (external_path(tensor), tensor.offset or 0, tensor.nbytes)
        if key in by_source:
            by_source[key].values.append((value, tensor))
            continue
        by_source[key] = Move([(value, tensor)])
        moves.append(by_source[key])
    moves.sort(
        key=lambda m: (
            (str(external_path(m.tensor)), m.tensor.offset or 0) if isinstance(m.tensor, ir.ExternalTensor) else ("", 0)
        )
    )
    end, source_end = 0, None
    for move in moves:
        tensor = move.tensor
        if isinstance(tensor, ir.ExternalTensor):
            start = (external_path(tensor), tensor.offset or 0)
            if source_end is None or start != source_end:
                # Congruent offsets let the file system share extents instead of copying.
                end = -(-end // ALIGNMENT) * ALIGNMENT + (tensor.offset or 0) % ALIGNMENT
            source_end = (start[0], start[1] + tensor.nbytes)
        elif tensor.nbytes >= ALIGNMENT:
            end, source_end = -(-end // ALIGNMENT) * ALIGNMENT, None
        move.offset = end
        end += tensor.nbytes
    return moves


def write_data(moves: list[Move], tmp: Path) -> None:
    """Write the bytes of `moves` into the existing file `tmp`, with `WORKERS` threads.

    Raises:
        ModelError: a source file is too short, or a weight cannot be computed.
        OSError: the file cannot be written.
    """
    total = max(move.offset + move.tensor.nbytes for move in moves)
    with open(tmp, "rb+") as file:
        fd = file.fileno()
        os.truncate(fd, total)
        with (
            progress("writing weights", sum(m.tensor.nbytes for m in moves)) as advance,
            ThreadPoolExecutor(WORKERS) as pool,
        ):
            jobs = [pool.submit(job, fd, advance) for job in _jobs(moves)]
            finished, pending = wait(jobs, return_when=FIRST_EXCEPTION)
            for future in pending:
                future.cancel()
            for future in finished:
                future.result()


_Job = Callable[[int, Callable[[int], None]], None]


def _jobs(moves: list[Move]) -> Iterator[_Job]:
    """Yields independent jobs. Each writes its own byte range."""
    run: list[Move] = []
    for move in [m for m in moves if m.is_copy]:
        if run and not _adjacent(run[-1], move):
            yield _copy_job(run)
            run = []
        run.append(move)
    if run:
        yield _copy_job(run)
    for move in (m for m in moves if not m.is_copy):
        yield _compute_job(move)


def _adjacent(a: Move, b: Move) -> bool:
    x, y = a.tensor, b.tensor
    assert isinstance(x, ir.ExternalTensor) and isinstance(y, ir.ExternalTensor)
    return (
        external_path(x) == external_path(y)
        and (x.offset or 0) + x.nbytes == (y.offset or 0)
        and a.offset + x.nbytes == b.offset
    )


def _copy_job(run: list[Move]) -> _Job:
    first = run[0].tensor
    assert isinstance(first, ir.ExternalTensor)
    source, start, length = external_path(first), first.offset or 0, sum(m.tensor.nbytes for m in run)
    target = run[0].offset

    def job(fd: int, done: Callable[[int], None]) -> None:
        with open(source, "rb") as file:
            copy_range(file.fileno(), fd, start, target, length, done)

    return job


def copy_range(source: int, target: int, start: int, offset: int, length: int, done: Callable[[int], None]) -> None:
    """Copy bytes between open files inside the kernel; where it cannot, read and write them.

    Args:
        source: file descriptor to read.
        target: file descriptor to write.
        start: first byte in `source`.
        offset: first byte in `target`.
        length: bytes to copy.
        done: called with the bytes of each piece.

    Raises:
        ModelError: `source` ends early.
        OSError: reading or writing failed.
    """
    while length:
        size = min(length, 64 << 20)
        try:
            count = os.copy_file_range(source, target, size, start, offset)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_RANGE_COPY:
                raise
            buffer = os.pread(source, 8 << 20 if size > 8 << 20 else size, start)
            count = os.pwrite(target, buffer, offset) if buffer else 0
        if count == 0:
            raise ModelError(f"a data file ended {length} bytes early while it was copied; copy the model again")
        start, offset, length = start + count, offset + count, length - count
        done(count)


_NO_RANGE_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


def _compute_job(move: Move) -> _Job:
    tensor = move.tensor

    def job(fd: int, done: Callable[[int], None]) -> None:
        if not isinstance(tensor, RowTensor):
            write_bytes(fd, memoryview(tensor.tobytes()), move.offset)
            done(tensor.nbytes)
            return
        offset = move.offset
        for start, stop in slabs(tensor):
            data = raw_bytes(read_rows(tensor, start, stop, thread_scratch()))
            write_bytes(fd, data, offset)
            offset += data.nbytes
            done(data.nbytes)

    return job


def refer(move: Move, data_file: Path) -> None:
    """Make the initializers of `move` external tensors in `data_file`."""
    for value, tensor in move.values:
        value.const_value = ir.ExternalTensor(
            data_file.name, move.offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(list(tensor.shape.numpy())),
            name=value.name or "", base_dir=data_file.parent,
        )  # fmt: skip
