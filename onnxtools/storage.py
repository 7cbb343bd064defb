"""Writing models: atomic, streamed, and without copying what did not change.

Invariants of every save:
1. A reader sees the old file or the new one, never half of one: everything is written to temporary files and renamed, the
   graph last. Where an older file is replaced, the new bytes are on the disk first, so a power cut leaves one of the two; a
   new file is as durable as after `cp`.
2. A data file is never overwritten: a new one takes a free name with O_EXCL, so two runs never share one. A graph says
   which data file was written with it; that one goes when the graph is replaced, unless another file of the folder mentions
   it. Nothing else is ever removed.
3. A weight that no pass changed is not read: in the same folder the new graph refers to the old data file, elsewhere
   the kernel copies the bytes (`copy_file_range`, which shares extents where the file system can).
4. The tokenizer's and other side files get their names together with the graph, which records their hashes.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from onnxtools.base.errors import JobError, ModelError
from onnxtools.base.progress import progress
from onnxtools.files import NewFile, create, flush, naming, new_token, real_target, refuse_special, sweep, taken, temporary, write_error
from onnxtools.model import Model, check_external
from onnxtools.tensors import WORKERS, RowTensor, external_path, raw_bytes, read_rows, slabs, thread_scratch, write_bytes

ALIGNMENT = 4096
"""Offset alignment of weights of at least this size: lets file systems share extents and runtimes map pages."""
INLINE_BYTES = 1024
"""Smaller tensors stay in the graph file, as onnx's own `size_threshold` does."""
INLINE_TOTAL = 1 << 30
"""A model whose new weights exceed this gets a data file (a protobuf cannot exceed 2 GiB)."""
FILES_KEY = "onnxtools.files"
"""Metadata of the model: the data file that was written with the graph, and the sha256 of each file beside it."""
_NO_GRAPHS = {".data", ".bin", ".safetensors", ".gguf", ".pt", ".pth", ".ckpt", ".nemo", ".engine", ".plan", ".npz", ".npy"}
"""Suffixes of files that may be large and cannot mention a data file."""

Beside = Mapping[str, Path | bytes]
"""Files that belong to a model, by name: their content, or where it lies."""


@dataclass
class SaveReport:
    """What a save did, for people: bytes written, bytes referred to, and where."""

    path: Path
    data_file: Path | None = None
    written_bytes: int = 0
    copied_bytes: int = 0
    referenced: set[str] = field(default_factory=set)
    left_out: tuple[str, int] | None = None
    beside: list[Path] = field(default_factory=list)

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


@dataclass
class _Move:
    """Bytes that go into the new data file at `offset`, and the initializers that they are, each of its own type and shape."""

    values: list[tuple[ir.Value, ir.TensorProtocol]]
    offset: int = 0

    @property
    def tensor(self) -> ir.TensorProtocol:
        return self.values[0][1]

    @property
    def is_copy(self) -> bool:
        return isinstance(self.tensor, ir.ExternalTensor)


def save(model: Model, path: Path, *, copy_weights: bool = False, weights: bool = True, beside: Beside | None = None) -> SaveReport:
    """Write `model` to `path`; weights go where the rules above say.

    Args:
        copy_weights: put every external weight into the output's own data file.
        weights: False writes a graph that refers to a data file which is not written (shapes only).
        beside: files that get their names together with the graph.
    Returns:
        What was written, copied and referred to.
    Raises:
        JobError: the target cannot be written, or a data file that the graph refers to is gone meanwhile.
    """
    if path.is_dir():
        raise JobError(f"{path}: is a folder; name a file")
    refuse_special(path)
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            return _Save(model, path, copy_weights, weights, beside or {}, stack).run()
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds the model
                folder.rmdir()


class _Save:
    """One save. What it makes under temporary names goes with `stack`, where it has not got its name by then."""

    def __init__(self, model: Model, path: Path, copy_weights: bool, weights: bool, beside: Beside, stack: contextlib.ExitStack) -> None:
        self.model, self.path, self.weights, self.beside, self.stack = model, path, weights, beside, stack
        self.report, self.token = SaveReport(path), new_token()
        self.moves = _plan(model, path, copy_weights, weights, self.report)
        _embed_attributes(model, path.parent, copy_weights, self.report)
        self.durable = path.exists()

    def run(self) -> SaveReport:
        """Write, or leave the model in memory as it was."""
        _remove_leftovers(self.path, self.beside)
        recorded = self.model.ir.metadata_props.pop(FILES_KEY, None)
        try:
            self._write()
        except BaseException:
            for value, tensor in (pair for move in self.moves for pair in move.values):
                value.const_value = tensor
            self.model.ir.metadata_props.pop(FILES_KEY, None)
            if recorded is not None:
                self.model.ir.metadata_props[FILES_KEY] = recorded
            raise
        return self.report

    def _write(self) -> None:
        """Everything under temporary names, then the names."""
        data, name = self._data() if self.moves else (None, None)
        files = [self._file(name, content) for name, content in self.beside.items() if not self._is_there(name, content)]
        self._record(name if data is not None else None, {file.path.name: file.tmp for file in files})
        graph = self._new(self.path)
        graph.tmp.write_bytes(_serialize(self.model))
        try:
            if data is not None:
                data.commit(durable=self.durable, path=name)  # a graph must never refer to a file that is not there
            with naming(graph.path.parent):
                self._name(graph, files)
        except BaseException:
            if data is not None and not graph.is_named:
                data.path.unlink(missing_ok=True)
            raise
        self.report.beside = [self.path.with_name(name) for name in self.beside]

    def _name(self, graph: NewFile, files: Sequence[NewFile]) -> None:
        if self.weights:
            for tensor in self.model.external_tensors():
                check_external(tensor, self.path)
        stale = recorded_data(self.path)
        replaced = [(file, temporary(file.path, self.token, "old")) for file in files if file.path.exists()]
        try:
            for file, old in replaced:
                os.link(file.path, old)
            for file in files:
                file.commit(durable=self.durable)
            graph.commit(durable=self.durable)
        finally:
            for file, old in replaced:
                if old.exists() and not graph.is_named:
                    old.replace(file.path)
                old.unlink(missing_ok=True)
        if self.durable:
            flush(graph.path.parent)
        if stale:
            _remove_unmentioned(self.path.parent / stale)

    def _new(self, path: Path, like: Path | None = None) -> NewFile:
        made = NewFile(path, self.token, like)
        self.stack.callback(made.close)
        return made

    def _data(self) -> tuple[NewFile | None, Path]:
        """The data file under its temporary name, and the name that is reserved for it; no file where weights are left out."""
        if real_target(self.path).parent.resolve() != self.path.parent.resolve():
            raise JobError(f"{self.path}: is a link into another folder, where the weights would not be found; name the file itself")
        name = self._reserved()
        made = None
        if self.weights:
            made = self._new(self.path.with_name(f"{self.path.name}.data"), like=self.path)
            self.report.data_file = name
            _write_data(self.moves, made.tmp, self.report)
        else:
            self.report.left_out = (name.name, sum(move.tensor.nbytes for move in self.moves))
        for move in self.moves:
            _refer(move, name)
        return made, name

    def _reserved(self) -> Path:
        """`MODEL.onnx.data`, or `MODEL.onnx.N.data` where there is one: an empty file keeps the name for us."""
        for name in _data_names(self.path):
            with contextlib.suppress(FileExistsError):
                fd = create(name, self.path)
                self.stack.callback(_release, name, fd)
                return name
        raise AssertionError

    def _is_there(self, name: str, content: Path | bytes) -> bool:
        """Whether the file has this content already, or is its own source."""
        target = self.path.with_name(name)
        if not target.is_file():
            return False
        if isinstance(content, Path) and content.resolve() == target.resolve():
            return True
        return target.read_bytes() == (content if isinstance(content, bytes) else content.read_bytes())

    def _file(self, name: str, content: Path | bytes) -> NewFile:
        made = self._new(self.path.with_name(name))
        made.tmp.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        return made

    def _record(self, data: Path | None, new: Mapping[str, Path]) -> None:
        """Say in the graph what belongs to it; `new` files have temporary names."""
        beside = {name: sha256(new.get(name, self.path.with_name(name))) for name in self.beside}
        if data is not None or beside:
            self.model.ir.metadata_props[FILES_KEY] = json.dumps({"data": data.name if data is not None else "", "beside": beside})


def sha256(path: Path) -> str:
    """Of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _release(path: Path, fd: int) -> None:
    """Remove an empty file that kept a name, where nothing has taken it."""
    with contextlib.suppress(OSError):
        if os.fstat(fd).st_ino == path.stat().st_ino:
            path.unlink()
    os.close(fd)


def _data_names(path: Path) -> Iterator[Path]:
    yield path.with_name(f"{path.name}.data")
    for index in range(1, 1 << 30):
        yield path.with_name(f"{path.name}.{index}.data")


def recorded(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a graph says of its files: `data`, a name or "", and `beside`, name to sha256. Empty where it says nothing sensible."""
    try:
        found = json.loads(metadata.get(FILES_KEY, "{}"))
        data, beside = found.get("data", ""), found.get("beside", {})
    except (ValueError, AttributeError, RecursionError):
        return {"data": "", "beside": {}}
    plain = isinstance(data, str) and isinstance(beside, dict) and all(isinstance(text, str) for pair in beside.items() for text in pair)
    return {"data": data, "beside": beside} if plain and all(Path(name).name == name for name in (data, *beside) if name) else {"data": "", "beside": {}}


def files_of(path: Path) -> dict[str, Any]:
    """`recorded` of the graph in the file at `path`; no weight is read."""
    proto = onnx.ModelProto()
    try:
        if path.is_file() and path.stat().st_size < 1 << 31:
            proto.ParseFromString(path.read_bytes())
        return recorded({entry.key: entry.value for entry in proto.metadata_props})
    except Exception:  # protobuf raises its own; what is no graph records nothing
        return recorded({})


def recorded_data(path: Path) -> str:
    """The data file that was written with the graph at `path`; "" where there is none that we wrote."""
    name = str(files_of(path)["data"])
    return name if name in (file.name for file in path.parent.glob("*.data")) and name.startswith(f"{path.name}.") else ""


def _remove_unmentioned(data: Path) -> None:
    """Delete a data file of ours, unless some file in the folder still mentions it: a graph, a copy of one, or one that is being written."""
    if not any(_mentions(file, data.name.encode()) for file in data.parent.iterdir() if file.name != data.name):
        with contextlib.suppress(OSError):
            data.unlink()


def _mentions(file: Path, name: bytes) -> bool:
    if file.suffix in _NO_GRAPHS or (file.suffix == ".tmp" and ".data." in file.name) or file.is_symlink() or not file.is_file():
        return False
    try:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(name) >= 0
    except ValueError:  # an empty file cannot be mapped
        return False
    except OSError:
        return True  # it cannot be read, so it may


def _remove_leftovers(path: Path, beside: Beside) -> None:
    """What runs that were killed left of this output: temporary files, data files whose graph has no name yet, reserved names."""
    path = real_target(path)
    data: list[Path] = []
    for tmp in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with taken(tmp) as is_dead:
            if is_dead and (name := str(files_of(tmp)["data"])) and (path.parent / name).is_file():
                data.append(path.parent / name)
    sweep(path.parent, {path.name, f"{path.name}.data", *beside})
    for file in {*data, *path.parent.glob(f"{glob.escape(path.name)}.*data")}:
        with taken(file) as is_dead:
            if is_dead and file.is_file() and (file in data or not file.stat().st_size):
                _remove_unmentioned(file)


def _embed_attributes(model: Model, folder: Path, copy_weights: bool, report: SaveReport) -> None:
    """Tensors in data files that are attributes of nodes, where they cannot be referred to: functions have no initializers."""
    for attributes, name, tensor in model.external_attributes():
        if not copy_weights and Path(tensor.base_dir).resolve() == folder.resolve():
            report.referenced.add(str(tensor.location))
            continue
        check_external(tensor, folder)
        if tensor.nbytes > INLINE_TOTAL:
            raise JobError(f"{model.path}: the tensor {tensor.name!r} inside a function has {tensor.nbytes} bytes; inline the function first")
        attributes[name] = ir.AttrTensor(name, ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name))


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
            by_source[key].values.append((value, tensor))
            continue
        by_source[key] = _Move([(value, tensor)])
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


def _write_data(moves: list[_Move], tmp: Path, report: SaveReport) -> None:
    total = max(move.offset + move.tensor.nbytes for move in moves)
    with open(tmp, "rb+") as file:
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


_NO_RANGE_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


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
    for value, tensor in move.values:
        value.const_value = ir.ExternalTensor(
            data_file.name, move.offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(list(tensor.shape.numpy())),
            name=value.name or "", base_dir=data_file.parent,
        )  # fmt: skip
