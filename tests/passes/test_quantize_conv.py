"""Convolutions in INT8 and FP8: near the original, a scale for each output channel, built by TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tests.support import ops, opsets, refuse, succeed

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


def cnn(path: Path, opset: int = 13, dense: bool = True) -> Path:
    """Conv, Relu, depthwise Conv whose output channels differ a hundredfold, pooled, and Gemm."""
    spread = np.geomspace(0.05, 5, 16).astype(np.float32)
    arrays = {
        "w1": RNG.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "b1": RNG.standard_normal(16).astype(np.float32),
        "w2": RNG.standard_normal((16, 1, 3, 3)).astype(np.float32) * spread[::-1, None, None, None],
        "w3": RNG.standard_normal((32, 16)).astype(np.float32), "b3": RNG.standard_normal(32).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "conv2", group=16, strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["c2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f" if dense else "y"]),
    ]  # fmt: skip
    if dense:
        nodes.append(helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "fc", transB=1))
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3, 16, 16])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 32 if dense else 16])
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "cnn", [x], [y], [numpy_helper.from_array(a, n) for n, a in arrays.items() if n in used]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    np.savez(path.with_suffix(".npz"), x=RNG.standard_normal((8, 3, 16, 16)).astype(np.float32))
    return path


def run(path: Path, x: Array) -> Array:
    """By onnx's own kernels: ONNX Runtime's fusions take FP8 for INT8."""
    (found,) = ReferenceEvaluator(onnx.load(path)).run(None, {"x": x})
    return np.asarray(found)


@pytest.mark.parametrize("opset", [11, 13, 21])
@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.05), ("fp8", 0.1)])
def test_near_the_original_with_a_scale_for_each_output(kind: str, limit: float, opset: int, tmp_path: Path) -> None:
    source = cnn(tmp_path / "m.onnx", opset)
    said = succeed(
        "quantize", source, tmp_path / "q.onnx", f"--{kind}", "--calib", tmp_path / "m.npz", "--tolerance", "1"
    ).out
    x = RNG.standard_normal((4, 3, 16, 16)).astype(np.float32)
    expected, found = run(source, x), run(tmp_path / "q.onnx", x)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) <= limit
    model = onnx.load(tmp_path / "q.onnx")
    scales = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("_scale")}
    assert scales["w1_scale"].shape == (16,) and scales["w2_scale"].shape == (16,)
    weights = [
        n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[1] in ("w1_scale", "w2_scale")
    ]
    assert [a.i for n in weights for a in n.attribute if a.name == "axis"] == [0, 0]
    assert opsets(tmp_path / "q.onnx")[""] == max(opset, 19)
    assert ("needs opset 19" in " ".join(said.split())) == (opset < 19)


def test_convolutions_alone(tmp_path: Path) -> None:
    source = cnn(tmp_path / "m.onnx", dense=False)
    succeed("quantize", source, tmp_path / "q.onnx", "--int8", "--calib", tmp_path / "m.npz", "--exclude", "conv2")
    assert ops(tmp_path / "q.onnx").count("QuantizeLinear") == 1


def test_int4_leaves_convolutions(tmp_path: Path) -> None:
    source = cnn(tmp_path / "m.onnx", dense=False)
    assert "2 left: convolution" in refuse("quantize", source, tmp_path / "q.onnx", "--int4-rtn")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_tensorrt_rtx_builds_them(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines are built with TensorRT-RTX (make setup installs it)")
    source = cnn(tmp_path / "m.onnx")
    succeed("quantize", source, tmp_path / "q.onnx", f"--{kind}", "--calib", tmp_path / "m.npz", "--tolerance", "1")
    shapes = [f"--{part}-shapes=x:{batch}x3x16x16" for part, batch in (("min", 1), ("opt", 4), ("max", 8))]
    succeed("build", tmp_path / "q.onnx", tmp_path / "q.engine", "--compute-capability", "8.9", *shapes)
