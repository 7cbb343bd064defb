"""The passes that a model's metadata records."""

from __future__ import annotations

import json
from typing import Any

from onnxtools.ir.model import Model

PROVENANCE_KEY = "onnxtools.provenance"


def provenance(model: Model) -> list[dict[str, Any]]:
    """Returns the entries of the model's provenance, oldest first. Entries of another form are left out."""
    try:
        entries = json.loads(model.ir.metadata_props.get(PROVENANCE_KEY, "[]"))
    except (ValueError, RecursionError):
        return []
    return [entry for entry in entries if _is_entry(entry)] if isinstance(entries, list) else []


def _is_entry(entry: Any) -> bool:
    passes = entry.get("passes") if isinstance(entry, dict) else None
    return isinstance(passes, list) and all(isinstance(p, dict) and isinstance(p.get("pass"), str) for p in passes)
