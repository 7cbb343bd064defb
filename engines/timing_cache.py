"""The timing cache file: on TensorRT-RTX there is nothing to put into it, and we say so."""

from __future__ import annotations

import os
from pathlib import Path

from onnxtools.errors import UsageError


def check_timing_cache(path: Path) -> None:
    """Refuse a cache path that no builder could read or write.

    Raises:
        UsageError: it is a folder, it cannot be read, or its folder is missing.
    """
    if path.is_dir():
        raise UsageError(f"--timing-cache {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise UsageError(f"--timing-cache {path}: the folder {str(path.parent)!r} does not exist; create it first")
    if path.exists() and not os.access(path, os.R_OK):
        raise UsageError(f"--timing-cache {path} cannot be read; check its permissions")


def rtx_note(path: Path) -> str:
    """What TensorRT-RTX does with a timing cache (its calls for one are deprecated and do nothing)."""
    return f"timing cache: TensorRT-RTX has none; {path} {'left as it is' if path.exists() else 'not written'}"
