"""What comes from outside: regular files alone, YAML whose aliases are bounded, and values that are shown short in
messages.
"""

from __future__ import annotations

import contextlib
import re
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from onnxtools.base.errors import OnnxtoolsError

MAX_YAML_BYTES = 256 << 10
"""A recipe or a NeMo configuration has some 10 KB; PyYAML reads about 100 KB a second."""
MAX_YAML_NODES = 50_000
"""Nodes of a document after its aliases are put in."""
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_INTEGER = "tag:yaml.org,2002:int"

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(path: Path, error: type[OnnxtoolsError]) -> None:
    """Refuse what is no regular file, without opening it: a pipe may never answer, a device never end. Links are
    followed.

    Raises:
        error: it is a folder, a pipe, a socket or a device.
        OSError: it is not there, or cannot be looked at.
    """
    mode = path.stat().st_mode
    kind = next((name for holds, name in _KINDS if holds(mode)), None)
    if kind is not None:
        raise error(
            f"{path}: is {kind}, not a file; "
            f"{'name a file in it' if kind == 'a folder' else 'save what it gives to a file and name that'}"
        )


def absent(path: Path) -> str:
    """`path` for a message that it is not there, with what to do where it looks like a name on the Hugging Face hub."""
    name = str(path)
    if not _HUB_NAME.fullmatch(name) or path.parent.exists():
        return name
    return (
        f"{name} (of the Hugging Face hub? then `hf download {name} --local-dir {path.name}` first, and name that "
        "folder)"
    )


def shown(value: Any) -> str:
    """`repr(value)` for a message: the first items of the first two levels, in about 100 characters, however large it
    is.
    """
    try:
        text = _SHORT.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


def parse_yaml(text: str | bytes) -> Any:
    """Plain data of one YAML document.

    Raises:
        ValueError: not YAML, more than data, too large, or larger than it looks through aliases; the message is one
            short line.
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
    """Whatever PyYAML raises (IndexError for `!!int ""`, AttributeError for `!!timestamp x`) as one ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(" ".join(str(error).split())[:160] or type(error).__name__) from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes below and with `node`, each counted as often as aliases name it.

    Raises:
        ValueError: a node that holds itself.
    """
    if not isinstance(node, yaml.CollectionNode):
        if node.tag == _INTEGER and len(node.value) > 40:
            raise ValueError(f"the integer {node.value[:20]}... has {len(node.value)} digits")
        return 1
    if known.get(id(node)) == 0:
        raise ValueError("an alias stands inside what it names")
    if id(node) not in known:
        known[id(node)] = 0
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]
