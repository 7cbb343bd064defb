"""NeMo: .nemo archives (tar), their unpacked folders, and Lightning .ckpt files; shards of several ranks are merged."""

from __future__ import annotations

import gzip
import io
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import onnx_ir as ir

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import MAX_YAML_BYTES, parse_yaml, shown
from onnxtools.checkpoints.checkpoint import Checkpoint, Region, member, nested, reading
from onnxtools.checkpoints.huggingface import BESIDE, state_dict
from onnxtools.checkpoints.megatron_shards import merge
from onnxtools.checkpoints.torch_file import read_torch
from onnxtools.storage.files import OwnFolder

_SHARD = re.compile(r"(?:tp_rank_(\d+)_pp_rank_(\d+)|mp_rank_(\d+))/[^/]+\.ckpt$")
_MAX_MEMBERS = 200_000
_MAX_TOKENIZER = 256 << 20
_MAX_HEADER = 16 << 20
"""Bytes of one header of a tar: its longest names, not its files."""
_MAX_RATIO, _FREE = 100, 64 << 20
"""How many times its compressed size an archive may hold, beyond the first 64 MiB; gzip shrinks zeros 1000 times,
weights 1.3 times.
"""
_TOKENIZER = {
    ("model", ".model"): "tokenizer.model",
    ("vocab_file", ".json"): "vocab.json",
    ("vocab_file", ".txt"): "vocab.txt",
    ("merge_file", ".txt"): "merges.txt",
}
"""Entry of the configuration's `tokenizer`, and suffix of the file that it names in the archive, to what it is called
beside the model.
"""
_NEW = "; export it from NeMo with `nemo.export` or convert it to a Hugging Face folder first"


def read_nemo(path: Path, *, weights: bool = True) -> Checkpoint:
    """Open a .nemo archive or its unpacked folder.

    Args:
        weights: False reads the configuration alone; the vocabulary is then its `override_vocab_size`.
    Raises:
        ModelError: no configuration, no weights, unsafe members, or a format of NeMo 2.
    """
    with reading(path):
        members = _folder_members(path) if path.is_dir() else _archive_members(path)
    return _open(path, members, weights)


def read_ckpt(path: Path) -> Checkpoint:
    """Open a Lightning checkpoint: weights under `state_dict`, the configuration under `hyper_parameters`, or in a
    model_config.yaml beside it.
    """
    with reading(path):
        found = read_torch(Region.of(path))
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds a {type(found).__name__}, not a checkpoint; save a state dict")
    config = nested(found, "hyper_parameters", "cfg") or nested(found, "hyper_parameters")
    beside = path.parent / "model_config.yaml"
    if not config and beside.is_file():
        config = _config(Region.of(member(path.parent, beside.name)))
    if not isinstance(config, dict):
        raise ModelError(f"{path}: has no hyper_parameters.cfg; put its model_config.yaml beside it")
    state = found.get("state_dict", found)
    return _checkpoint(path, config, merge([[_with_extra_state(state)]], config, str(path)), {})


def _open(path: Path, members: dict[str, Region], weights: bool) -> Checkpoint:
    config_name = next((name for name in ("model_config.yaml", "config.yaml") if name in members), None)
    if config_name is None:
        new = any(name.startswith(("weights/", "context/")) for name in members)
        unknown = "is a NeMo 2 checkpoint (weights/ and context/), which is not supported" + _NEW
        raise ModelError(f"{path}: {unknown if new else 'has no model_config.yaml'}")
    config = _config(members[config_name])
    if not weights:
        return Checkpoint(path, "megatron", {**config, "_vocab_size": config.get("override_vocab_size")}, {}, {})
    if any(name.startswith("model_weights/") for name in members):
        kind = "zarr" if any(name.endswith(".zarray") for name in members) else "torch_dist"
        raise ModelError(
            f"{path}: its weights are a distributed checkpoint ({kind}, model_weights/), which is not supported{_NEW}"
        )
    ranks = _ranks(path, members)
    stages = [[_with_extra_state(read_torch(region)) for region in stage] for stage in ranks]
    return _checkpoint(path, config, merge(stages, config, str(path)), _tokenizer(members, config))


def _checkpoint(
    path: Path, config: dict[str, Any], tensors: dict[str, ir.TensorProtocol], files: dict[str, Path | bytes]
) -> Checkpoint:
    """The padded vocabulary is the embedding's: the configuration does not hold it."""
    table = next((t for name, t in tensors.items() if name.endswith("embedding.word_embeddings.weight")), None)
    if table is None:
        raise ModelError(f"{path}: has no embedding.word_embeddings.weight; is it a GPT?")
    return Checkpoint(path, "megatron", {**config, "_vocab_size": int(table.shape.numpy()[0])}, tensors, files)


def _tokenizer(members: dict[str, Region], config: dict[str, Any]) -> dict[str, Path | bytes]:
    """The tokenizer's files under the names of Hugging Face: those that the configuration names, and those that have
    such a name.

    An archive may hold anything; what it calls package.json does not belong beside a model.
    """
    named: dict[str, str] = {}
    for entry, suffix in _TOKENIZER:
        value = nested(config, "tokenizer", entry)
        if isinstance(value, str) and value.endswith(suffix):
            named[value.removeprefix("nemo:")] = _TOKENIZER[entry, suffix]
    found: dict[str, Path | bytes] = {}
    for name, region in members.items():
        bare = re.sub(r"^[0-9a-f]{32}_", "", name)
        target = named.get(name) or (bare if bare in BESIDE else None)
        if target is not None:
            if region.size > _MAX_TOKENIZER:
                raise ModelError(
                    f"{region.label}: has {region.size} bytes, more than a tokenizer's file has; do not trust this "
                    "archive"
                )
            found[target] = region.read(0, region.size)
    return found


def _with_extra_state(found: Any) -> dict[str, Any]:
    """A shard's state: tensors, and TransformerEngine's `_extra_state` whatever it is."""
    extra = (
        {name: value for name, value in found.items() if name.endswith("_extra_state")}
        if isinstance(found, dict)
        else {}
    )
    return {**state_dict(found, "a shard"), **extra}


def _config(region: Region) -> dict[str, Any]:
    try:
        found = parse_yaml(region.read(0, min(region.size, MAX_YAML_BYTES + 1)))
    except ValueError as error:
        raise ModelError(
            f"{region.label}: its model_config.yaml is not YAML that is read ({error}); save the checkpoint again"
        ) from None
    if not isinstance(found, dict):
        raise ModelError(f"{region.label}: its model_config.yaml is no mapping; save the checkpoint again")
    return found


def _ranks(path: Path, members: dict[str, Region]) -> list[list[Region]]:
    """Weight files as [pipeline rank][tensor rank]; every rank must be there."""
    if "model_weights.ckpt" in members:
        return [[members["model_weights.ckpt"]]]
    found = {}
    for name, region in members.items():
        match = _SHARD.search(name)
        if match:
            tensor, pipeline, single = match.groups()
            found[int(pipeline or 0), int(tensor if single is None else single)] = region
    if not found:
        last = [region for name, region in members.items() if name.endswith(".ckpt") and "/" not in name]
        if len(last) == 1:
            return [last]
        raise ModelError(
            f"{path}: has no model_weights.ckpt and no mp_rank_XX or tp_rank_XX_pp_rank_XXX folders; check that the "
            "checkpoint is whole"
        )
    pipelines, tensors = (max(key[axis] for key in found) + 1 for axis in (0, 1))
    absent = pipelines * tensors - len(found)
    if absent:  # the first is found after as many looks as there are shards, however large a rank is claimed
        p, t = next((p, t) for p in range(pipelines) for t in range(tensors) if (p, t) not in found)
        raise ModelError(
            f"{path}: the shard of pipeline rank {p}, tensor rank {t} is missing ({absent} in all); fetch it"
        )
    return [[found[p, t] for t in range(tensors)] for p in range(pipelines)]


def _folder_members(folder: Path) -> dict[str, Region]:
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    return {name: Region.of(member(folder, name)) for name in names}


def _archive_members(path: Path) -> dict[str, Region]:
    """Members by name without `./`; read in place in a plain tar, extracted to a temporary folder from a compressed
    one.
    """
    whole = Region.of(path)
    with open(whole.path, "rb") as file:
        try:
            with tarfile.open(fileobj=_Headers(file, whole), mode="r:") as archive:
                return {
                    name: Region(whole.path, m.offset_data, _fits(whole, m), f"{path}: {name}")
                    for name, m in _members(whole, archive)
                }
        except tarfile.ReadError:
            file.seek(0)
        try:
            with (
                gzip.open(file) as unpacked,
                tarfile.open(fileobj=_Headers(unpacked, whole, _FREE + _MAX_RATIO * whole.size), mode="r:") as archive,
            ):
                return _extract(whole, archive)
        except (tarfile.ReadError, EOFError, OSError, zlib.error) as error:
            raise ModelError(
                f"{path}: neither a tar nor a gzip-compressed tar, or truncated ({error}); fetch it again"
            ) from None


class _Headers(io.RawIOBase):
    """What tarfile reads of an archive: no header of more than `_MAX_HEADER` bytes, nothing beyond `limit`."""

    def __init__(self, file: BinaryIO | gzip.GzipFile, whole: Region, limit: int | None = None) -> None:
        self._file, self._whole, self._limit = file, whole, limit

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise ModelError(f"{self._whole.label}: a header in it claims {size} bytes; do not trust this file")
        self._check(self.tell() + size)
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0:
            self._check(offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def _check(self, end: int) -> None:
        if self._limit is not None and end > self._limit + tarfile.RECORDSIZE:
            raise ModelError(
                f"{self._whole.label}: its {self._whole.size} bytes unpack to more than {self._limit}, which no "
                "weights do; do not trust this file"
            )


def _members(whole: Region, archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The files of an archive with their names in it; links, devices and ways out of it are refused."""
    for count, entry in enumerate(archive):
        if count == _MAX_MEMBERS:
            raise ModelError(
                f"{whole.label}: has more than {_MAX_MEMBERS} members, which no checkpoint has; do not trust this file"
            )
        if entry.isdir():
            continue
        name = PurePosixPath(entry.name)
        if name.is_absolute() or ".." in name.parts:
            raise ModelError(
                f"{whole.label}: its member {shown(entry.name)} leads out of the archive; do not trust this file"
            )
        if not entry.isreg() or entry.issparse():
            raise ModelError(
                f"{whole.label}: its member {shown(entry.name)} is a link, a device or sparse, no plain file; do not "
                "trust this file"
            )
        yield name.as_posix(), entry


def _fits(whole: Region, entry: tarfile.TarInfo) -> int:
    if entry.offset_data + entry.size > whole.size:
        raise ModelError(
            f"{whole.label}: its member {shown(entry.name)} claims {entry.size} bytes, more than the archive has; it "
            "is truncated, fetch it again"
        )
    return entry.size


def _extract(whole: Region, archive: tarfile.TarFile) -> dict[str, Region]:
    """The members as files of a temporary folder, which goes with the process, or with the next run after a kill."""
    own = OwnFolder("onnxtools-nemo-")
    _kept.append(own)
    room = shutil.disk_usage(own.path).free
    found: dict[str, Region] = {}
    for name, entry in _members(whole, archive):
        room -= entry.size
        if room < 0:
            raise ModelError(
                f"{whole.label}: unpacked it needs more than the free space of {own.path.parent}; free space there or "
                "unpack it elsewhere and name the folder"
            )
        source = archive.extractfile(entry)
        assert source is not None
        target = own.path / f"{len(found)}"
        with open(target, "wb") as out:
            shutil.copyfileobj(source, out, _MAX_HEADER)
        found[name] = Region(target, 0, entry.size, f"{whole.label}: {name}")
    return found


_kept: list[OwnFolder] = []
"""Folders that weights are read from until the process ends."""
