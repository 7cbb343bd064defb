"""docs/reference/families.md says of each family what is measured here, and no family is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the references are transformers' own models (make setup installs it)")
pytest.importorskip("tensorrt_rtx", reason="engines are built with TensorRT-RTX (make setup installs it)")

from onnxtools.base import registry
from tests.exporter.family_table import CASES, DOC, measure, row

OTHERS = {"megatron", "gguf", "llama-gguf"}
"""Families of other formats, with tests of their own."""


@pytest.mark.parametrize("family", CASES)
def test_a_family_does_what_the_table_says(family: str, tmp_path: Path) -> None:
    assert row(family, measure(family, tmp_path)) in DOC.read_text().splitlines()


def test_the_table_has_every_family() -> None:
    assert set(CASES) == set(registry.names(registry.FAMILIES)) - OTHERS
