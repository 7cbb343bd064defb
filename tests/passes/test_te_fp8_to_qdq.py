"""TransformerEngine's FP8 operators in small graphs: scales, shared weights, names, stored FP8 bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.support import (
    E4M3,
    FLOAT,
    FP8,
    HALF,
    UINT8,
    Array,
    Session,
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
)  # fmt: skip

X, W = normal(4, 16, seed=1), normal(32, 16)


def pair(data: str, scale: str, result: str, name: str = "", **attributes: Any) -> list[onnx.NodeProto]:
    """Quantize and dequantize as TransformerEngine writes them; no node names unless given."""
    return [
        helper.make_node(
            "TRT_FP8QuantizeLinear",
            [data, scale],
            [f"{result}_q"],
            f"{name}_q" if name else "",
            domain="trt",
            **attributes,
        ),
        helper.make_node(
            "TRT_FP8DequantizeLinear",
            [f"{result}_q", scale],
            [result],
            f"{name}_dq" if name else "",
            domain="trt",
            **attributes,
        ),
    ]


def gemm(weight: str = "wd", result: str = "y") -> onnx.NodeProto:
    return helper.make_node("Gemm", ["x", weight], [result], transB=1)


def model(path: Path, nodes: Sequence[onnx.NodeProto], *shapes: list[int], **arrays: Any) -> Path:
    """Input x [4, 16], weight w, outputs y, y1 of the given shapes (one of [4, 32] by default)."""
    results = [info("y" if not i else f"y{i}", shape) for i, shape in enumerate(shapes or ([4, 32],))]
    return write(path, nodes, [info("x", [4, 16])], results, stored(**{"w": W, **arrays}), domains=["trt"])


def convert(path: Path, *flags: str) -> Path:
    out = path.with_name("out.onnx")
    succeed("convert", path, out, *flags)
    onnx.checker.check_model(str(out), full_check=True)
    return out


def rounded(array: Array, scale: Any) -> Array:
    return e4m3(array / np.float32(scale)).astype(np.float32) * np.float32(scale)


@pytest.mark.parametrize("scale", [np.float32(0.02), np.array([0.02], np.float32)], ids=["rank 0", "rank 1"])
def test_activation_and_weight(scale: Array, tmp_path: Path) -> None:
    """The domain comes first in opset_import, as some exporters write it, and no node has a name."""
    nodes = [*pair("x", "s", "xd"), *pair("w", "s", "wd"), helper.make_node("Gemm", ["xd", "wd"], ["y"], transB=1)]
    out = convert(model(tmp_path / "in.onnx", nodes, s=scale))
    assert opsets(out) == {"": 19}
    assert rel_l2(Session(out)({"x": X})["y"], rounded(X, 0.02) @ rounded(W, 0.02).T) <= 1e-6
    names = [node.name for node in onnx.load(out).graph.node]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("scale", [0.0, -0.5, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("target", ["w", "x"])
def test_an_impossible_scale_is_refused_by_name(scale: float, target: str, tmp_path: Path) -> None:
    last = gemm() if target == "w" else helper.make_node("Gemm", ["wd", "w"], ["y"], transB=1)
    path = model(tmp_path / "in.onnx", [*pair(target, "s", "wd", "layer7"), last], s=np.float32(scale))
    message = refuse("convert", path, tmp_path / "out.onnx")
    assert "layer7_q" in message and "scale" in message and "calibrate" in message
    assert not (tmp_path / "out.onnx").exists()


def test_a_scale_that_fp16_made_zero_is_refused(tmp_path: Path) -> None:
    cast = [helper.make_node("Cast", ["tiny"], ["half"], to=HALF), helper.make_node("Cast", ["half"], ["s"], to=FLOAT)]
    path = model(tmp_path / "in.onnx", [*cast, *pair("w", "s", "wd", "layer7"), gemm()], tiny=np.float32(1e-9))
    assert "layer7_q" in refuse("convert", path, tmp_path / "out.onnx")


@pytest.mark.parametrize("scale", [2.9e-39, 1.1754942e-38])
def test_a_denormal_scale_is_a_warning(scale: float, tmp_path: Path) -> None:
    path = model(tmp_path / "in.onnx", [*pair("w", "s", "wd", "layer7"), gemm()], s=np.float32(scale))
    result = succeed("convert", path, tmp_path / "out.onnx")
    assert "warning" in result.out and "layer7_q" in result.out and "denormal" in result.out
    assert (
        rel_l2(Session(tmp_path / "out.onnx")({"x": X})["y"], X @ (np.sign(W) * np.float32(448) * np.float32(scale)).T)
        <= 1e-6
    )


def test_the_smallest_normal_scale_is_no_warning(tmp_path: Path) -> None:
    path = model(tmp_path / "in.onnx", [*pair("w", "s", "wd"), gemm()], s=np.finfo(np.float32).tiny)
    assert "denormal" not in succeed("convert", path, tmp_path / "out.onnx").out


def test_scales_of_a_pair_stay_as_given(tmp_path: Path) -> None:
    """TransformerEngine computes one in double precision and the other in the graph: they may differ by an ulp."""
    q, dq = pair("w", "s", "wd")
    dq.input[1] = "t"
    up = np.nextafter(np.float32(0.02), np.float32(1))
    out = convert(model(tmp_path / "in.onnx", [q, dq, gemm()], s=np.float32(0.02), t=up))
    assert rel_l2(Session(out)({"x": X})["y"], X @ (e4m3(W / np.float32(0.02)).astype(np.float32) * up).T) <= 1e-6
    scales = [
        a
        for name, a in initializers(out).items()
        if name.startswith(("s", "t")) and a.dtype == np.float32 and a.size == 1
    ]
    assert [a.tobytes() for a in scales] == [up.tobytes()]


def test_a_scale_computed_from_constants_is_folded(tmp_path: Path) -> None:
    chain = [helper.make_node("Reciprocal", ["te_scale"], ["r"]), helper.make_node("Mul", ["r", "one"], ["s"])]
    out = convert(
        model(
            tmp_path / "in.onnx",
            [*chain, *pair("w", "s", "wd"), gemm()],
            te_scale=np.array([64], np.float32),
            one=np.float32(1),
        )
    )
    assert sorted(ops(out)) == ["DequantizeLinear", "Gemm"]
    assert rel_l2(Session(out)({"x": X})["y"], X @ rounded(W, 1 / 64).T) <= 1e-6


@pytest.mark.parametrize("axis", [0, 1])
def test_scale_vector(axis: int, tmp_path: Path) -> None:
    scale = (np.abs(W).max(1 - axis) / 448).astype(np.float32)
    out = convert(model(tmp_path / "in.onnx", [*pair("w", "s", "wd", axis=axis), gemm()], s=scale))
    broadcast = scale[:, None] if axis == 0 else scale[None, :]
    assert rel_l2(Session(out)({"x": X})["y"], X @ (e4m3(W / broadcast).astype(np.float32) * broadcast).T) <= 1e-6


def test_scale_vector_of_an_ambiguous_axis_is_refused(tmp_path: Path) -> None:
    square = normal(16, 16)
    path = model(
        tmp_path / "in.onnx", [*pair("w", "s", "wd", "layer7"), gemm()], w=square, s=np.full(16, 0.02, np.float32)
    )
    assert "layer7_q" in refuse("convert", path, tmp_path / "out.onnx")


@pytest.mark.parametrize("scales", [(0.02, 0.02), (0.02, 0.05)], ids=["one scale", "two scales"])
def test_a_weight_that_two_layers_share(scales: tuple[float, float], tmp_path: Path) -> None:
    nodes = [*pair("w", "s", "wd"), *pair("w", "t", "vd"), gemm(), gemm("vd", "y1")]
    out = convert(
        model(tmp_path / "in.onnx", nodes, [4, 32], [4, 32], s=np.float32(scales[0]), t=np.float32(scales[1]))
    )
    result = Session(out)({"x": X})
    assert rel_l2(result["y"], X @ rounded(W, scales[0]).T) <= 1e-6
    assert rel_l2(result["y1"], X @ rounded(W, scales[1]).T) <= 1e-6
    assert "w" not in initializers(out)


def test_a_weight_tied_to_an_embedding_keeps_its_table(tmp_path: Path) -> None:
    nodes = [*pair("w", "s", "wd"), gemm(), helper.make_node("Gather", ["w", "ids"], ["y1"])]
    out = convert(model(tmp_path / "in.onnx", nodes, [4, 32], [2, 16], s=np.float32(0.02), ids=np.array([3, 1])))
    result = Session(out)({"x": X})
    assert np.array_equal(result["y1"], W[[3, 1]])
    assert rel_l2(result["y"], X @ rounded(W, 0.02).T) <= 1e-6


def test_a_weight_that_is_also_a_graph_input_is_not_folded(tmp_path: Path) -> None:
    """The caller may override it, so its quantize has to stay."""
    inputs = [info("x", [4, 16]), info("w", [32, 16])]
    path = write(
        tmp_path / "in.onnx",
        [*pair("w", "s", "wd"), gemm()],
        inputs,
        [info("y", [4, 32])],
        stored(w=W, s=np.float32(0.02)),
        domains=["trt"],
    )
    out = convert(path)
    other = normal(32, 16, seed=9)
    assert rel_l2(Session(out)({"x": X, "w": other})["y"], X @ rounded(other, 0.02).T) <= 1e-6


def test_primary_fp8_weights_are_reinterpreted(tmp_path: Path) -> None:
    """fp8_model_init stores FP8 bytes as uint8 behind the dequantize alone."""
    bits = e4m3(W / np.float32(0.02))
    dequantize = helper.make_node("TRT_FP8DequantizeLinear", ["w", "s"], ["wd"], "dq", domain="trt")
    path = model(tmp_path / "in.onnx", [dequantize, gemm()], w=bits.view(np.uint8), s=np.float32(0.02))
    out = convert(path, "--no-check")
    weights = [a for a in initializers(out).values() if a.size == W.size]
    assert [(a.dtype, a.tobytes()) for a in weights] == [(FP8, bits.tobytes())]
    assert rel_l2(Session(out)({"x": X})["y"], X @ rounded(W, 0.02).T) <= 1e-6


def test_primary_fp8_weights_pass_the_numeric_check(tmp_path: Path) -> None:
    """The check before and after must read uint8 bytes as FP8 too: a right conversion is not refused."""
    dequantize = helper.make_node("TRT_FP8DequantizeLinear", ["w", "s"], ["wd"], "dq", domain="trt")
    path = model(
        tmp_path / "in.onnx", [dequantize, gemm()], w=e4m3(W / np.float32(0.02)).view(np.uint8), s=np.float32(0.02)
    )
    succeed("convert", path, tmp_path / "out.onnx")


@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_casts_around_a_pair_stay_right(dtype: int, tmp_path: Path) -> None:
    """A 16-bit model: Cast, quantize, dequantize, Cast; the second Cast has two users."""
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    weight = W.astype(numpy_type)
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=FLOAT), *pair("wide", "s", "wd"),
        helper.make_node("Cast", ["wd"], ["narrow"], to=dtype),
        helper.make_node("Gemm", ["x", "narrow"], ["y"], transB=1), helper.make_node("Neg", ["narrow"], ["y1"]),
    ]  # fmt: skip
    inputs, outputs = [info("x", [4, 16], dtype)], [info("y", [4, 32], dtype), info("y1", [32, 16], dtype)]
    path = write(tmp_path / "in.onnx", nodes, inputs, outputs, stored(w=weight, s=np.float32(0.02)), domains=["trt"])
    result = Session(convert(path))({"x": X.astype(numpy_type)})
    assert np.array_equal(result["y1"], -rounded(weight.astype(np.float32), 0.02).astype(numpy_type))


def test_values_beyond_the_range_saturate_and_nan_stays(tmp_path: Path) -> None:
    weight = W.copy()
    weight[0, :4] = [1e9, -1e9, np.inf, np.nan]
    out = convert(
        model(
            tmp_path / "in.onnx",
            [*pair("w", "s", "wd"), helper.make_node("Neg", ["wd"], ["y"])],
            [32, 16],
            w=weight,
            s=np.float32(1),
        ),
        "--no-check",
    )
    assert np.array_equal(Session(out)({"x": X})["y"], -rounded(weight, 1), equal_nan=True)
    assert rounded(weight, 1)[0, :3].tolist() == [448, -448, 448]


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
def test_folding_equals_onnxruntimes_quantize_bit_for_bit(dtype: Any, tmp_path: Path) -> None:
    """Ties, denormals and overflow, against QuantizeLinear of ONNX Runtime."""
    ties = np.arange(0, 128, dtype=np.uint8).view(FP8).astype(np.float32)[:-1]
    values = np.concatenate([ties, (ties[:-1] + ties[1:]) / 2, normal(2000) * 300, normal(2000) * 1e-3]).astype(dtype)
    values = np.concatenate([values, -values])[: len(values) // 16 * 32].reshape(-1, 16)
    head = [helper.make_node("Cast", ["w"], ["wide"], to=FLOAT)]
    path = write(
        tmp_path / "in.onnx", [*head, *pair("wide", "s", "wd"), gemm()], [info("x", [4, 16])],
        [info("y", [4, len(values)])],
        stored(w=values, s=np.float32(1.25)), domains=["trt"],
    )  # fmt: skip
    folded = next(a for a in initializers(convert(path)).values() if a.size == values.size and a.dtype == FP8)
    zero = helper.make_tensor("z", E4M3, [], [0.0])
    quantize = write(
        tmp_path / "q.onnx", [helper.make_node("QuantizeLinear", ["v", "s", "z"], ["q"])], [info("v", [None, 16])],
        [info("q", [None, 16], E4M3)],
        [*stored(s=np.float32(1.25)), zero], opset=19,
    )  # fmt: skip
    assert folded.tobytes() == Session(quantize)({"v": values.astype(np.float32)})["q"].tobytes()


def test_value_info_of_uint8_is_retyped(tmp_path: Path) -> None:
    nodes = [*pair("x", "s", "xd"), helper.make_node("Gemm", ["xd", "w"], ["y"], transB=1)]
    path = write(
        tmp_path / "in.onnx", nodes, [info("x", [4, 16])], [info("y", [4, 32])], stored(w=W, s=np.float32(0.02)),
        domains=["trt"],
        value_info=[info("xd_q", [4, 16], UINT8)],
    )  # fmt: skip
    out = convert(path)
    assert {v.type.tensor_type.elem_type for v in onnx.load(out).graph.value_info if v.name == "xd_q"} <= {E4M3}
    assert rel_l2(Session(out)({"x": X})["y"], rounded(X, 0.02) @ W.T) <= 1e-6


def test_a_quantized_graph_output_keeps_its_name(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.onnx",
        pair("x", "s", "y"),
        [info("x", [4, 16])],
        [info("y", [4, 16])],
        stored(s=np.float32(0.02)),
        domains=["trt"],
    )
    assert np.array_equal(Session(convert(path))({"x": X})["y"], rounded(X, 0.02))


def test_operators_inside_a_subgraph_are_named(tmp_path: Path) -> None:
    branch = helper.make_graph(pair("w", "s", "wd", "inner"), "then", [], [info("wd", [32, 16])])
    other = helper.make_graph([helper.make_node("Identity", ["w"], ["we"])], "else", [], [info("we", [32, 16])])
    nodes = [helper.make_node("If", ["flag"], ["wi"], "choice", then_branch=branch, else_branch=other), gemm("wi")]
    inputs = [info("x", [4, 16]), info("flag", [], onnx.TensorProto.BOOL)]
    path = write(
        tmp_path / "in.onnx", nodes, inputs, [info("y", [4, 32])], stored(w=W, s=np.float32(0.02)), domains=["trt"]
    )
    assert "inner_q" in refuse("convert", path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_missing_scale_is_refused_by_name(tmp_path: Path) -> None:
    node = helper.make_node("TRT_FP8QuantizeLinear", ["w"], ["q"], "layer7", domain="trt")
    back = helper.make_node("TRT_FP8DequantizeLinear", ["q", "s"], ["wd"], "dq", domain="trt")
    assert "layer7" in refuse(
        "convert", model(tmp_path / "in.onnx", [node, back, gemm()], s=np.float32(1)), tmp_path / "out.onnx"
    )


def test_the_single_pass_says_which_opset_it_needs(tmp_path: Path) -> None:
    path = model(tmp_path / "in.onnx", [*pair("w", "s", "wd"), gemm()], s=np.float32(1))
    assert "opset 19" in refuse("te-fp8-to-qdq", path, tmp_path / "out.onnx")


def test_old_exporter_split_and_reduce(tmp_path: Path) -> None:
    """Opset 17: Split without sizes, ReduceSumSquare with axes as an attribute, rank-0 Constant scales."""
    nodes = [
        helper.make_node("Constant", [], ["s"], value=helper.make_tensor("", FLOAT, [], [0.02])), *pair("w", "s", "wd"),
        gemm("wd", "h"),
        helper.make_node("Split", ["h"], ["a", "b"], axis=1), helper.make_node("Mul", ["a", "b"], ["m"]),
        helper.make_node("ReduceSumSquare", ["m"], ["r"], axes=[-1], keepdims=1),
        helper.make_node("Div", ["m", "r"], ["y"]),
    ]  # fmt: skip
    path = write(
        tmp_path / "in.onnx",
        nodes,
        [info("x", [4, 16])],
        [info("y", [4, 16])],
        stored(w=W),
        opset=17,
        domains=["trt"],
        ir_version=8,
    )
    product = X @ rounded(W, 0.02).T
    gated = product[:, :16] * product[:, 16:]
    assert rel_l2(Session(convert(path))({"x": X})["y"], gated / (gated**2).sum(-1, keepdims=True)) <= 1e-6
