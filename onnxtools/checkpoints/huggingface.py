"""Reads Hugging Face folders: config.json beside safetensors or .bin weights, one file or shards with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxtools.base.errors import ModelError
from onnxtools.checkpoints.checkpoint import Checkpoint, Region, member, read_json, reading
from onnxtools.checkpoints.quantized import METHODS, unpacked
from onnxtools.checkpoints.safetensors import read_safetensors, read_sharded
from onnxtools.checkpoints.torch_file import read_torch

BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt",
    "vocab.txt",
    "added_tokens.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
"""Files that are copied beside the exported model."""


def read_folder(folder: Path, *, weights: bool = True) -> Checkpoint:
    """Opens a folder written by `save_pretrained`.

    Args:
        folder: the folder.
        weights: False reads only the configuration.

    Raises:
        ModelError: there is no config.json or no weights, a file is damaged, or a link leads out of the folder (see
            `member`).
    """
    config = read_json(member(folder, "config.json"))
    files: dict[str, Path | bytes] = {name: path for name in BESIDE if (path := member(folder, name)).is_file()}
    if not config.get("model_type"):
        raise ModelError(f"{folder / 'config.json'}: names no model_type; fetch the configuration again")
    _check_task(folder, config)
    config = {
        **config,
        "_generation": read_json(member(folder, "generation_config.json")) if "generation_config.json" in files else {},
    }
    tensors = _weights(folder) if weights else {}
    quantization = _quantization(folder, config)
    if quantization is None or quantization.get("quant_method") not in METHODS:
        return Checkpoint(folder, str(config["model_type"]), config, tensors, files)
    config["quantization_config"] = None  # read here
    config["_quant_method"] = quantization["quant_method"]
    read = unpacked(tensors, quantization, str(folder))
    return Checkpoint(folder, str(config["model_type"]), config, read.tensors, files, read.notes, read.spare)


_TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice", "RewardModel")


def _check_task(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a decoder with another head than that of a language model."""
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else ""
    if isinstance(name, str) and name.endswith(_TASKS):
        raise ModelError(
            f"{folder}: is a {name}, with a head that gives no tokens; export a causal language model (...ForCausalLM)"
        )


def _quantization(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of a quantized checkpoint: of config.json, or of modelopt's hf_quant_config.json."""
    found = config.get("quantization_config")
    if isinstance(found, dict):
        return found
    file = member(folder, "hf_quant_config.json")
    if found is not None or not file.is_file():
        return None
    settings = read_json(file).get("quantization")
    return {"quant_method": "modelopt", **(settings if isinstance(settings, dict) else {})}


def _weights(folder: Path) -> dict[str, ir.TensorProtocol]:
    """Returns the weights of the first of transformers' file names that exists: later ones are leftovers of old saves.

    The order is that of transformers' modeling_utils.py, `_get_resolved_checkpoint_files`.
    """
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", _state)):
        if member(folder, name).is_file():
            return read(member(folder, name))
        if member(folder, f"{name}.index.json").is_file():
            return read_sharded(folder, f"{name}.index.json", read)
    raise ModelError(
        f"{folder}: has a config.json but neither model.safetensors nor pytorch_model.bin; fetch the weights (an "
        "unfetched LFS pointer has another name)"
    )


def _state(path: Path) -> dict[str, ir.TensorProtocol]:
    with reading(path):
        return state_dict(read_torch(Region.of(path)), str(path))


def state_dict(found: object, label: str) -> dict[str, ir.TensorProtocol]:
    """Returns the tensors of a loaded object, by name. Other values are left out.

    Args:
        found: the object, which must be a dict.
        label: the name of the file in errors.

    Raises:
        ModelError: the object is no dict.
    """
    if not isinstance(found, dict):
        raise ModelError(f"{label}: holds a {type(found).__name__}, not a state dict; save model.state_dict()")
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, (ir.ExternalTensor, ir.Tensor))}
