"""Writing models: atomic, streamed, and without copying what did not change.

Invariants of every save:
1. A reader sees the old file or the new one, never half of one: everything is written to temporary files and renamed,
   the graph last. Where an older file is replaced, the new bytes are on the disk first, so a power cut leaves one of
   the two; a new file is as durable as after `cp`.
2. A data file is never overwritten: a new one takes a free name with O_EXCL, so two runs never share one. A graph says
   which data file was written with it; that one goes when the graph is replaced, unless another file of the folder
   mentions it. Nothing else is ever removed.
3. A weight that no pass changed is not read: in the same folder the new graph refers to the old data file, elsewhere
   the kernel copies the bytes (`copy_file_range`, which shares extents where the file system can).
4. The tokenizer's and other side files get their names together with the graph, which records their hashes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir

from onnxtools.base.errors import JobError, ModelError, OnnxtoolsError, one_line
from onnxtools.storage.data_file import Move, layout, refer, write_data
from onnxtools.storage.external import check_external, external_attributes, external_tensors
from onnxtools.storage.external import weights as weights_of
from onnxtools.storage.files import (
    NewFile,
    create,
    flush,
    naming,
    new_token,
    real_target,
    refuse_special,
    temporary,
    write_error,
)
from onnxtools.storage.leftovers import remove_leftovers, remove_unmentioned
from onnxtools.storage.records import FILES_KEY, Beside, recorded_data, sha256
from onnxtools.storage.rows import RowTensor

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
    beside: list[Path] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        if self.referenced:
            yield (
                f"weights stay in {', '.join(sorted(self.referenced))} (not copied; --copy-weights makes the output "
                "self-contained)"
            )
        if self.left_out is not None:
            yield f"no weights written: {self.left_out[0]} would hold {_size(self.left_out[1])}"
        if self.data_file is not None:
            made = f"{_size(self.written_bytes)} computed" if self.written_bytes else ""
            copied = f"{_size(self.copied_bytes)} copied" if self.copied_bytes else ""
            yield f"weights written to {self.data_file.name} ({', '.join(filter(None, (made, copied)))})"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def save(
    model: ir.Model,
    path: Path,
    *,
    origin: Path | None = None,
    copy_weights: bool = False,
    weights: bool = True,
    beside: Beside | None = None,
) -> SaveReport:
    """Write `model` to `path`; weights go where the rules above say.

    Args:
        origin: the file that `model` was read from, for errors.
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
            return _Save(model, path, origin, copy_weights, weights, beside or {}, stack).run()
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds the model
                folder.rmdir()


class _Save:
    """One save. What it makes under temporary names goes with `stack`, where it has not got its name by then."""

    def __init__(
        self,
        model: ir.Model,
        path: Path,
        origin: Path | None,
        copy_weights: bool,
        weights: bool,
        beside: Beside,
        stack: contextlib.ExitStack,
    ) -> None:
        self.model, self.path, self.origin, self.weights, self.beside, self.stack = (
            model,
            path,
            origin,
            weights,
            beside,
            stack,
        )
        self.report, self.token = SaveReport(path), new_token()
        self.moves = _plan(model, path, copy_weights, weights, self.report)
        _embed_attributes(model, path.parent, origin, copy_weights, self.report)
        self.durable = path.exists()

    def run(self) -> SaveReport:
        """Write, or leave the model in memory as it was."""
        remove_leftovers(self.path, self.beside)
        recorded = self.model.metadata_props.pop(FILES_KEY, None)
        try:
            self._write()
        except BaseException:
            for value, tensor in (pair for move in self.moves for pair in move.values):
                value.const_value = tensor
            self.model.metadata_props.pop(FILES_KEY, None)
            if recorded is not None:
                self.model.metadata_props[FILES_KEY] = recorded
            raise
        return self.report

    def _write(self) -> None:
        """Everything under temporary names, then the names."""
        data, name = self._data() if self.moves else (None, None)
        files = [
            self._file(name, content) for name, content in self.beside.items() if not self._is_there(name, content)
        ]
        self._record(name if data is not None else None, {file.path.name: file.tmp for file in files})
        graph = self._new(self.path)
        graph.tmp.write_bytes(_serialize(self.model, self.origin))
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
            for tensor in external_tensors(self.model):
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
            remove_unmentioned(self.path.parent / stale)

    def _new(self, path: Path, like: Path | None = None) -> NewFile:
        made = NewFile(path, self.token, like)
        self.stack.callback(made.close)
        return made

    def _data(self) -> tuple[NewFile | None, Path]:
        """The data file under its temporary name, and the name that is reserved for it; no file where weights are left
        out.
        """
        if real_target(self.path).parent.resolve() != self.path.parent.resolve():
            raise JobError(
                f"{self.path}: is a link into another folder, where the weights would not be found; name the file "
                "itself"
            )
        name = self._reserved()
        made = None
        if self.weights:
            made = self._new(self.path.with_name(f"{self.path.name}.data"), like=self.path)
            self.report.data_file = name
            write_data(self.moves, made.tmp)
            self.report.written_bytes = sum(move.tensor.nbytes for move in self.moves if not move.is_copy)
            self.report.copied_bytes = sum(move.tensor.nbytes for move in self.moves if move.is_copy)
        else:
            self.report.left_out = (name.name, sum(move.tensor.nbytes for move in self.moves))
        for move in self.moves:
            refer(move, name)
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
            self.model.metadata_props[FILES_KEY] = json.dumps(
                {"data": data.name if data is not None else "", "beside": beside}
            )


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


def _embed_attributes(
    model: ir.Model, folder: Path, origin: Path | None, copy_weights: bool, report: SaveReport
) -> None:
    """Tensors in data files that are attributes of nodes, where they cannot be referred to: functions have no
    initializers.
    """
    for attributes, name, tensor in external_attributes(model):
        if not copy_weights and Path(tensor.base_dir).resolve() == folder.resolve():
            report.referenced.add(str(tensor.location))
            continue
        check_external(tensor, folder)
        if tensor.nbytes > INLINE_TOTAL:
            raise JobError(
                f"{origin}: the tensor {tensor.name!r} inside a function has {tensor.nbytes} bytes; inline the "
                "function first"
            )
        attributes[name] = ir.AttrTensor(name, ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name))


def to_proto(model: ir.Model, origin: Path | None) -> onnx.ModelProto:
    """`model` as ONNX's own message, weights in memory evaluated; `origin` names it in errors.

    Raises:
        OnnxtoolsError: a weight cannot be computed.
    """
    try:
        return ir.to_proto(model)
    except Exception as error:  # onnx_ir wraps what a weight raises while it is computed
        cause: BaseException = error
        while not isinstance(cause, OnnxtoolsError) and (deeper := cause.__cause__ or cause.__context__) is not None:
            cause = deeper
        if isinstance(cause, OnnxtoolsError):
            raise cause from None
        raise ModelError(f"{origin}: cannot be written as ONNX ({one_line(cause)}); export the model again") from error


def _serialize(model: ir.Model, origin: Path | None) -> bytes:
    proto = to_proto(model, origin)
    try:
        return bytes(proto.SerializeToString())
    except Exception as error:
        raise JobError(f"{origin}: the graph cannot be serialized ({error}); it may exceed protobuf's 2 GiB") from error


def _plan(model: ir.Model, path: Path, copy_weights: bool, weights: bool, report: SaveReport) -> list[Move]:
    """Decide for each weight: keep the reference, keep it inline, or move it to the new data file."""
    folder = path.parent.resolve()
    fresh: list[tuple[ir.Value, ir.TensorProtocol]] = []
    moving: list[tuple[ir.Value, ir.TensorProtocol]] = []
    has_external = False
    for value, tensor in weights_of(model):
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
    return layout(moving)


def _external_source(tensor: ir.TensorProtocol) -> bool:
    return isinstance(tensor, ir.ExternalTensor) or (
        isinstance(tensor, RowTensor) and any(map(_external_source, tensor.sources))
    )
