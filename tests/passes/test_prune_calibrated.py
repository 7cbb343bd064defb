"""Wanda and SparseGPT against the papers' formulas, written independently, on what PyTorch's layers see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

pytest.importorskip("transformers")

from onnxtools.passes.prune.calibrated import sparsegpt
from tests.calibration.test_run import by_hooks
from tests.calibration.texts import calibration_file, tokens
from tests.exporter.hf import make
from tests.generation.models import exported, reference
from tests.support import refuse, run, succeed

Array = np.ndarray[Any, Any]


def initializers(path: Path) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def is_2_4(array: Array, axis: int = -1) -> bool:
    return bool(((np.moveaxis(array, axis, -1).reshape(-1, 4) == 0).sum(axis=1) >= 2).all())


def optimal_brain_surgeon(weight: Array, hessian: Array) -> Array:
    """Column by column; the inverse of the rest by Gaussian elimination (SparseGPT, section 3.3, equation 5), not by
    Cholesky.
    """
    weight, inverse = weight.astype(np.float64).copy(), np.linalg.inv(hessian.astype(np.float64))
    diagonals = []
    rest = inverse.copy()
    for column in range(len(hessian)):
        diagonals.append(rest[column, column])
        rest = rest - np.outer(rest[:, column], rest[column]) / rest[column, column]
    drop: Array = np.zeros(0)
    for column in range(len(hessian)):
        if column % 4 == 0:
            scores = weight[:, column : column + 4] ** 2 / np.array(diagonals[column : column + 4])
            drop = scores.argsort(axis=1, kind="stable")[:, :2] + column
        error = np.where((drop == column).any(axis=1), weight[:, column] / inverse[column, column], 0)
        weight -= np.outer(error, inverse[column])
        weight[(drop == column).any(axis=1), column] = 0
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return weight


@pytest.mark.parametrize("size", [16, 260])
def test_sparsegpt_is_the_papers_update(size: int) -> None:
    generator = np.random.default_rng(9)
    x = generator.standard_normal((400, size)) @ generator.standard_normal((size, size)) * 0.3
    gram = (x.T @ x / len(x)).astype(np.float32)
    weight = generator.standard_normal((8, size)).astype(np.float32)
    hessian = gram.astype(np.float64) + 0.01 * np.diagonal(gram).mean() * np.eye(size)
    found = sparsegpt(weight, gram)
    np.testing.assert_allclose(found, optimal_brain_surgeon(weight, hessian), rtol=1e-5, atol=1e-7)
    assert is_2_4(found)

    def loss(made: Array) -> float:
        return float(np.square((made - weight) @ x.T).sum())

    order = np.abs(weight).reshape(8, -1, 4).argsort(axis=2)
    magnitude = np.where(order.argsort(axis=2) >= 2, weight.reshape(8, -1, 4), 0).reshape(8, size)
    assert loss(found) < 0.7 * loss(magnitude)


def test_dead_channels_are_dropped_without_a_fuss() -> None:
    gram = np.diag([0.0, 1, 1, 1, 0, 0, 0, 0]).astype(np.float32)
    found = sparsegpt(np.ones((2, 8), np.float32), gram)
    assert np.isfinite(found).all() and (found[:, [0, 4, 5, 6, 7]] == 0).all()


def test_wanda_in_the_first_layer_is_the_papers_metric(tmp_path: Path) -> None:
    """|W| times the norm of the input channel; the first layer's inputs are those of the dense model."""
    seen = by_hooks(reference("llama"), tokens())
    succeed(
        "prune",
        exported("llama", "concat"),
        tmp_path / "p.onnx",
        "--method",
        "wanda",
        "--calib",
        calibration_file(tmp_path),
    )
    found = initializers(tmp_path / "p.onnx")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        key = f"model.layers.0.self_attn.{name}"
        weight = reference("llama").get_parameter(f"{key}.weight").detach().numpy()
        metric = (np.abs(weight) * np.linalg.norm(seen[key], axis=0)).reshape(-1, 4)
        kept = metric.argsort(axis=1).argsort(axis=1) >= 2
        np.testing.assert_array_equal(found[f"{key}.weight"].reshape(-1, 4), np.where(kept, weight.reshape(-1, 4), 0))


def test_later_layers_see_what_the_pruned_ones_hand_on(tmp_path: Path) -> None:
    """The norms of layer 1 are those of a PyTorch model whose layer 0 holds our pruned weights."""
    import torch

    succeed(
        "prune",
        exported("llama", "concat"),
        tmp_path / "p.onnx",
        "--method",
        "sparsegpt",
        "--calib",
        calibration_file(tmp_path),
        "--no-check",
    )
    found = initializers(tmp_path / "p.onnx")
    model = make("llama", tmp_path / "copy")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.0" in name and name.endswith("proj.weight"):
                parameter.copy_(torch.tensor(found[name]))
    x = by_hooks(model, tokens())["model.layers.1.self_attn.q_proj"]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    weight = model.get_parameter("model.layers.1.self_attn.q_proj.weight").detach().numpy()
    expected = sparsegpt(weight, (x.T @ x / len(x)).astype(np.float32))
    made = found["model.layers.1.self_attn.q_proj.weight"]
    assert is_2_4(made) and np.abs(made - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_weights_in_matmul_layout(method: str, tmp_path: Path) -> None:
    succeed(
        "prune",
        exported("gpt2", "concat"),
        tmp_path / "p.onnx",
        "--method",
        method,
        "--calib",
        calibration_file(tmp_path),
    )
    found = initializers(tmp_path / "p.onnx")
    assert all(
        is_2_4(found[f"model.layers.{n}.mlp.{part}.weight"], axis=0)
        for n in (0, 1)
        for part in ("up_proj", "down_proj")
    )


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--method", "sparsegpt", "--calib", str(calibration_file(tmp_path)), "--no-check"]
    succeed("prune", exported("llama", "concat"), tmp_path / "a.onnx", *flags)
    from onnxtools.calibration import run as module

    original, calls = module.Calibration.through, []

    def stopped(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(module.Calibration, "through", stopped)
    assert (
        run(
            "prune", exported("llama", "concat"), tmp_path / "b.onnx", *flags, "--calib-cache", str(tmp_path / "cache")
        ).code
        == 130
    )
    monkeypatch.setattr(module.Calibration, "through", original)
    succeed("prune", exported("llama", "concat"), tmp_path / "b.onnx", *flags, "--calib-cache", str(tmp_path / "cache"))
    a, b = initializers(tmp_path / "a.onnx"), initializers(tmp_path / "b.onnx")
    assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("flags", "names"), [(["--method", "wanda"], "--calib"), (["--calib", "{calib}"], "need no --calib")]
)
def test_bad_input(flags: list[str], names: str, tmp_path: Path) -> None:
    given = [flag.format(calib=calibration_file(tmp_path)) for flag in flags]
    assert names in refuse("prune", exported("llama", "concat"), tmp_path / "p.onnx", *given, code=2)


def test_the_report_names_the_method(tmp_path: Path) -> None:
    flags = ["--method", "wanda", "--calib", calibration_file(tmp_path), "--json"]
    notes = json.loads(succeed("prune", exported("llama", "concat"), tmp_path / "p.onnx", *flags).out)["steps"][0][
        "result"
    ]["notes"]
    assert any("wanda" in note for note in notes) and not any("magnitude" in note for note in notes)
