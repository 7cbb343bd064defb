"""Untrusted input: only regular files are opened, YAML aliases are bounded, and messages show values in short form."""

from __future__ import annotations

import contextlib
import re
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from onnxtools.base.errors import OnnxtoolsError, one_line

MAX_YAML_BYTES = 256 << 10
"""A recipe or a NeMo configuration has about 10 KB. PyYAML reads about 100 KB a second."""
MAX_YAML_NODES = 50_000
"""Nodes of a document after its aliases are expanded."""
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILE_SUFFIXES = {".ckpt", ".engine", ".gguf", ".json", ".nemo", ".onnx", ".plan", ".pt", ".safetensors", ".yaml"}
_INTEGER = "tag:yaml.org,2002:int"

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path, error: type[OnnxtoolsError]) -> None:
    """Refuse a path that is no regular file, without opening it.

    A pipe may never answer and a device may never end. Links are followed.

    Args:
        path: the file to check.
        error: the class of the error to raise.

    Raises:
        error: `path` is a folder, a pipe, a socket or a device.
        OSError: `path` does not exist, or its status cannot be read.
    """
    mode = path.stat().st_mode
    kind = next((name for holds, name in _KINDS if holds(mode)), None)
    if kind is not None:
        raise error(
            f"{path}: is {kind}, not a file; "
            f"{'name a file in it' if kind == 'a folder' else 'save what it gives to a file and name that'}"
        )


def is_hub_name(path: Path) -> bool:
    """Whether a path that does not exist looks like a name on the Hugging Face hub, as OWNER/MODEL.

    What ends as the files that are read here is a file that is missing.
    """
    return (
        _HUB_NAME.fullmatch(str(path)) is not None
        and path.suffix.lower() not in _FILE_SUFFIXES
        and not path.parent.exists()
    )


def absent(path: Path) -> str:
    """Returns `path` for the message that it does not exist.

    A path that looks like a name on the Hugging Face hub gets the command that downloads it.
    """
    name = str(path)
    if not is_hub_name(path):
        return name
    return (
        f"{name} (of the Hugging Face hub? then `hf download {name} --local-dir {path.name}` first, and name that "
        "folder)"
    )


def shown(value: Any) -> str:
    """Returns a short `repr(value)` for a message, of at most 120 characters, however large the value is.

    It shows the first items of the first two levels.
    """
    try:
        text = _SHORT.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


def parse_yaml(text: str | bytes) -> Any:
    """Returns the plain data of one YAML document, or None if it is empty.

    Raises:
        ValueError: `text` is not YAML, has tags other than plain data, has more than `MAX_YAML_BYTES` bytes, or has
            more than `MAX_YAML_NODES` nodes once its aliases are expanded. The message is one short line.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"{len(text)} bytes are more than the {MAX_YAML_BYTES} that are read")
    with _one_line():
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _size(node, {}) > MAX_YAML_NODES:
                raise ValueError(f"it has more than {MAX_YAML_NODES} values, aliases put in")
            return loader.construct_document(node)
        finally:
            loader.dispose()


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Turn any error of PyYAML (IndexError for `!!int ""`, AttributeError for `!!timestamp x`) into a ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(one_line(error, 160) or type(error).__name__) from None


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Counts `node` and the nodes below it. A node counts once for every alias that names it.

    Args:
        sizes: the counts of the collections visited so far, by `id`; 0 while a collection is being counted.

    Raises:
        ValueError: a node holds itself, or an integer has more than 40 digits.
    """
    if not isinstance(node, yaml.CollectionNode):
        if node.tag == _INTEGER and len(node.value) > 40:
            raise ValueError(f"the integer {node.value[:20]}... has {len(node.value)} digits")
        return 1
    if sizes.get(id(node)) == 0:
        raise ValueError("an alias stands inside what it names")
    if id(node) not in sizes:
        sizes[id(node)] = 0
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]
