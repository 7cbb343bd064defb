"""The model's own description: `onnxtools.model` in its metadata, and onnxtools.json beside it, which say the same.

This is the only place that writes it, and with `checkpoints.model_info` the only one that reads it.
`exporter.export.describe` says what is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from onnxtools.ir.model import Model

MODEL_KEY = "onnxtools.model"
"""Of the metadata of graph and model. TensorRT's parser keeps that of neither; a manifest repeats it."""
INFO_FILE = "onnxtools.json"
"""For people and for engines."""


def described(model: Model) -> dict[str, Any]:
    """What `model` says of itself, as exported; empty where it says nothing, or nothing of our making."""
    return _parsed(model.graph.metadata_props) or _parsed(model.ir.metadata_props)


def _parsed(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(MODEL_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("model"), dict) else {}


def write(model: Model, info: Mapping[str, Any]) -> bytes:
    """Put `info` into the metadata; the content of onnxtools.json."""
    for props in (model.graph.metadata_props, model.ir.metadata_props):
        props[MODEL_KEY] = json.dumps(info)
    return (json.dumps(info, indent=2) + "\n").encode()


def text(model: Model) -> str | None:
    """The description as it stands in the metadata, for an engine's manifest."""
    return model.ir.metadata_props.get(MODEL_KEY)


def record_dtypes(model: Model, *, cache: str | None = None, compute: str | None = None) -> None:
    """Let the description follow where the type of the model's cache or its computation has changed (fp16, fp8,
    ...).
    """
    for props in (model.graph.metadata_props, model.ir.metadata_props):
        info = _parsed(props)
        if info:
            if compute is not None:
                info["dtype"] = compute
            if cache is not None and isinstance(info.get("kv_cache"), dict):
                info["kv_cache"]["dtype"] = cache
            props[MODEL_KEY] = json.dumps(info)
