"""Merges the shards of tensor- and pipeline-parallel Megatron checkpoints lazily (FACTS 6.5, Megatron's layers)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxtools.base.errors import ModelError
from onnxtools.storage.lazy import hstack, row_range, vstack

_COLUMN = (
    "word_embeddings.weight",
    "output_layer.weight",
    "query_key_value",
    "linear_qkv",
    "layernorm_qkv",
    "dense_h_to_4h",
    "linear_fc1",
    "fc1_",
)
"""Weights that ranks split along the outputs (rows of [out, in]), with their biases."""
_ROW = ("dense.weight", "proj.weight", "dense_4h_to_h.weight", "linear_fc2.weight", "fc2_weight", "linear_proj.weight")
"""Weights that ranks split along the inputs (columns). Their biases are whole on every rank."""
_FC1 = ("dense_h_to_4h.", "linear_fc1.", "layernorm_mlp.fc1_")
_LAYER = re.compile(r"(\.layers\.)(\d+)(\.)")


def merge(stages: Sequence[Sequence[Mapping[str, Any]]], config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Returns one state dict from the state dicts of [pipeline rank][tensor rank].

    Args:
        stages: the state dicts.
        config: NeMo's configuration of the model.
        label: the name of the checkpoint in errors.

    Raises:
        ModelError: the tensor ranks do not hold the same names, the layers do not divide into the stages, or the
            pipeline is virtual.
    """
    if int(config.get("virtual_pipeline_model_parallel_size") or 1) > 1:
        raise ModelError(
            f"{label}: was trained with a virtual pipeline, whose order of layers is not supported; merge it with NeMo "
            "first"
        )
    state: dict[str, Any] = {}
    per_stage = int(config.get("num_layers") or 0) // len(stages)
    if len(stages) > 1 and per_stage * len(stages) != int(config.get("num_layers") or 0):
        raise ModelError(
            f"{label}: {config.get('num_layers')} layers do not divide into {len(stages)} pipeline stages; check "
            "model_config.yaml"
        )
    gated = str(config.get("activation", "gelu")).endswith("glu") and not any(
        ".dense_h_to_4h_2." in name for name in stages[0][0]
    )
    for rank, stage in enumerate(stages):
        for name in stage[0]:
            shards = [shard[name] for shard in stage if name in shard]
            if len(shards) < len(stage):
                raise ModelError(f"{label}: {name!r} is not in every tensor-parallel shard; fetch the checkpoint again")
            state.setdefault(_global_name(name, rank * per_stage), _merged(name, shards, config, gated))
    return state


def _global_name(name: str, first_layer: int) -> str:
    """Returns the name with its layer counted over all pipeline stages."""
    return _LAYER.sub(lambda match: f"{match[1]}{int(match[2]) + first_layer}{match[3]}", name)


def _by_parts(shards: list[Any], count: int, name: str) -> Any:
    """Merges shards of `count` equal parts each: the first parts of all shards, then the second ones, ..."""
    sizes = [int(shard.shape.numpy()[0]) // count for shard in shards]
    return vstack(
        [
            row_range(shard, i * size, (i + 1) * size)
            for i in range(count)
            for shard, size in zip(shards, sizes, strict=True)
        ],
        name,
    )


def _merged(name: str, shards: list[Any], config: Mapping[str, Any], gate_in_fc1: bool) -> Any:
    if len(shards) == 1 or not isinstance(shards[0], ir.TensorProtocol):
        return shards[0]
    if "layer_norm" in name or "layernorm.weight" in name or "layernorm.bias" in name:
        return shards[0]
    if any(part in name for part in _FC1) and gate_in_fc1:
        return _by_parts(shards, 2, name)  # every rank holds [its gate rows; its up rows]
    if "qkv" in name.replace("query_key_value", "qkv") and config.get("megatron_legacy"):
        return _by_parts(shards, 3, name)  # every rank holds [its queries; its keys; its values]
    if any(part in name for part in _COLUMN):
        return vstack(shards, name)
    if any(name.endswith(part) for part in _ROW):
        return hstack(shards, name)
    return shards[0]
