"""Reads JSONL files: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnxtools.base.errors import JobError
from onnxtools.base.inputs import check_regular

MAX_LINE = 64 << 20
"""Longest line, in characters. A document of a million words has 6 million."""


def read_jsonl(path: Path, limit: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Returns the objects with their line numbers, which start at 1. Blank lines are skipped.

    Args:
        path: the file, in UTF-8.
        limit: read at most so many objects; None reads all.

    Raises:
        JobError: the file cannot be read, a line is no JSON object or is longer than `MAX_LINE`, or the file has no
            objects.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        check_regular(path, JobError)
        with open(path, encoding="utf-8-sig", newline="\n") as file:  # JSON strings may hold other line separators
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), 1):
                if limit is not None and len(rows) == limit:
                    break
                if line.strip():
                    rows.append((number, _row(path, number, line)))
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read ({error}); give a JSONL file, one object a line") from None
    if not rows:
        raise JobError(f"{path}: holds no rows; check the file")
    return rows


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise JobError(f"{path}:{number}: has more than {MAX_LINE} characters; the file must have one object a line")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise JobError(f"{path}:{number}: is not JSON ({error}); the file must have one object a line") from None
    if not isinstance(row, dict):
        raise JobError(
            f"{path}:{number}: is a {type(row).__name__}, not an object; the file must have one object a line"
        )
    return row
