"""Token texts for the tiny models, as a calibration file and for PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def tokens(count: int = 6, vocabulary: int = 97, longest: int = 24) -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, vocabulary, generator.integers(4, longest)).tolist() for _ in range(count)]


def calibration_file(folder: Path, texts: list[list[int]] | None = None) -> Path:
    path = folder / "calib.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts or tokens()))
    return path
