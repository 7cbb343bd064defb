"""Files of one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnxtools.base.errors import JobError
from onnxtools.base.inputs import check_regular

MAX_LINE = 64 << 20
"""Characters of a line; a document of a million words has 6 million."""


def read_jsonl(path: Path, limit: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and objects.

    Raises:
        JobError: no such file, or a line that is no JSON object; nothing at all in it.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    try:
        check_regular(path, JobError)
        with open(path, encoding="utf-8-sig", newline="\n") as file:  # JSON strings may hold other line separators
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), 1):
                if limit is not None and len(found) == limit:
                    break
                if line.strip():
                    found.append((number, _row(path, number, line)))
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read ({error}); give a JSONL file, one object a line") from None
    if not found:
        raise JobError(f"{path}: holds no rows; check the file")
    return found


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
