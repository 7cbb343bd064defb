"""AWQ layer by layer: the paper's search (arXiv 2306.00978, section 3.2), written here on the outputs themselves, is
the reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support import succeed

Array = np.ndarray[Any, Any]
K, N, BLOCK = 256, 96, 64


def nearest(weight: Array, shrink: Array | float = 1.0) -> Array:
    """INT4 in blocks along K, symmetric as the model's: amax / 7."""
    cut = weight.reshape(N, -1, BLOCK)
    scale = np.abs(cut).max(-1, keepdims=True) * shrink / 7
    return (np.clip(np.rint(cut / scale), -8, 7) * scale).reshape(N, K)


def papers(weight: Array, x: Array) -> Array:
    """The search for the exponent, then for the clipping of each block, by the outputs of all tokens (grids of the
    authors' code).
    """
    exact, size = x @ weight.T, np.abs(x).mean(0)
    best, least = weight, np.inf
    for ratio in np.arange(20) / 20:
        factor = np.maximum(size**ratio, 1e-4)
        factor = factor / np.sqrt(factor.max() * factor.min())
        error = float(np.square(x @ (nearest(weight * factor) / factor).T - exact).mean())
        if error < least:
            best, least = factor, error
    wide, scaled = weight * best, x / best
    shrink, kept = np.ones((N, K // BLOCK, 1)), np.full((N, K // BLOCK), np.inf)
    blocks = scaled.reshape(len(x), -1, BLOCK)
    for fraction in 1 - np.arange(10) / 20:
        off = (nearest(wide, fraction) - wide).reshape(N, -1, BLOCK)
        error = np.square(np.einsum("tbk,nbk->tnb", blocks, off)).mean(0)
        shrink, kept = np.where((error < kept)[..., None], fraction, shrink), np.minimum(error, kept)
    return np.asarray(nearest(wide, shrink) / best)


def tokens(kind: str) -> Array:
    """What a layer sees: a few channels that stand out; few rows that are far longer, in channels of their own;
    both.
    """
    generator = np.random.default_rng(5)
    x = generator.standard_normal((512, K))
    if kind != "long rows":
        x *= np.exp(1.2 * generator.standard_normal(K))
    if kind != "large channels":
        x[::128] = 0
        x[::128, :3] = 150 * generator.standard_normal((4, 3))
    return x.astype(np.float32)


def layer(path: Path, weight: Array, x: Array) -> Path:
    """x times gains, as behind a norm, then the product: its scales go into the gains."""
    nodes = [
        helper.make_node("Mul", ["x", "gain"], ["h"], name="gain"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="layer"),
    ]
    stored = [
        numpy_helper.from_array(np.ones(K, np.float32), "gain"),
        numpy_helper.from_array(np.ascontiguousarray(weight.T), "w"),
    ]
    ports = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", K]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", N]),
    ]
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "g", ports[:1], ports[1:], stored),
            opset_imports=[helper.make_opsetid("", 21)],
            ir_version=10,
        ),
        path,
    )
    np.savez(path.with_suffix(".npz"), x=x)
    return path


def outputs(path: Path, x: Array) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return np.asarray(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0])


def lost(found: Array, exact: Array) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("kind", ["large channels", "long rows", "both"])
def test_a_layer_is_as_good_as_by_the_paper_and_never_worse_than_rounding(kind: str, tmp_path: Path) -> None:
    x = tokens(kind)
    weight = (
        np.random.default_rng(6).standard_normal((N, K))
        * np.exp(0.5 * np.random.default_rng(7).standard_normal((N, 1)))
        / 16
    ).astype(np.float32)
    source = layer(tmp_path / "m.onnx", weight, x)
    flags = ("--block-size", str(BLOCK), "--lm-head", "--no-check")
    succeed("quantize", source, tmp_path / "awq.onnx", "--int4-awq", "--calib", source.with_suffix(".npz"), *flags)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for rows in (x, unit):  # the tokens as they are, and of one length: none may be given up for others
        exact = rows @ weight.T
        ours, rounded = lost(outputs(tmp_path / "awq.onnx", rows), exact), lost(rows @ nearest(weight).T, exact)
        assert ours <= 1.001 * rounded
        if kind == "large channels":
            assert ours < 0.75 * rounded and ours <= 1.02 * lost(rows @ papers(weight, x).T, exact)
    if kind != "large channels":  # the paper's error alone gives up the short rows, which are almost all
        exact = unit @ weight.T
        assert lost(outputs(tmp_path / "awq.onnx", unit), exact) <= lost(unit @ papers(weight, x).T, exact)
