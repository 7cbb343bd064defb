"""What the documents name is there: files, pages that they link to, and the errors that they explain."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FILE = re.compile(r"`([\w./]+\.(?:py|cu|cc|h))`")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_are_there(page: Path) -> None:
    text = page.read_text()
    files = {
        name for name in _FILE.findall(text) if not any((top / name).exists() for top in (ROOT, ROOT / "onnxtools"))
    }
    links = {link for link in _LINK.findall(text) if not (page.parent / link).exists()}
    assert files | links == set()


def test_errors_that_are_explained_are_those_of_the_sources() -> None:
    """Each heading of the troubleshooting page quotes a text of the sources; {} stands for what an error names."""
    texts = set()
    for file in (ROOT / "onnxtools").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.add("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values))  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quotes = re.findall(r'^### "(.*)"$', page, re.M)
    assert len(quotes) == len(re.findall(r"^### ", page, re.M)) > 20
    plain = "\n".join(texts)
    assert [quote for quote in quotes if quote not in plain] == []


def test_options_of_passes_stand_in_the_reference() -> None:
    """The hook of mkdocs reads sources; what it finds are the fields of the classes themselves."""
    import dataclasses
    import runpy

    from onnxtools.base import registry
    from onnxtools.pipeline.passbase import load_pass

    options = runpy.run_path(str(ROOT / "docs/option_tables.py"))["options"]
    page = (ROOT / "docs/reference/passes.md").read_text()
    for name, point in registry.names().items():
        if not point.module.startswith("onnxtools."):
            continue
        assert f"<!-- options {point.value} -->" in page, f"add a section for {name} to docs/reference/passes.md"
        fields = [field.name for field in dataclasses.fields(load_pass(name))]
        assert [row[0] for row in options(*point.value.split(":"))] == fields, name
