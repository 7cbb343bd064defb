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
            yield field.target.id, kind, f"`{ast.unparse(default)}`", ast.literal_eval(text).replace("|", "\\|")
