"""NeMo: .nemo archives (tar), their unpacked folders, and Lightning .ckpt files; shards of several ranks are merged."""

from __future__ import annotations

import atexit
import re
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import onnx_ir as ir
import yaml

from onnxtools.checkpoints.base import MAX_JSON_BYTES, Checkpoint, Region, nested, reading
from onnxtools.checkpoints.huggingface import state_dict
from onnxtools.checkpoints.megatron_shards import merge
from onnxtools.checkpoints.torch_file import read_torch
from onnxtools.errors import ModelError

_SHARD = re.compile(r"(?:tp_rank_(\d+)_pp_rank_(\d+)|mp_rank_(\d+))/[^/]+\.ckpt$")
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
    """Open a Lightning checkpoint: weights under `state_dict`, the configuration under `hyper_parameters`, or in a model_config.yaml beside it."""
    with reading(path):
        found = read_torch(Region.of(path))
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds a {type(found).__name__}, not a checkpoint; save a state dict")
    config = nested(found, "hyper_parameters", "cfg") or nested(found, "hyper_parameters")
    beside = path.parent / "model_config.yaml"
    if not config and beside.is_file():
        config = _config(Region.of(beside))
    if not isinstance(config, dict):
        raise ModelError(f"{path}: has no hyper_parameters.cfg; put its model_config.yaml beside it")
    state = found.get("state_dict", found)
    return _checkpoint(path, config, merge([[_with_extra_state(state)]], config, str(path)), {})


def _open(path: Path, members: dict[str, Region], weights: bool) -> Checkpoint:
    config_name = next((name for name in ("model_config.yaml", "config.yaml") if name in members), None)
    if config_name is None:
        new = any(name.startswith(("weights/", "context/")) for name in members)
        raise ModelError(f"{path}: {'is a NeMo 2 checkpoint (weights/ and context/), which is not supported' + _NEW if new else 'has no model_config.yaml'}")
    config = _config(members[config_name])
    if not weights:
        return Checkpoint(path, "megatron", {**config, "_vocab_size": config.get("override_vocab_size")}, {}, {})
    if any(name.startswith("model_weights/") for name in members):
        kind = "zarr" if any(name.endswith(".zarray") for name in members) else "torch_dist"
        raise ModelError(f"{path}: its weights are a distributed checkpoint ({kind}, model_weights/), which is not supported{_NEW}")
    ranks = _ranks(path, members)
    stages = [[_with_extra_state(read_torch(region)) for region in stage] for stage in ranks]
    files: dict[str, Path | bytes] = {}
    for name, region in members.items():
        if _is_tokenizer(name):
            files[re.sub(r"^[0-9a-f]{32}_", "", name)] = region.read(0, region.size)
    return _checkpoint(path, config, merge(stages, config, str(path)), files)


def _checkpoint(path: Path, config: dict[str, Any], tensors: dict[str, ir.TensorProtocol], files: dict[str, Path | bytes]) -> Checkpoint:
    """The padded vocabulary is the embedding's: the configuration does not hold it."""
    table = next((t for name, t in tensors.items() if name.endswith("embedding.word_embeddings.weight")), None)
    if table is None:
        raise ModelError(f"{path}: has no embedding.word_embeddings.weight; is it a GPT?")
    return Checkpoint(path, "megatron", {**config, "_vocab_size": int(table.shape.numpy()[0])}, tensors, files)


def _is_tokenizer(name: str) -> bool:
    return "/" not in name and name.endswith((".model", ".json", ".txt", ".bpe", ".vocab")) and not name.startswith("model_config")


def _with_extra_state(found: Any) -> dict[str, Any]:
    """A shard's state: tensors, and TransformerEngine's `_extra_state` whatever it is."""
    extra = {name: value for name, value in found.items() if name.endswith("_extra_state")} if isinstance(found, dict) else {}
    return {**state_dict(found, "a shard"), **extra}


def _config(region: Region) -> dict[str, Any]:
    if region.size > MAX_JSON_BYTES:
        raise ModelError(f"{region.label}: its configuration claims {region.size} bytes; do not trust this file")
    try:
        found = yaml.safe_load(region.read(0, region.size))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ModelError(f"{region.label}: its model_config.yaml is not plain YAML ({' '.join(str(error).split())[:120]})") from None
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
        raise ModelError(f"{path}: has no model_weights.ckpt and no mp_rank_XX or tp_rank_XX_pp_rank_XXX folders; check that the checkpoint is whole")
    pipelines, tensors = (max(key[axis] for key in found) + 1 for axis in (0, 1))
    missing = [key for key in ((p, t) for p in range(pipelines) for t in range(tensors)) if key not in found]
    if missing:
        raise ModelError(f"{path}: the shard of pipeline rank {missing[0][0]}, tensor rank {missing[0][1]} is missing ({len(missing)} in all); fetch it")
    return [[found[p, t] for t in range(tensors)] for p in range(pipelines)]


def _folder_members(folder: Path) -> dict[str, Region]:
    return {file.relative_to(folder).as_posix(): Region.of(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def _archive_members(path: Path) -> dict[str, Region]:
    """Members by name without `./`; read in place in a plain tar, extracted to a temporary folder from a compressed one."""
    whole = Region.of(path)
    try:
        with tarfile.open(path, "r:") as archive:
            members = {_safe_name(path, member): member for member in archive.getmembers() if not member.isdir()}
            return {name: Region(whole.path, m.offset_data, _fits(whole, m), f"{path}: {name}") for name, m in members.items()}
    except tarfile.ReadError:
        pass
    try:
        with tarfile.open(path, "r:gz") as archive:
            return _extract(path, archive)
    except (tarfile.ReadError, EOFError, OSError) as error:
        raise ModelError(f"{path}: neither a tar nor a gzip-compressed tar, or truncated ({error}); fetch it again") from None


def _fits(whole: Region, member: tarfile.TarInfo) -> int:
    if member.offset_data + member.size > whole.size or member.issparse():
        raise ModelError(f"{whole.label}: its member {member.name!r} claims {member.size} bytes, more than the archive has; it is truncated, fetch it again")
    return member.size


def _safe_name(path: Path, member: tarfile.TarInfo) -> str:
    """The member's name inside the archive; links, devices and ways out of it are refused."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise ModelError(f"{path}: its member {member.name!r} leads out of the archive; do not trust this file")
    if not member.isreg():
        raise ModelError(f"{path}: its member {member.name!r} is a link or device, not a file; do not trust this file")
    return name.as_posix()


def _extract(path: Path, archive: tarfile.TarFile) -> dict[str, Region]:
    folder = Path(tempfile.mkdtemp(prefix="onnxtools-nemo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    room = shutil.disk_usage(folder).free
    found: dict[str, Region] = {}
    for member in archive:
        if member.isdir():
            continue
        name = _safe_name(path, member)
        room -= member.size
        if room < 0:
            raise ModelError(
                f"{path}: unpacked it needs more than the free space of {folder.parent}; free space there or unpack it elsewhere and name the folder"
            )
        source = archive.extractfile(member)
        assert source is not None
        target = folder / f"{len(found)}"
        with open(target, "wb") as out:
            shutil.copyfileobj(source, out, 16 << 20)
        found[name] = Region(target, 0, member.size, f"{path}: {name}")
    return found
