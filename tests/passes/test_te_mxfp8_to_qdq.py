"""MXFP8: weights become DequantizeLinear-24, dynamic quantization is kept on request or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fixtures.te_style_check import REFERENCE_OPS
from tests.conftest import Make
from tests.support import (
    FP8,
    MX,
    Array,
    Case,
    e4m3,
    info,
    initializers,
    normal,
    ops,
    opsets,
    refuse,
    rel_l2,
    stored,
    succeed,
    write,
)

X, W = normal(4, 64, seed=1), normal(32, 64)


def mx(weight: Array) -> tuple[Array, Array]:
    """(E4M3 data, biased exponents) by blocks of 32: the smallest power of two that brings the block within 448."""
    blocks = weight.reshape(-1, 32)
    exponents = []
    for block in blocks:
        amax, exponent = float(np.abs(block).max()), -127
        while exponent < 127 and amax > 448 * 2.0**exponent:
            exponent += 1
        exponents.append(exponent)
    data = e4m3(np.ldexp(blocks, -np.array(exponents)[:, None]))
    return data.reshape(weight.shape), (np.array(exponents) + 127).astype(np.uint8).reshape(*weight.shape[:-1], -1)


def mx_pair(data: str, result: str, name: str, quantize: str = "TRT_MXFP8DynamicQuantize") -> list[onnx.NodeProto]:
    return [
        helper.make_node(quantize, [data], [f"{result}_q", f"{result}_s"], name, domain="trt"),
        helper.make_node(
            "TRT_MXFP8DequantizeLinear", [f"{result}_q", f"{result}_s"], [result], f"{name}_dq", domain="trt"
        ),
    ]


def model(
    path: Path, *, activation: bool = False, weight: Array = W, quantize: str = "TRT_MXFP8DynamicQuantize"
) -> Path:
    nodes = mx_pair("w", "wd", "weight_mx", quantize)
    if activation:
        nodes += mx_pair("x", "xd", "input_mx", quantize)
    nodes.append(helper.make_node("Gemm", ["xd" if activation else "x", "wd"], ["y"], transB=1))
    return write(
        path,
        nodes,
        [info("x", [4, weight.shape[1]])],
        [info("y", [4, weight.shape[0]])],
        stored(w=weight),
        domains=["trt"],
    )


def evaluate(path: Path, x: Array) -> Array:
    """onnx.reference knows E8M0 scales; the `trt` operators are the fixtures' own numpy ones."""
    proto = onnx.load(path)
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        if node.domain == "trt":
            del node.attribute[:]  # axis and block size have one value each
    return np.asarray(ReferenceEvaluator(proto, new_ops=REFERENCE_OPS).run(None, {"x": x})[0])


@pytest.mark.parametrize("case", MX, indirect=True)
def test_a_dynamic_quantize_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    message = refuse("convert", case.path, tmp_path / "out.onnx")
    assert "node_mxfp8_quantize__1" in message and "--keep-mx" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", MX, indirect=True)
def test_keep_mx_keeps_activations_only(case: Case, converted: Make) -> None:
    path = converted(case.name, "--keep-mx")
    found = ops(path)
    assert found.count("trt::TRT_MXFP8DynamicQuantize") == ops(case.path).count("trt::TRT_MXFP8DynamicQuantize") // 2
    assert (
        found.count("DequantizeLinear")
        == found.count("trt::TRT_MXFP8DequantizeLinear")
        == found.count("trt::TRT_MXFP8DynamicQuantize")
    )
    assert opsets(path) == {"": 24, "trt": 1}


def test_the_padded_shapes_of_the_exporter_are_gone(converted: Make) -> None:
    proto = onnx.load(converted("gpt_mxfp8", "--keep-mx"))
    kept = {name for node in proto.graph.node if node.op_type == "TRT_MXFP8DynamicQuantize" for name in node.output}
    assert not kept & {value.name for value in proto.graph.value_info}


def test_the_linear_fixture_keeps_its_numbers(converted: Make) -> None:
    case = Case("mxfp8_linear")
    assert rel_l2(evaluate(converted(case.name, "--keep-mx"), case.feeds["x"]), case.expected) <= 1e-6


@pytest.mark.parametrize("case", MX, indirect=True)
def test_stored_weights_are_those_of_numpy(case: Case, converted: Make) -> None:
    weights = numpy_weights(case.path)
    found = list(initializers(converted(case.name, "--keep-mx")).values())
    data = sorted(a.tobytes() for a in found if a.dtype == FP8)
    scales = sorted(a.tobytes() for a in found if a.dtype == ml_dtypes.float8_e8m0fnu)
    assert data == sorted(mx(w)[0].tobytes() for w in weights)
    assert scales == sorted(mx(w)[1].tobytes() for w in weights)


def numpy_weights(path: Path) -> list[Array]:
    graph = onnx.load(path).graph
    names = {node.input[0] for node in graph.node if node.op_type == "TRT_MXFP8DynamicQuantize"}
    return [numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in names]


@pytest.mark.parametrize("quantize", ["TRT_MXFP8DynamicQuantize", "TRT_MXFP8QuantizeLinear"])
def test_a_weight_alone_needs_no_custom_operator(quantize: str, tmp_path: Path) -> None:
    """TransformerEngine 2.6 wrote the dynamic operator under the name of the static one."""
    out = tmp_path / "out.onnx"
    succeed("convert", model(tmp_path / "in.onnx", quantize=quantize), out, "--no-check")
    onnx.checker.check_model(str(out), full_check=True)
    data, exponent = mx(W)
    dequantized = data.astype(np.float32) * np.repeat(np.ldexp(np.float32(1), exponent.astype(int) - 127), 32, axis=1)
    assert rel_l2(evaluate(out, X), X @ dequantized.T) <= 1e-6
    assert ops(out) == ["DequantizeLinear", "Gemm"] and opsets(out) == {"": 24}


def test_keep_mx_gives_the_old_name_its_right_one(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    succeed(
        "convert",
        model(tmp_path / "in.onnx", activation=True, quantize="TRT_MXFP8QuantizeLinear"),
        out,
        "--keep-mx",
        "--no-check",
    )
    assert ops(out).count("trt::TRT_MXFP8DynamicQuantize") == 1 and "trt::TRT_MXFP8QuantizeLinear" not in ops(out)


@pytest.mark.parametrize("factor", [0.0, 2.0**-140, 448.0, 448.0000305, 2.0**100], ids=str)
def test_blocks_at_the_edges(factor: float, tmp_path: Path) -> None:
    """All zero, below the smallest scale, exactly a power of two times 448, one ulp above, and huge."""
    weight = (np.sign(W) * np.float32(factor)).astype(np.float32)
    out = tmp_path / "out.onnx"
    succeed("convert", model(tmp_path / "in.onnx", weight=weight), out, "--no-check")
    found = list(initializers(out).values())
    data, exponents = mx(weight)
    assert next(a for a in found if a.dtype == ml_dtypes.float8_e8m0fnu).tobytes() == exponents.tobytes()
    assert next(a for a in found if a.dtype == FP8).tobytes() == data.tobytes()


UP = pytest.param(lambda w: np.nextafter(w, np.float32(np.inf)), id="one ulp above")


@pytest.mark.parametrize(
    "towards",
    [
        pytest.param(lambda w: w, id="exact"),
        pytest.param(lambda w: np.nextafter(w, np.float32(0)), id="one ulp below"),
        UP,
    ],
)
def test_scales_around_every_power_of_two(towards: Callable[[Array], Array], tmp_path: Path) -> None:
    exponents = np.arange(-118, 118)
    weight = np.repeat(np.ldexp(np.float32(448), exponents).astype(np.float32), 32).reshape(-1, 32)
    weight = towards(weight)
    out = tmp_path / "out.onnx"
    succeed("convert", model(tmp_path / "in.onnx", weight=weight), out, "--no-check")
    scales = next(a for a in initializers(out).values() if a.dtype == ml_dtypes.float8_e8m0fnu)
    assert scales.tobytes() == mx(weight)[1].tobytes()


def test_a_row_that_is_no_multiple_of_32_is_refused_by_name(tmp_path: Path) -> None:
    assert "weight_mx" in refuse(
        "convert", model(tmp_path / "in.onnx", weight=normal(32, 48)), tmp_path / "out.onnx", "--no-check"
    )
    assert not (tmp_path / "out.onnx").exists()


def test_validate_runs_both_sides(converted: Make) -> None:
    """The command line can judge a kept-MX graph: it knows the operators' definition."""
    path = converted("mxfp8_linear", "--keep-mx")
    succeed("validate", Case("mxfp8_linear").path, path, "--inputs", Case("mxfp8_linear").path.with_suffix(".npz"))
