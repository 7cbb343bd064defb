"""`Checkpoint`: the configuration of a model, and references to its weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxtools.base.errors import ModelError, one_line
from onnxtools.base.inputs import check_regular, shown

MAX_JSON_BYTES = 100 << 20
"""Larger configurations and headers are refused unread (the limit of the safetensors library)."""


@dataclass
class Checkpoint:
    """An opened checkpoint. Only its configuration and headers have been read.

    Attributes:
        path: the file or folder that the user named.
        architecture: Hugging Face's `model_type`, GGUF's `general.architecture`, or `megatron` for NeMo's GPT.
        config: the model's configuration in the terms of the format.
        tensors: weights by the checkpoint's names. Raw ones are references into the files, others are computed row by
            row.
        files: the files that belong beside an exported model (tokenizer, generation settings): path or content by name.
        notes: lines for the user.
        spare: names of tensors that may be left over.
    """

    path: Path
    architecture: str
    config: dict[str, Any]
    tensors: dict[str, ir.TensorProtocol]
    files: dict[str, Path | bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    spare: tuple[str, ...] = ()


@dataclass(frozen=True)
class Region:
    """A byte range of a file: a whole file, or an uncompressed member of an archive.

    Attributes:
        path: the file, without links.
        start: first byte.
        size: bytes.
        label: the name in errors.
    """

    path: Path
    start: int
    size: int
    label: str

    @classmethod
    def of(cls, path: Path) -> Region:
        """Returns the whole file. Links are followed, since ONNX refuses weights behind a link.

        Raises:
            ModelError: `path` is a folder, a pipe or a device.
            OSError: the file does not exist.
        """
        check_regular(path, ModelError)
        real = path.resolve()
        return cls(real, 0, real.stat().st_size, str(path))

    def read(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset` of the region.

        Raises:
            ModelError: the file ends early.
            OSError: the file cannot be read.
        """
        with open(self.path, "rb") as file:
            file.seek(self.start + offset)
            data = file.read(size)
        if len(data) < size:
            raise ModelError(f"{self.label}: ended {size - len(data)} bytes early; copy the checkpoint again")
        return data

    def tensor(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], offset: int) -> ir.ExternalTensor:
        """Returns a weight whose raw little-endian bytes start at `offset` of the region. It is not read.

        Raises:
            ModelError: the weight reaches beyond the region.
        """
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        if offset < 0 or min(shape, default=0) < 0 or offset + size > self.size:
            raise ModelError(
                f"{self.label}: tensor {shown(name)} needs bytes {shown(offset)} to {shown(offset + int(size))} of "
                f"{self.size};"
                " the file is truncated or damaged, fetch it again"
            )
        return ir.ExternalTensor(
            self.path.name, self.start + offset, int(size), dtype, shape=ir.Shape(shape), name=name,
            base_dir=self.path.parent,
        )  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in the file `path`.

    Raises:
        ModelError: the file is missing, unreadable, larger than `MAX_JSON_BYTES`, or holds no JSON object.
    """
    with reading(path):
        check_regular(path, ModelError)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: is {path.stat().st_size} bytes, too large for a configuration; check the file")
        return json_object(path.read_bytes(), str(path))


def member(folder: Path, name: str) -> Path:
    """Returns the path of the file `name` of a checkpoint's folder, with links resolved.

    Links are followed within the folder, and from a snapshot of the Hugging Face cache to the blobs of its own
    repository (huggingface_hub's guide "Understand caching": REPOSITORY/snapshots/REVISION/FILE ->
    REPOSITORY/blobs/HASH). Any other link could expose a file that the checkpoint's author never had.

    Raises:
        ModelError: a link leads elsewhere, to nothing, or in a circle.
    """
    path, home = folder / name, folder.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # absent: the caller that opens it reports that
        if path.is_symlink():
            raise ModelError(f"{path}: is a link to nothing; fetch the checkpoint again") from None
        return path
    snapshots = next((parent for parent in home.parents if parent.name == "snapshots"), None)
    homes = [home] if snapshots is None else [home, snapshots.parent / "blobs"]
    if not any(real.is_relative_to(allowed) for allowed in homes):
        raise ModelError(f"{path}: leads out of the checkpoint, to {real}; put the file itself there if you trust it")
    return real


def json_object(data: bytes, label: str) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        data: the text.
        label: names the data in errors.

    Raises:
        ModelError: `data` is no JSON object, or has a key twice in one object.
    """
    try:
        content = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{label}: not JSON ({one_line(error, 120)}); fetch the file again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{label}: holds a {type(content).__name__}, not a JSON object; fetch the file again")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs of one JSON object as a dict, or raises ValueError if a key repeats."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{shown(name)} stands twice in one object")
            seen.add(name)
    return entries


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the operating system about `path` into one line.

    Raises:
        ModelError: an OSError was raised inside.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise ModelError(f"{error.filename or path}: no such file; check the path") from None
    except OSError as error:
        raise ModelError(
            f"{error.filename or path}: cannot be read ({error.strerror or error}); check its permissions"
        ) from None


def nested(config: Mapping[str, Any], *keys: str) -> Any:
    """Returns `config[key][key]...`, or None if a key is missing."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
