"""Writing models: atomic, streamed, and without copying what did not change.

Invariants of every save:
1. A reader sees the old file or the new one, never half of one: everything is written to temporary files and renamed,
   the graph last. If an older file is replaced, the new bytes are on the disk first, so a power cut leaves one of the
   two. A new file is as durable as after `cp`.
2. A data file is never overwritten: a new one takes a free name with O_EXCL, so two runs never share one. A graph
   records the data file that was written with it. That file is removed when the graph is replaced, unless another file
   of the folder mentions it. Nothing else is ever removed.
3. A weight that no pass changed is not read: in the same folder the new graph refers to the old data file; elsewhere
   the kernel copies the bytes (`copy_file_range`, which shares extents where the file system can).
4. The tokenizer's and other side files are renamed together with the graph, which records their hashes.
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
"""A model with more bytes of new weights gets a data file (a protobuf cannot exceed 2 GiB)."""


@dataclass
class SaveReport:
    """Report of a save, for people.

    Attributes:
        path: the graph file.
        data_file: the new data file, if any.
        written_bytes: bytes of computed weights in it.
        copied_bytes: bytes of copied weights in it.
        referenced: names of the existing data files that the graph refers to.
        left_out: name and bytes of a data file that was not written (`weights=False`).
        beside: the files that were written with the graph.
    """

    path: Path
    data_file: Path | None = None
    written_bytes: int = 0
    copied_bytes: int = 0
    referenced: set[str] = field(default_factory=set)
    left_out: tuple[str, int] | None = None
    beside: list[Path] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Yields the report, one sentence a line."""
        if self.referenced:
            yield (
                f"weights stay in {', '.join(sorted(self.referenced))} (not copied; --copy-weights makes the output "
                "self-contained)"
            )
        if self.left_out is not None:
            yield f"no weights written: {self.left_out[0]} would hold {_size(self.left_out[1])}"
        if self.data_file is not None:
            computed = f"{_size(self.written_bytes)} computed" if self.written_bytes else ""
            copied = f"{_size(self.copied_bytes)} copied" if self.copied_bytes else ""
            yield f"weights written to {self.data_file.name} ({', '.join(filter(None, (computed, copied)))})"


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
    """Write `model` to `path`, by the rules above.

    Args:
        origin: the file that `model` was read from, for errors.
        copy_weights: put every external weight into the output's own data file.
        weights: False writes a graph that refers to a data file which is not written (shapes only).
        beside: files that are renamed together with the graph.

    Returns:
        The bytes and files that were written, copied and referred to.

    Raises:
        JobError: the target cannot be written, or the graph exceeds 2 GiB.
        ModelError: a data file that the graph refers to is missing or too short, or a weight cannot be computed.
    """
    if path.is_dir():
        raise JobError(f"{path}: is a folder; name a file")
    refuse_special(path)
    new_folders = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            return _Save(model, path, origin, copy_weights, weights, beside or {}, stack).run()
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        for folder in new_folders:
            with contextlib.suppress(OSError):  # a folder that holds the model is not empty and stays
                folder.rmdir()


class _Save:
    """One save. `stack` removes the temporary files that were not renamed."""

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
        """Write the files. On failure, restore the model in memory."""
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
        """Write everything under temporary names, then rename the files."""
        data, name = self._data() if self.moves else (None, None)
        files = [
            self._file(name, content) for name, content in self.beside.items() if not self._is_there(name, content)
        ]
        self._record(name if data is not None else None, {file.path.name: file.tmp for file in files})
        graph = self._new(self.path)
        graph.tmp.write_bytes(_serialize(self.model, self.origin))
        try:
            if data is not None:
                data.commit(durable=self.durable, path=name)  # a graph must never refer to a missing file
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
        file = NewFile(path, self.token, like)
        self.stack.callback(file.close)
        return file

    def _data(self) -> tuple[NewFile | None, Path]:
        """Write the data file under its temporary name.

        Returns:
            The temporary file, or None if weights are left out, and the name reserved for it.
        """
        if real_target(self.path).parent.resolve() != self.path.parent.resolve():
            raise JobError(
                f"{self.path}: is a link into another folder, where the weights would not be found; name the file "
                "itself"
            )
        name = self._reserved()
        file = None
        if self.weights:
            file = self._new(self.path.with_name(f"{self.path.name}.data"), like=self.path)
            self.report.data_file = name
            write_data(self.moves, file.tmp)
            self.report.written_bytes = sum(move.tensor.nbytes for move in self.moves if not move.is_copy)
            self.report.copied_bytes = sum(move.tensor.nbytes for move in self.moves if move.is_copy)
        else:
            self.report.left_out = (name.name, sum(move.tensor.nbytes for move in self.moves))
        for move in self.moves:
            refer(move, name)
        return file, name

    def _reserved(self) -> Path:
        """Reserve `MODEL.onnx.data`, or `MODEL.onnx.N.data` if it is taken, by an empty file."""
        for name in _data_names(self.path):
            with contextlib.suppress(FileExistsError):
                fd = create(name, self.path)
                self.stack.callback(_release, name, fd)
                return name
        raise AssertionError

    def _is_there(self, name: str, content: Path | bytes) -> bool:
        """Whether the file already has this content, or is the source of the content."""
        target = self.path.with_name(name)
        if not target.is_file():
            return False
        if isinstance(content, Path) and content.resolve() == target.resolve():
            return True
        return target.read_bytes() == (content if isinstance(content, bytes) else content.read_bytes())

    def _file(self, name: str, content: Path | bytes) -> NewFile:
        file = self._new(self.path.with_name(name))
        file.tmp.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        return file

    def _record(self, data: Path | None, new: Mapping[str, Path]) -> None:
        """Record in the graph the files that belong to it. `new` maps names to temporary files."""
        beside = {name: sha256(new.get(name, self.path.with_name(name))) for name in self.beside}
        if data is not None or beside:
            self.model.metadata_props[FILES_KEY] = json.dumps(
                {"data": data.name if data is not None else "", "beside": beside}
            )


def _release(path: Path, fd: int) -> None:
    """Remove the empty file that reserved a name, unless another file replaced it."""
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
    """Embed the tensors of attributes that lie in data files which the output cannot refer to.

    They cannot become initializers, since functions have none.
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
    """Returns `model` as ONNX's own message. Weights in memory are evaluated, external ones stay references.

    Args:
        origin: the name of the model in errors.

    Raises:
        OnnxtoolsError: a weight cannot be computed, or onnx_ir cannot serialize the model.
    """
    try:
        return ir.to_proto(model)
    except Exception as error:  # onnx_ir wraps the error of a weight that cannot be computed
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
