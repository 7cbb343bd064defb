"""`import onnxtools`: the names that it promises, and a program that uses them."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import onnxtools

SOURCE = Path(onnxtools.__file__)


def test_the_three_lists_of_names_are_one() -> None:
    """What mypy reads, what is loaded, and what `__all__` promises."""
    tree = ast.parse(SOURCE.read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        f"{node.module}:{alias.name}"
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    loaded = {f"onnxtools.{home}:{name}" for home, names in onnxtools._HOMES.items() for name in names}
    assert typed == loaded
    assert sorted([*(name for names in onnxtools._HOMES.values() for name in names), "__version__"]) == sorted(
        onnxtools.__all__
    )


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    for name in set(onnxtools.__all__) - {"__version__"}:
        found = getattr(onnxtools, name)
        assert inspect.isclass(found) or inspect.isfunction(found), name
        assert inspect.getdoc(found), name


def test_types_travel_with_the_package() -> None:
    assert SOURCE.with_name("py.typed").exists()
