"""What the documents name is there: files, and the pages that they link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
