"""A folder is a model: the tokenizer and other files beside a graph travel with it, and never with another model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnxtools.base.errors import JobError
from onnxtools.checkpoints.huggingface import BESIDE
from onnxtools.ir.description import INFO_FILE
from onnxtools.ir.model import Model
from onnxtools.storage.records import Beside, files_of, recorded, sha256

_FOREIGN = ("config.json", "genai_config.json")
"""Configurations in other tools' ONNX folders. They hold the end-of-text tokens."""


def files_beside(model: Model) -> dict[str, Path | bytes]:
    """Returns the paths of the files that belong to `model`, by name.

    These are the files that its graph records, else the usual files of a model in the graph's folder.

    Raises:
        JobError: a recorded file has changed, so it may be another model's.
    """
    if model.path is None:
        return {}
    folder, digests = model.path.parent, recorded(model.ir.metadata_props)["beside"]
    check_beside(model.path, digests)
    names = digests or (*BESIDE, INFO_FILE, *_FOREIGN)
    return {name: folder / name for name in names if (folder / name).is_file()}


def check_beside(path: Path, known: Mapping[str, str]) -> None:
    """Refuse files beside the graph `path` that differ from those it was written with.

    Args:
        path: the graph file.
        known: their sha256 by name, as the graph records it.

    Raises:
        JobError: names the first that has changed.
    """
    for name, digest in known.items():
        file = path.parent / name
        if name != INFO_FILE and file.is_file() and sha256(file) != digest:
            raise JobError(
                f"{file}: is not the file that {path.name} was written with (another model's?); bring it back, or keep "
                "each model in its own folder"
            )


def check_folder(path: Path, files: Beside) -> None:
    """Refuse to write `files` beside the graph `path` over files of the same names that belong to another model.

    Raises:
        JobError: names the file and its owner.
    """
    recorded_digests = files_of(path)["beside"]
    for name, content in files.items():
        target = path.parent / name
        if name == INFO_FILE or not target.is_file():
            continue
        digest = sha256(target)
        if digest == (sha256(content) if isinstance(content, Path) else _digest(content)):
            continue
        owner = next(
            (
                graph.name
                for graph in sorted(path.parent.glob("*.onnx"))
                if graph != path and files_of(graph)["beside"].get(name) == digest
            ),
            "",
        )
        if owner or recorded_digests.get(name) != digest:
            whose = f"belongs to {owner}" if owner else f"was not written with {path.name}"
            raise JobError(
                f"{target}: {whose} and differs from this model's; write into a folder of its own, or move that file "
                "away"
            )


def _digest(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()
