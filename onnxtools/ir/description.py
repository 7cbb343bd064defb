"""The model's own description: `onnxtools.model` in its metadata and onnxtools.json beside it, with equal content.

Only this module writes it. Only this module and `checkpoints.model_info` read it. `exporter.export.describe` documents
its content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from onnxtools.ir.model import Model

MODEL_KEY = "onnxtools.model"
"""Key in the metadata of graph and model. TensorRT's parser keeps neither, so a manifest repeats the description."""
INFO_FILE = "onnxtools.json"
"""The file beside the graph, for people and for engines."""


def described(model: Model) -> dict[str, Any]:
    """Returns the description in the model's metadata, or {} if there is none that onnxtools wrote."""
    return _parsed(model.graph.metadata_props) or _parsed(model.ir.metadata_props)


def _parsed(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        info = json.loads(metadata.get(MODEL_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return info if isinstance(info, dict) and isinstance(info.get("model"), dict) else {}


def write(model: Model, info: Mapping[str, Any]) -> bytes:
    """Write `info` into the metadata. Returns the content of onnxtools.json, UTF-8 JSON."""
    for props in (model.graph.metadata_props, model.ir.metadata_props):
        props[MODEL_KEY] = json.dumps(info)
    return (json.dumps(info, indent=2) + "\n").encode()


def text(model: Model) -> str | None:
    """Returns the JSON text of the description in the model's metadata, or None, for an engine's manifest."""
    return model.ir.metadata_props.get(MODEL_KEY)


def record_dtypes(model: Model, *, cache: str | None = None, compute: str | None = None) -> None:
    """Update the description after a pass changed the types of the model.

    Args:
        cache: the cache's new type (fp16, fp8, ...); None leaves it.
        compute: the computation's new type; None leaves it.
    """
    for props in (model.graph.metadata_props, model.ir.metadata_props):
        info = _parsed(props)
        if info:
            if compute is not None:
                info["dtype"] = compute
            if cache is not None and isinstance(info.get("kv_cache"), dict):
                info["kv_cache"]["dtype"] = cache
            props[MODEL_KEY] = json.dumps(info)
