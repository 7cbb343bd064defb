"""Files of one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnxtools.errors import UsageError


def read_jsonl(path: Path, limit: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and objects.

    Raises:
        UsageError: no such file, or a line that is no JSON object; nothing at all in it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); give a JSONL file, one object a line") from None
    found: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(lines, 1):
        if limit is not None and len(found) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: is not JSON ({error}); the file must have one object a line") from None
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number}: is a {type(row).__name__}, not an object; the file must have one object a line")
        found.append((number, row))
    if not found:
        raise UsageError(f"{path}: holds no rows; check the file")
    return found
