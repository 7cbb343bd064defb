"""Writing models: atomic, streamed, and without copying what did not change.

Invariants of every save:
1. A reader sees the old file or the new one, never half of one: everything is written to `.NAME.PID.tmp` and renamed;
   the data file is renamed before the graph that refers to it. Where an older file is replaced, the new bytes are on
   the disk first, so a power cut leaves one of the two; a new file is as durable as after `cp`.
2. A data file that a graph in the folder refers to is never overwritten: a new one gets a free name, and the old one
   goes only when no graph in the folder mentions it any more.
3. A weight that no pass changed is not read: in the same folder the new graph refers to the old data file, elsewhere
   the kernel copies the bytes (`copy_file_range`, which shares extents where the file system can).
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from onnxtools.errors import JobError, ModelError
from onnxtools.model import Model
from onnxtools.progress import progress
from onnxtools.tensors import WORKERS, RowTensor, external_path, raw_bytes, read_rows, slabs, thread_scratch, write_bytes

ALIGNMENT = 4096
"""Offset alignment of weights of at least this size: lets file systems share extents and runtimes map pages."""
INLINE_BYTES = 1024
"""Smaller tensors stay in the graph file, as onnx's own `size_threshold` does."""
INLINE_TOTAL = 1 << 30
"""A model whose new weights exceed this gets a data file (a protobuf cannot exceed 2 GiB)."""


@dataclass
class SaveReport:
    """What a save did, for people: bytes written, bytes referred to, and where."""

    path: Path
    data_file: Path | None = None
    written_bytes: int = 0
    copied_bytes: int = 0
    referenced: set[str] = field(default_factory=set)
    left_out: tuple[str, int] | None = None

    def lines(self) -> Iterator[str]:
        if self.referenced:
            yield f"weights stay in {', '.join(sorted(self.referenced))} (not copied; --copy-weights makes the output self-contained)"
        if self.left_out is not None:
            yield f"no weights written: {self.left_out[0]} would hold {_size(self.left_out[1])}"
        if self.data_file is not None:
            made = f"{_size(self.written_bytes)} computed" if self.written_bytes else ""
            copied = f"{_size(self.copied_bytes)} copied" if self.copied_bytes else ""
            yield f"weights written to {self.data_file.name} ({', '.join(filter(None, (made, copied)))})"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success rename it over `path` (flushed first if `path` exists), else remove it.

    Raises:
        JobError: the folder is missing or not writable, or the disk is full.
    """
    refuse_special(path)
    tmp = temporary(path)
    _remove_orphans(path)
    try:
        yield tmp
        if path.exists():
            _flush(tmp)
        tmp.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        tmp.unlink(missing_ok=True)


def refuse_special(path: Path) -> None:
    """A device or a pipe must not be replaced by a file.

    Raises:
        JobError: `path` is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise JobError(f"{path}: is a device or a pipe, no file; name a file")


def _remove_orphans(path: Path) -> None:
    """Delete temporary files of `path` whose process is gone (killed in the middle of a save)."""
    for orphan in path.parent.glob(f".{glob.escape(path.name)}*.tmp"):
        pid = orphan.suffixes[-2].removeprefix(".") if len(orphan.suffixes) > 1 else ""
        if pid.isdigit() and not Path("/proc", pid).exists():
            orphan.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> JobError:
    reason = error.strerror or str(error)
    return JobError(f"{path}: cannot be written ({reason}); free space or choose another folder")


def _flush(path: Path) -> None:
    """Wait until the bytes of `path` are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@dataclass
class _Move:
    """One weight that goes into the new data file at `offset`."""

    values: list[ir.Value]
    tensor: ir.TensorProtocol
    offset: int = 0

    @property
    def is_copy(self) -> bool:
        return isinstance(self.tensor, ir.ExternalTensor)


def save(model: Model, path: Path, *, copy_weights: bool = False, weights: bool = True) -> SaveReport:
    """Write `model` to `path`; weights go where the rules above say.

    Args:
        copy_weights: put every external weight into the output's own data file.
        weights: False writes a graph that refers to a data file which is not written (shapes only).
    Returns:
        What was written, copied and referred to.
    Raises:
        JobError: the target cannot be written.
    """
    if not path.parent.is_dir():
        raise JobError(f"{path}: the folder {str(path.parent)!r} does not exist; create it first")
    if path.is_dir():
        raise JobError(f"{path}: is a folder; name a file")
    report = SaveReport(path)
    moves = _plan(model, path, copy_weights, weights, report)
    old_data = _referenced_files(path) if path.exists() else set()
    originals = [(value, value.const_value) for move in moves for value in move.values]
    with contextlib.ExitStack() as stack:
        if moves:
            data_file = _free_data_name(path)
            tmp = stack.enter_context(_new_data_file(data_file))
            if weights:
                report.data_file = data_file
                _fill(tmp, moves, report, data_file, flush=path.exists())
            else:
                report.left_out = (data_file.name, sum(move.tensor.nbytes for move in moves))
            for move in moves:
                _refer(move, data_file)
        try:
            # The data file gets its name first: a graph must never refer to a file that is not there.
            with replacing(path) as graph_tmp:
                graph_tmp.write_bytes(_serialize(model))
                if moves and weights:
                    tmp.replace(data_file)
        except BaseException:
            if moves and weights:
                data_file.unlink(missing_ok=True)
            for value, tensor in originals:
                value.const_value = tensor
            raise
    _remove_stale(old_data, path)
    return report


def _serialize(model: Model) -> bytes:
    proto = model.proto()
    try:
        return bytes(proto.SerializeToString())
    except Exception as error:
        raise JobError(f"{model.path}: the graph cannot be serialized ({error}); it may exceed protobuf's 2 GiB") from error


def _plan(model: Model, path: Path, copy_weights: bool, weights: bool, report: SaveReport) -> list[_Move]:
    """Decide for each weight: keep the reference, keep it inline, or move it to the new data file."""
    folder = path.parent.resolve()
    fresh: list[tuple[ir.Value, ir.TensorProtocol]] = []
    moving: list[tuple[ir.Value, ir.TensorProtocol]] = []
    has_external = False
    for value, tensor in model.weights():
        if isinstance(tensor, ir.ExternalTensor):
            has_external = True
            if not copy_weights and Path(tensor.base_dir).resolve() == folder:
                report.referenced.add(str(tensor.location))
            else:
                moving.append((value, tensor))
        elif tensor.nbytes >= INLINE_BYTES and tensor.dtype != ir.DataType.STRING:
            fresh.append((value, tensor))
            has_external |= _external_source(tensor)
    if has_external or not weights or sum(tensor.nbytes for _, tensor in fresh) > INLINE_TOTAL:
        moving.extend(fresh)
    return _layout(moving)


def file_stamps(path: Path) -> list[list[str | int]]:
    """Name, size and time of change of a model's files (hashing them would read them): of a graph and its data, or of all in a folder."""
    files = [path]
    if path.suffix == ".onnx":
        files += sorted({external_path(tensor) for tensor in Model.load(path).external_tensors()})
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _external_source(tensor: ir.TensorProtocol) -> bool:
    return isinstance(tensor, ir.ExternalTensor) or (isinstance(tensor, RowTensor) and any(map(_external_source, tensor.sources)))


def _layout(moving: list[tuple[ir.Value, ir.TensorProtocol]]) -> list[_Move]:
    """Give every distinct weight an offset; neighbours in one source file stay neighbours, so runs copy at once."""
    moves: list[_Move] = []
    by_source: dict[tuple[object, ...], _Move] = {}
    for value, tensor in moving:
        key: tuple[object, ...] = (id(tensor),)
        if isinstance(tensor, ir.ExternalTensor):
            key = (external_path(tensor), tensor.offset or 0, tensor.nbytes)
        if key in by_source:
            by_source[key].values.append(value)
            continue
        by_source[key] = _Move([value], tensor)
        moves.append(by_source[key])
    moves.sort(key=lambda m: (str(external_path(m.tensor)), m.tensor.offset or 0) if isinstance(m.tensor, ir.ExternalTensor) else ("", 0))
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


@contextlib.contextmanager
def _new_data_file(path: Path) -> Iterator[Path]:
    tmp = temporary(path)
    try:
        yield tmp
    finally:
        tmp.unlink(missing_ok=True)


def _fill(tmp: Path, moves: list[_Move], report: SaveReport, data_file: Path, *, flush: bool) -> None:
    try:
        _write_data(moves, tmp, report)
        if flush:
            _flush(tmp)
    except OSError as error:
        raise write_error(data_file, error) from error


def _write_data(moves: list[_Move], tmp: Path, report: SaveReport) -> None:
    total = max(move.offset + move.tensor.nbytes for move in moves)
    with open(tmp, "wb") as file:
        fd = file.fileno()
        os.truncate(fd, total)
        with progress("writing weights", sum(m.tensor.nbytes for m in moves)) as advance, ThreadPoolExecutor(WORKERS) as pool:
            jobs = [pool.submit(job, fd, advance) for job in _jobs(moves, report)]
            finished, pending = wait(jobs, return_when=FIRST_EXCEPTION)
            for future in pending:
                future.cancel()
            for future in finished:
                future.result()
    report.written_bytes = sum(m.tensor.nbytes for m in moves if not m.is_copy)
    report.copied_bytes = sum(m.tensor.nbytes for m in moves if m.is_copy)


_Job = Callable[[int, Callable[[int], None]], None]


def _jobs(moves: list[_Move], report: SaveReport) -> Iterator[_Job]:
    """Independent pieces of work, each writing its own byte range."""
    run: list[_Move] = []
    for move in [m for m in moves if m.is_copy]:
        if run and not _adjacent(run[-1], move):
            yield _copy_job(run)
            run = []
        run.append(move)
    if run:
        yield _copy_job(run)
    for move in (m for m in moves if not m.is_copy):
        yield _compute_job(move)


def _adjacent(a: _Move, b: _Move) -> bool:
    x, y = a.tensor, b.tensor
    assert isinstance(x, ir.ExternalTensor) and isinstance(y, ir.ExternalTensor)
    return external_path(x) == external_path(y) and (x.offset or 0) + x.nbytes == (y.offset or 0) and a.offset + x.nbytes == b.offset


def _copy_job(run: list[_Move]) -> _Job:
    first = run[0].tensor
    assert isinstance(first, ir.ExternalTensor)
    source, start, length = external_path(first), first.offset or 0, sum(m.tensor.nbytes for m in run)
    target = run[0].offset

    def job(fd: int, done: Callable[[int], None]) -> None:
        with open(source, "rb") as file:
            copy_range(file.fileno(), fd, start, target, length, done)

    return job


def copy_range(source: int, target: int, start: int, offset: int, length: int, done: Callable[[int], None]) -> None:
    """Copy bytes between open files inside the kernel; falls back to read and write where it cannot."""
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


_NO_RANGE_COPY = {18, 22, 38, 95}  # EXDEV, EINVAL, ENOSYS, EOPNOTSUPP


def _compute_job(move: _Move) -> _Job:
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


def _refer(move: _Move, data_file: Path) -> None:
    for value in move.values:
        tensor = move.tensor
        value.const_value = ir.ExternalTensor(
            data_file.name, move.offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(list(tensor.shape.numpy())),
            name=value.name or "", base_dir=data_file.parent,
        )  # fmt: skip


def _free_data_name(path: Path) -> Path:
    """`MODEL.onnx.data`, or `MODEL.onnx.N.data` while an earlier one is still in use."""
    candidate, index = path.with_name(f"{path.name}.data"), 1
    while candidate.exists():
        candidate, index = path.with_name(f"{path.name}.{index}.data"), index + 1
    return candidate


def _referenced_files(path: Path) -> set[str]:
    """Data files of ours (`NAME.data`, `NAME.N.data`) that the graph file at `path` mentions."""
    content = path.read_bytes() if path.stat().st_size < 2**31 else b""
    ours = [p.name for p in path.parent.glob(f"{glob.escape(path.name)}.*data")]
    return {name for name in ours if name.encode() in content}


def _remove_stale(names: set[str], path: Path) -> None:
    """Delete the replaced graph's own data files, unless some graph in the folder still mentions them."""
    for name in names:
        users = [p for p in path.parent.glob("*.onnx") if p.stat().st_size < 2**31 and name.encode() in p.read_bytes()]
        if not users:
            with contextlib.suppress(OSError):
                (path.parent / name).unlink()
