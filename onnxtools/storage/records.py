"""The record in a graph of the files written with it: its data file, and the sha256 of each file beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

MAX_PROTO_BYTES = 1 << 31
"""No protobuf is larger."""
FILES_KEY = "onnxtools.files"
"""Key in the model's metadata of the record, in JSON."""
Beside = Mapping[str, Path | bytes]
"""Files that belong to a model, by name: their content, or the path of their content."""


def sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file. The file is read whole."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recorded(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the record in a graph's metadata: `data`, a file name or "", and `beside`, sha256 by file name.

    Both are empty if there is no valid record.
    """
    try:
        record = json.loads(metadata.get(FILES_KEY, "{}"))
        data, beside = record.get("data", ""), record.get("beside", {})
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
    """Returns `recorded` of the graph in the file `path`. No weight in a data file is read."""
    proto = onnx.ModelProto()
    try:
        if path.is_file() and path.stat().st_size < MAX_PROTO_BYTES:
            proto.ParseFromString(path.read_bytes())
        return recorded({entry.key: entry.value for entry in proto.metadata_props})
    except Exception:  # protobuf raises errors of its own; a file that is no graph has no record
        return recorded({})


def recorded_data(path: Path) -> str:
    """Returns the name of the data file that onnxtools wrote with the graph at `path`, or "" if there is none."""
    name = str(files_of(path)["data"])
    return (
        name if name in (file.name for file in path.parent.glob("*.data")) and name.startswith(f"{path.name}.") else ""
    )
