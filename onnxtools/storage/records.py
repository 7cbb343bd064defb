"""What a graph says of the files that were written with it: its data file, and the sha256 of each file beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

FILES_KEY = "onnxtools.files"
"""Metadata of the model: the data file that was written with the graph, and the sha256 of each file beside it."""
Beside = Mapping[str, Path | bytes]
"""Files that belong to a model, by name: their content, or where it lies."""


def sha256(path: Path) -> str:
    """Of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recorded(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a graph says of its files: `data`, a name or "", and `beside`, name to sha256.

    Empty where it says nothing sensible.
    """
    try:
        found = json.loads(metadata.get(FILES_KEY, "{}"))
        data, beside = found.get("data", ""), found.get("beside", {})
    except (ValueError, AttributeError, RecursionError):
        return {"data": "", "beside": {}}
    plain = (
        isinstance(data, str)
        and isinstance(beside, dict)
        and all(isinstance(text, str) for pair in beside.items() for text in pair)
    )
    return (
        {"data": data, "beside": beside}
        if plain and all(Path(name).name == name for name in (data, *beside) if name)
        else {"data": "", "beside": {}}
    )


def files_of(path: Path) -> dict[str, Any]:
    """`recorded` of the graph in the file at `path`; no weight is read."""
    proto = onnx.ModelProto()
    try:
        if path.is_file() and path.stat().st_size < 1 << 31:
            proto.ParseFromString(path.read_bytes())
        return recorded({entry.key: entry.value for entry in proto.metadata_props})
    except Exception:  # protobuf raises its own; what is no graph records nothing
        return recorded({})


def recorded_data(path: Path) -> str:
    """The data file that was written with the graph at `path`; "" where there is none that we wrote."""
    name = str(files_of(path)["data"])
    return (
        name if name in (file.name for file in path.parent.glob("*.data")) and name.startswith(f"{path.name}.") else ""
    )
