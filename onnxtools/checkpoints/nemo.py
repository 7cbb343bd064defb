"""Reads NeMo: .nemo archives (tar), their unpacked folders, and Lightning .ckpt files. It merges the ranks' shards."""

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
"""Most bytes of one header of a tar, which holds names but no files."""
_MAX_RATIO, _FREE = 100, 64 << 20
"""An archive may unpack to 64 MiB plus 100 times its size. gzip shrinks zeros 1000 times, weights 1.3 times."""
_TOKENIZER = {
    ("model", ".model"): "tokenizer.model",
    ("vocab_file", ".json"): "vocab.json",
    ("vocab_file", ".txt"): "vocab.txt",
    ("merge_file", ".txt"): "merges.txt",
}
"""File names beside the model, by the entry of the configuration's `tokenizer` and the suffix of the file it names."""
_NEW = "; export it from NeMo with `nemo.export` or convert it to a Hugging Face folder first"


def read_nemo(path: Path, *, weights: bool = True) -> Checkpoint:
    """Opens a .nemo archive or its unpacked folder.

    Args:
        path: the archive or folder.
        weights: False reads only the configuration; the vocabulary is then its `override_vocab_size`.

    Raises:
        ModelError: there is no configuration or no weights, a member is unsafe, or the format is that of NeMo 2.
    """
    with reading(path):
        members = _folder_members(path) if path.is_dir() else _archive_members(path)
    return _open(path, members, weights)


def read_ckpt(path: Path) -> Checkpoint:
    """Opens a Lightning checkpoint.

    Its weights are under `state_dict`. Its configuration is under `hyper_parameters`, or in a model_config.yaml beside
    it.

    Raises:
        ModelError: the file is damaged, or there is no configuration or no embedding.
    """
    with reading(path):
        content = read_torch(Region.of(path))
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds a {type(content).__name__}, not a checkpoint; save a state dict")
    config = nested(content, "hyper_parameters", "cfg") or nested(content, "hyper_parameters")
    beside = path.parent / "model_config.yaml"
    if not config and beside.is_file():
        config = _config(Region.of(member(path.parent, beside.name)))
    if not isinstance(config, dict):
        raise ModelError(f"{path}: has no hyper_parameters.cfg; put its model_config.yaml beside it")
    state = content.get("state_dict", content)
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
    """Returns the checkpoint. Its padded vocabulary size is the embedding's: the configuration does not hold it."""
    table = next((t for name, t in tensors.items() if name.endswith("embedding.word_embeddings.weight")), None)
    if table is None:
        raise ModelError(f"{path}: has no embedding.word_embeddings.weight; is it a GPT?")
    return Checkpoint(path, "megatron", {**config, "_vocab_size": int(table.shape.numpy()[0])}, tensors, files)


def _tokenizer(members: dict[str, Region], config: dict[str, Any]) -> dict[str, Path | bytes]:
    """Returns the tokenizer's files under Hugging Face's names.

    These are the files that the configuration names, and the files that have such a name in the archive. An archive may
    hold anything else, e.g. a package.json, which does not belong beside a model.
    """
    named: dict[str, str] = {}
    for entry, suffix in _TOKENIZER:
        value = nested(config, "tokenizer", entry)
        if isinstance(value, str) and value.endswith(suffix):
            named[value.removeprefix("nemo:")] = _TOKENIZER[entry, suffix]
    files: dict[str, Path | bytes] = {}
    for name, region in members.items():
        bare = re.sub(r"^[0-9a-f]{32}_", "", name)
        target = named.get(name) or (bare if bare in BESIDE else None)
        if target is not None:
            if region.size > _MAX_TOKENIZER:
                raise ModelError(
                    f"{region.label}: has {region.size} bytes, more than a tokenizer's file has; do not trust this "
                    "archive"
                )
            files[target] = region.read(0, region.size)
    return files


def _with_extra_state(shard: Any) -> dict[str, Any]:
    """Returns a shard's state: its tensors, and TransformerEngine's `_extra_state` of any type."""
    extra = (
        {name: value for name, value in shard.items() if name.endswith("_extra_state")}
        if isinstance(shard, dict)
        else {}
    )
    return {**state_dict(shard, "a shard"), **extra}


def _config(region: Region) -> dict[str, Any]:
    try:
        config = parse_yaml(region.read(0, min(region.size, MAX_YAML_BYTES + 1)))
    except ValueError as error:
        raise ModelError(
            f"{region.label}: its model_config.yaml is not YAML that is read ({error}); save the checkpoint again"
        ) from None
    if not isinstance(config, dict):
        raise ModelError(f"{region.label}: its model_config.yaml is no mapping; save the checkpoint again")
    return config


def _ranks(path: Path, members: dict[str, Region]) -> list[list[Region]]:
    """Returns the weight files as [pipeline rank][tensor rank]. A missing rank is an error."""
    if "model_weights.ckpt" in members:
        return [[members["model_weights.ckpt"]]]
    shards = {}
    for name, region in members.items():
        match = _SHARD.search(name)
        if match:
            tensor, pipeline, single = match.groups()
            shards[int(pipeline or 0), int(tensor if single is None else single)] = region
    if not shards:
        last = [region for name, region in members.items() if name.endswith(".ckpt") and "/" not in name]
        if len(last) == 1:
            return [last]
        raise ModelError(
            f"{path}: has no model_weights.ckpt and no mp_rank_XX or tp_rank_XX_pp_rank_XXX folders; check that the "
            "checkpoint is whole"
        )
    pipelines, tensors = (max(key[axis] for key in shards) + 1 for axis in (0, 1))
    absent = pipelines * tensors - len(shards)
    if absent:  # the search takes at most as many steps as there are shards, however large a claimed rank is
        p, t = next((p, t) for p in range(pipelines) for t in range(tensors) if (p, t) not in shards)
        raise ModelError(
            f"{path}: the shard of pipeline rank {p}, tensor rank {t} is missing ({absent} in all); fetch it"
        )
    return [[shards[p, t] for t in range(tensors)] for p in range(pipelines)]


def _folder_members(folder: Path) -> dict[str, Region]:
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    return {name: Region.of(member(folder, name)) for name in names}


def _archive_members(path: Path) -> dict[str, Region]:
    """Returns the members by name, without `./`.

    Those of a plain tar are read in place. Those of a compressed tar are extracted to a temporary folder.
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
    """The file that tarfile reads: it refuses headers of more than `_MAX_HEADER` bytes, and reads beyond `limit`."""

    def __init__(self, file: BinaryIO | gzip.GzipFile, whole: Region, limit: int | None = None) -> None:
        self._file, self._whole, self._limit = file, whole, limit

    def read(self, size: int = -1) -> bytes:
        """Returns at most `size` bytes. Raises ModelError if the size or the new position is beyond its limit."""
        if not 0 <= size <= _MAX_HEADER:
            raise ModelError(f"{self._whole.label}: a header in it claims {size} bytes; do not trust this file")
        self._check(self.tell() + size)
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET:
            self._check(offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Returns the position in the unpacked archive, in bytes."""
        return self._file.tell()

    def _check(self, end: int) -> None:
        if self._limit is not None and end > self._limit + tarfile.RECORDSIZE:
            raise ModelError(
                f"{self._whole.label}: its {self._whole.size} bytes unpack to more than {self._limit}, which no "
                "weights do; do not trust this file"
            )


def _members(whole: Region, archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yields the files of an archive with their names. Links, devices and paths that lead out of it are refused."""
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
    """Extracts the members to a temporary folder, which the process removes, or after a kill the next run."""
    folder = OwnFolder("onnxtools-nemo-")
    _folders.append(folder)
    room = shutil.disk_usage(folder.path).free
    members: dict[str, Region] = {}
    for name, entry in _members(whole, archive):
        room -= entry.size
        if room < 0:
            raise ModelError(
                f"{whole.label}: unpacked it needs more than the free space of {folder.path.parent}; free space there "
                "or unpack it elsewhere and name the folder"
            )
        source = archive.extractfile(entry)
        assert source is not None
        target = folder.path / f"{len(members)}"
        with open(target, "wb") as out:
            shutil.copyfileobj(source, out, _MAX_HEADER)
        members[name] = Region(target, 0, entry.size, f"{whole.label}: {name}")
    return members


_folders: list[OwnFolder] = []
"""Temporary folders that hold weights until the process ends."""
