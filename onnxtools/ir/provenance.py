"""How a model was made: the passes that its metadata records."""

from __future__ import annotations

import json
from typing import Any

from onnxtools.ir.model import Model

PROVENANCE_KEY = "onnxtools.provenance"


def provenance(model: Model) -> list[dict[str, Any]]:
    """What the model's metadata says of how it was made, oldest first; entries that are not ours are left out."""
    try:
        found = json.loads(model.ir.metadata_props.get(PROVENANCE_KEY, "[]"))
    except (ValueError, RecursionError):
        return []
    return [entry for entry in found if _is_entry(entry)] if isinstance(found, list) else []


def _is_entry(entry: Any) -> bool:
    passes = entry.get("passes") if isinstance(entry, dict) else None
    return isinstance(passes, list) and all(isinstance(p, dict) and isinstance(p.get("pass"), str) for p in passes)
