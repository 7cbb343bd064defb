"""Hugging Face folders: config.json beside safetensors or .bin weights, one file or shards with an index."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from onnxtools.checkpoints.base import Checkpoint, Region, read_json, reading
from onnxtools.checkpoints.safetensors import read_safetensors, read_sharded, weight_map
from onnxtools.checkpoints.torch_file import read_torch
from onnxtools.errors import ModelError

BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt",
    "added_tokens.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
"""Files that are copied beside the exported model."""


def read_folder(folder: Path, *, weights: bool = True) -> Checkpoint:
    """Open a folder written by `save_pretrained`; with `weights=False` only its configuration.

    Raises:
        ModelError: no config.json, no weights, or damaged files.
    """
    config = read_json(folder / "config.json")
    files: dict[str, Path | bytes] = {name: folder / name for name in BESIDE if (folder / name).is_file()}
    if not config.get("model_type"):
        raise ModelError(f"{folder / 'config.json'}: names no model_type; fetch the configuration again")
    config = {**config, "_generation": read_json(folder / "generation_config.json") if "generation_config.json" in files else {}}
    return Checkpoint(folder, str(config["model_type"]), config, _weights(folder) if weights else {}, files)


def _weights(folder: Path) -> dict[str, ir.TensorProtocol]:
    if (folder / "model.safetensors.index.json").is_file():
        return read_sharded(folder / "model.safetensors.index.json")
    if (folder / "model.safetensors").is_file():
        return read_safetensors(folder / "model.safetensors")
    if (folder / "pytorch_model.bin.index.json").is_file():
        places = weight_map(folder / "pytorch_model.bin.index.json")
        shards = [_state(folder / file) for file in sorted(set(places.values()))]
        return {name: tensor for shard in shards for name, tensor in shard.items()}
    if (folder / "pytorch_model.bin").is_file():
        return _state(folder / "pytorch_model.bin")
    raise ModelError(
        f"{folder}: has a config.json but neither model.safetensors nor pytorch_model.bin; fetch the weights (an unfetched LFS pointer has another name)"
    )


def _state(path: Path) -> dict[str, ir.TensorProtocol]:
    with reading(path):
        return state_dict(read_torch(Region.of(path)), str(path))


def state_dict(found: object, label: str) -> dict[str, ir.TensorProtocol]:
    """The tensors of a loaded object, which must map names to tensors."""
    if not isinstance(found, dict):
        raise ModelError(f"{label}: holds a {type(found).__name__}, not a state dict; save model.state_dict()")
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, (ir.ExternalTensor, ir.Tensor))}
