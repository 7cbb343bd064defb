"""Removes files that no graph needs: the data file of a replaced graph, and leftovers of killed runs."""

from __future__ import annotations

import contextlib
import glob
import mmap
from collections.abc import Iterable
from pathlib import Path

from onnxtools.storage.files import real_target, sweep, taken
from onnxtools.storage.records import files_of

_NO_GRAPHS = {
    ".data",
    ".bin",
    ".safetensors",
    ".gguf",
    ".pt",
    ".pth",
    ".ckpt",
    ".nemo",
    ".engine",
    ".plan",
    ".npz",
    ".npy",
}
"""Suffixes of files that may be large and cannot mention a data file."""


def remove_unmentioned(data: Path) -> None:
    """Delete a data file that onnxtools wrote, unless another file in its folder mentions it.

    Such a file is a graph, a copy of a graph, or a graph that is being written.
    """
    if not any(_mentions(file, data.name.encode()) for file in data.parent.iterdir() if file.name != data.name):
        with contextlib.suppress(OSError):
            data.unlink()


def _mentions(file: Path, name: bytes) -> bool:
    if (
        file.suffix in _NO_GRAPHS
        or (file.suffix == ".tmp" and ".data." in file.name)
        or file.is_symlink()
        or not file.is_file()
    ):
        return False
    try:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(name) >= 0
    except ValueError:  # an empty file cannot be mapped
        return False
    except OSError:
        return True  # it cannot be read, so it may mention the name


def remove_leftovers(path: Path, beside: Iterable[str]) -> None:
    """Remove the leftovers of killed runs for the output `path`.

    These are temporary files, data files whose graph was not renamed yet, and empty files that reserve a name.

    Args:
        path: the graph file.
        beside: names of the other files that are written with the graph.
    """
    path = real_target(path)
    data: list[Path] = []
    for tmp in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with taken(tmp) as is_dead:
            if is_dead and (name := str(files_of(tmp)["data"])) and (path.parent / name).is_file():
                data.append(path.parent / name)
    sweep(path.parent, {path.name, f"{path.name}.data", *beside})
    for file in {*data, *path.parent.glob(f"{glob.escape(path.name)}.*data")}:
        with taken(file) as is_dead:
            if is_dead and file.is_file() and (file in data or not file.stat().st_size):
                remove_unmentioned(file)
