"""The `pip install` line for a missing optional library."""

from __future__ import annotations

import re
from importlib import metadata


def install_line(extra: str) -> str:
    """Returns the `pip install ...` line for the packages of an extra of pyproject.toml; it needs no source tree.

    onnxruntime-gpu and onnxruntime install the same files, so the line for `gpu` uninstalls both first: with both
    installed, the files are those of the last one.
    """
    try:
        requirements = metadata.requires("onnxtools") or []
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return f"pip install '.[{extra}]' in the source tree of onnxtools"
    packages = [
        text.split(";")[0].strip().replace(" ", "")
        for text in requirements
        if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", text)
    ]
    line = "pip install " + " ".join(f"'{text}'" for text in packages)
    return f"pip uninstall -y onnxruntime onnxruntime-gpu && {line}" if extra == "gpu" else line
