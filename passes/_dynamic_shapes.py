"""Static batch and sequence sizes, baked into reshape targets by the exporter, made dynamic."""

from __future__ import annotations

from onnxtools.model import Model


def make_dynamic(model: Model) -> list[str]:
    return []
