"""The line to type where an optional library is missing."""

from __future__ import annotations

import re
from importlib import metadata


def install_line(extra: str) -> str:
    """`pip install ...` of what the extra of pyproject.toml names; it works without a source tree.

    onnxruntime-gpu has the files of onnxruntime, so one goes before the other comes: installing both leaves whichever
    was last.
    """
    try:
        wanted = metadata.requires("onnxtools") or []
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return f"pip install '.[{extra}]' in the source tree of onnxtools"
    named = [
        text.split(";")[0].strip().replace(" ", "")
        for text in wanted
        if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", text)
    ]
    line = "pip install " + " ".join(f"'{text}'" for text in named)
    return f"pip uninstall -y onnxruntime onnxruntime-gpu && {line}" if extra == "gpu" else line
