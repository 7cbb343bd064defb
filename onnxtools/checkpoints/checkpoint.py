"""`Checkpoint`: the configuration of a model and where its weights lie."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import check_regular, shown

MAX_JSON_BYTES = 100 << 20
"""Configurations and headers beyond this size are refused unread (the limit of the safetensors library)."""


@dataclass
class Checkpoint:
    """An opened checkpoint; nothing but headers has been read.

    Attributes:
        path: what the user named.
        architecture: Hugging Face's `model_type`, GGUF's `general.architecture`, or `megatron` for NeMo's GPT.
        config: the model's configuration as the format spells it.
        tensors: by the checkpoint's own names; raw ones are references into the files, others are computed row by row.
        files: what belongs beside an exported model (tokenizer, generation settings): name to path or content.
        notes: what people should know about the reading.
    """

    path: Path
    architecture: str
    config: dict[str, Any]
    tensors: dict[str, ir.TensorProtocol]
    files: dict[str, Path | bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Region:
    """A byte range of a file: a whole file, or a member that lies uncompressed in an archive."""

    path: Path
    start: int
    size: int
    label: str

    @classmethod
    def of(cls, path: Path) -> Region:
        """The whole file; links are followed, since ONNX refuses weights behind a link.

        Raises:
            ModelError: it is a pipe or a device.
        """
        check_regular(path, ModelError)
        real = path.resolve()
        return cls(real, 0, real.stat().st_size, str(path))

    def read(self, offset: int, size: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.start + offset)
            data = file.read(size)
        if len(data) < size:
            raise ModelError(f"{self.label}: ended {size - len(data)} bytes early; copy the checkpoint again")
        return data

    def tensor(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], offset: int) -> ir.ExternalTensor:
        """A weight whose raw little-endian bytes start at `offset` of the region.

        Raises:
            ModelError: it reaches beyond the region.
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
    """A JSON object from a file of reasonable size.

    Raises:
        ModelError: missing, unreadable, too large, or no JSON object.
    """
    with reading(path):
        check_regular(path, ModelError)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: is {path.stat().st_size} bytes, too large for a configuration; check the file")
        return json_object(path.read_bytes(), str(path))


def member(folder: Path, name: str) -> Path:
    """The file `name` of a checkpoint's folder, behind any link.

    Links are followed within the folder, and from a snapshot of the Hugging Face cache to the blobs of its own
    repository (huggingface_hub's guide "Understand caching": REPOSITORY/snapshots/REVISION/FILE ->
    REPOSITORY/blobs/HASH). Any other link could hand out a file that the checkpoint's author has never had.

    Raises:
        ModelError: a link that leads elsewhere, or in a circle.
    """
    path, home = folder / name, folder.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # absent: whoever opens it says so
        if path.is_symlink():
            raise ModelError(f"{path}: is a link to nothing; fetch the checkpoint again") from None
        return path
    snapshots = next((parent for parent in home.parents if parent.name == "snapshots"), None)
    homes = [home] if snapshots is None else [home, snapshots.parent / "blobs"]
    if not any(real.is_relative_to(allowed) for allowed in homes):
        raise ModelError(f"{path}: leads out of the checkpoint, to {real}; put the file itself there if you trust it")
    return real


def json_object(data: bytes, label: str) -> dict[str, Any]:
    try:
        found = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{label}: not JSON ({' '.join(str(error).split())[:120]}); fetch the file again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{label}: holds a {type(found).__name__}, not a JSON object; fetch the file again")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{shown(name)} stands twice in one object")
            seen.add(name)
    return found


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system says about `path` into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise ModelError(f"{error.filename or path}: no such file; check the path") from None
    except OSError as error:
        raise ModelError(
            f"{error.filename or path}: cannot be read ({error.strerror or error}); check its permissions"
        ) from None


def nested(config: Mapping[str, Any], *keys: str) -> Any:
    """`config[key][key]...`, or None where a key is missing."""
    found: Any = config
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
