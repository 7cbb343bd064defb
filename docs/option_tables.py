"""A hook of mkdocs: `<!-- options package.module:Class -->` becomes a table of the class's options.

The sources are parsed and not imported, so the pages build where none of the libraries are installed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MARK = re.compile(r"<!-- options (?P<module>[\w.]+):(?P<name>\w+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return _MARK.sub(lambda mark: table(mark["module"], mark["name"]), markdown)


def table(module: str, name: str) -> str:
    """The options of a dataclass and of those that it derives from, as a table in Markdown."""
    rows = [
        f"| `--{option.replace('_', '-')}` | `{kind}` | {default} | {text} |".replace("\n", " ")
        for option, kind, default, text in options(module, name)
    ]
    return "\n".join(["| option | type | default | |", "| --- | --- | --- | --- |", *rows]) if rows else "No options."


def options(module: str, name: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and help of each field that `option()` makes."""
    tree = ast.parse(Path(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    imports = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onnxtools")
        for alias in node.names
    }
    for base in reversed(cls.bases):  # as dataclasses order fields
        if isinstance(base, ast.Name) and base.id in imports:
            yield from options(str(imports[base.id]), base.id)
    for field in cls.body:
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.value, ast.Call)
            and isinstance(field.target, ast.Name)
        ):
            default, text = field.value.args[:2]
            kind = ast.unparse(field.annotation).replace("|", "\\|")
            words = _text(text).replace("|", "\\|") + _flags(field.value)
            yield ast.unparse(field.target), kind, f"`{ast.unparse(default)}`", words


def _text(node: ast.expr) -> str:
    """The help of an option; what an f-string computes stands as ..."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)


def _flags(call: ast.Call) -> str:
    """The switches that stand for a value of the option."""
    flags = next((keyword.value for keyword in call.keywords if keyword.arg == "flags"), None)
    if not isinstance(flags, ast.Dict):
        return ""
    pairs = zip(flags.keys, flags.values, strict=True)
    return " " + ", ".join(f"`{ast.literal_eval(key)}` is {ast.unparse(value)}" for key, value in pairs if key) + "."
