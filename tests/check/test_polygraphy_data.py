"""Polygraphy itself reads what `validate` saves, runs a model on it, and finds the outputs equal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import linear, normal, refuse, succeed


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path, Path]:
    model, inputs, outputs = linear(tmp_path / "m.onnx"), tmp_path / "in.json", tmp_path / "out.json"
    succeed("validate", model, model, "--save-inputs", inputs, "--save-outputs", outputs, "--seed", "7")
    return model, inputs, outputs


def polygraphy(model: Path, inputs: Path, outputs: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("polygraphy"), "run", model, "--onnxrt"]
    data = ["--load-inputs", inputs, "--load-outputs", outputs]
    return subprocess.run([*map(str, command), *map(str, data)], capture_output=True, text=True, check=False)


def test_polygraphy_compares_with_what_was_saved(saved: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, inputs, outputs = saved
    assert polygraphy(*saved).returncode == 0, polygraphy(*saved).stdout
    other = linear(tmp_path / "other.onnx", -1.5 * _weight())
    assert polygraphy(other, inputs, outputs).returncode != 0, "another weight computes something else"
    succeed("validate", model, model, "--inputs", inputs)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    model = linear(tmp_path / "m.onnx")
    assert "absent" in refuse("validate", model, model, "--save-inputs", tmp_path / "absent" / "in.json")


def _weight() -> np.ndarray:
    return normal(64, 128)
