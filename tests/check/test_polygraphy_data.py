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


def test_no_file_of_another_kind_is_replaced(tmp_path: Path) -> None:
    model, other, data = linear(tmp_path / "m.onnx"), tmp_path / "onnxtools.json", tmp_path / "in.json"
    other.write_text("{}")
    before = model.read_bytes()
    assert "does not end in .json" in refuse("validate", model, model, "--save-inputs", model, code=2)
    assert "no data of Polygraphy" in refuse("validate", model, model, "--save-outputs", other)
    assert "named twice" in refuse("validate", model, model, "--save-inputs", data, "--save-outputs", data, code=2)
    assert model.read_bytes() == before and other.read_text() == "{}" and not data.exists()
    for _ in range(2):  # its own file is replaced
        done = succeed("validate", model, model, "--save-inputs", data)
    assert "[I]" not in done.out and "[W]" not in done.out


def _weight() -> np.ndarray:
    return normal(64, 128)
