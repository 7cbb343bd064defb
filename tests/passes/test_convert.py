"""`convert` on every fixture: the numbers of TransformerEngine, in standard ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.conftest import Make
from tests.support import (
    E4M3,
    FP8,
    MX,
    SHARED_TE,
    STYLE,
    TE,
    Array,
    Case,
    Session,
    e4m3,
    info,
    initializers,
    normal,
    ops,
    opsets,
    present,
    refuse,
    rel_l2,
    succeed,
    write,
)

STANDARD = [name for name in (*TE, *STYLE) if name not in MX]
QUANTIZED = [
    name
    for name in STANDARD
    if name not in ("te_gpt_none_dyn", "attention_op", "padding_mask", "rope_no_fp8", "sdpa_gqa")
]
REFUSED_BY_TENSORRT = {"SplitToSequence", "SequenceAt", "CastLike", "Identity", "Constant", "Dropout"}


def test_every_shared_fixture_is_tested() -> None:
    assert {path.stem for path in present(SHARED_TE).glob("*.onnx")} <= set(TE)


@pytest.mark.parametrize("case", STANDARD, indirect=True)
def test_onnxruntime_gives_the_exporters_numbers(case: Case, converted: Make) -> None:
    outputs = Session(converted(case.name))(case.feeds)
    assert rel_l2(next(iter(outputs.values())), case.expected) <= case.tolerance


@pytest.mark.parametrize("case", STANDARD, indirect=True)
def test_graph_is_standard(case: Case, converted: Make) -> None:
    path = converted(case.name)
    onnx.checker.check_model(str(path), full_check=True)
    assert set(opsets(path)) == {""}
    assert not {op for op in ops(path) if "::" in op or op in REFUSED_BY_TENSORRT}


@pytest.mark.parametrize("case", STANDARD, indirect=True)
def test_axes_and_sizes_are_initializers(case: Case, converted: Make) -> None:
    proto = onnx.load(converted(case.name))
    stored = {tensor.name for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type.startswith("Reduce") or node.op_type in ("Split", "Squeeze", "Unsqueeze"):
            assert len(node.input) < 2 or node.input[1] in stored, node.name


@pytest.mark.parametrize("case", QUANTIZED, indirect=True)
def test_zero_points_are_fp8_initializers(case: Case, converted: Make) -> None:
    proto = onnx.load(converted(case.name))
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert nodes
    assert all(len(node.input) == 3 and types[node.input[2]] == E4M3 for node in nodes)
    assert not {value.name for value in proto.graph.input} & set(types)


@pytest.mark.parametrize("case", QUANTIZED, indirect=True)
def test_no_quantized_value_is_recorded_as_uint8(case: Case, converted: Make) -> None:
    proto = onnx.load(converted(case.name))
    quantized = {node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    recorded = {
        value.name: value.type.tensor_type.elem_type for value in proto.graph.value_info if value.name in quantized
    }
    assert set(recorded.values()) <= {E4M3}


@pytest.mark.parametrize("case", [*STANDARD, *MX], indirect=True)
def test_opset_is_raised_and_never_lowered(case: Case, converted: Make) -> None:
    flags = ["--keep-mx"] if case.name in MX else []
    assert opsets(converted(case.name, *flags))[""] == {"attention_op": 23, "gpt_mxfp8": 24, "mxfp8_linear": 24}.get(
        case.name, 19
    )


@pytest.mark.parametrize(("flag", "opset"), [("--opset=21", 21), ("--opset=24", 24), ("--opset19", 19)])
def test_opset_on_request(flag: str, opset: int, converted: Make) -> None:
    case = Case("rms_swiglu_gqa_rope")
    path = converted(case.name, flag)
    assert opsets(path)[""] == opset
    assert rel_l2(Session(path)(case.feeds)["logits"], case.expected) <= case.tolerance


def quantized_weights(path: Path) -> list[Array]:
    """FP8 bytes of each weight behind a TransformerEngine quantize in the original file, by numpy and ml_dtypes."""
    graph = onnx.load(path).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    found: dict[str, Array] = {}
    for node in graph.node:
        source = node.input[0] if node.op_type == "TRT_FP8QuantizeLinear" else ""
        while source in producers and producers[source].op_type == "Cast":
            source = producers[source].input[0]
        if source not in stored:
            continue
        weight = stored[source].astype(np.float32)
        scale = producers[node.input[1]]
        if scale.op_type == "Constant":
            attribute = scale.attribute[0]
            number = numpy_helper.to_array(attribute.t) if attribute.name == "value" else np.float32(attribute.f)
        else:  # current scaling
            assert scale.op_type == "Div"
            number = np.maximum(np.abs(weight).max(), np.float32(1e-12)) / np.float32(448)
        found[source] = e4m3(weight / number)
    assert found
    return list(found.values())


@pytest.mark.parametrize("case", QUANTIZED, indirect=True)
def test_stored_bits_are_those_of_numpy(case: Case, converted: Make) -> None:
    stored = [array for array in initializers(converted(case.name)).values() if array.dtype == FP8 and array.size > 1]
    expected = quantized_weights(case.path)
    assert sorted(array.tobytes() for array in stored) == sorted(array.tobytes() for array in expected)


@pytest.mark.parametrize("case", QUANTIZED, indirect=True)
def test_quantized_weights_take_a_quarter(case: Case, converted: Make) -> None:
    shapes = [array.shape for array in quantized_weights(case.path)]
    before = initializers(case.path).values()
    saved = sum(a.nbytes - a.size for a in before if a.shape in shapes and a.ndim == 2 and a.dtype.itemsize > 1)
    tables = {(512, 128), (128, 64), (64, 64)}  # embeddings have these shapes too and stay
    saved -= sum(
        a.nbytes - a.size
        for a in initializers(converted(case.name)).values()
        if a.shape in shapes and a.shape in tables and a.dtype != FP8
    )
    assert converted(case.name).stat().st_size < case.path.stat().st_size - 0.9 * saved


def test_a_linear_layer_is_four_times_smaller(converted: Make) -> None:
    case = Case("te_linear_fp8_ds")
    assert converted(case.name).stat().st_size < 0.27 * case.path.stat().st_size


@pytest.mark.parametrize("case", QUANTIZED, indirect=True)
def test_no_fold_weights_keeps_quantize(case: Case, converted: Make) -> None:
    path = converted(case.name, "--no-fold-weights")
    assert ops(path).count("QuantizeLinear") == ops(case.path).count("trt::TRT_FP8QuantizeLinear")
    assert ops(path).count("DequantizeLinear") == ops(case.path).count("trt::TRT_FP8DequantizeLinear")
    assert not [a for a in initializers(path).values() if a.dtype == FP8 and a.size > 1]
    assert rel_l2(next(iter(Session(path)(case.feeds).values())), case.expected) <= case.tolerance


def test_current_scales_stay_in_the_graph(converted: Make) -> None:
    """Scales of activations are computed from the data; those of weights are constants."""
    proto = onnx.load(converted("gpt_current_scaling"))
    stored = {tensor.name for tensor in proto.graph.initializer}
    producers = {name: node.op_type for node in proto.graph.node for name in node.output}
    activations = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    weights = [node for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored]
    assert len(activations) == len(weights) == 9
    assert {producers[node.input[1]] for node in activations} == {"Div"}
    assert all(node.input[1] in stored for node in weights)


def test_gelu_keeps_its_opset(tmp_path: Path) -> None:
    weight, scale = normal(32, 16), np.float32(0.02)
    nodes = [
        onnx.helper.make_node("TRT_FP8QuantizeLinear", ["w", "s"], ["q"], "q", domain="trt"),
        onnx.helper.make_node("TRT_FP8DequantizeLinear", ["q", "s"], ["d"], "dq", domain="trt"),
        onnx.helper.make_node("Gemm", ["x", "d"], ["g"], "gemm", transB=1),
        onnx.helper.make_node("Gelu", ["g"], ["y"], "gelu", approximate="tanh"),
    ]
    stored = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scale, "s")]
    path = write(
        tmp_path / "in.onnx", nodes, [info("x", [4, 16])], [info("y", [4, 32])], stored, opset=20, domains=["trt"]
    )
    succeed("convert", path, tmp_path / "out.onnx", "--opset19")
    assert opsets(tmp_path / "out.onnx") == {"": 20}
    x = normal(4, 16, seed=1)
    product = x @ (e4m3(weight / scale).astype(np.float32) * scale).T
    expected = product * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (product + 0.044715 * product**3)))
    assert rel_l2(Session(tmp_path / "out.onnx")({"x": x})["y"], expected) <= 1e-6


@pytest.mark.parametrize("flag", ["--opset=12", "--opset=26", "--opset=0"])
def test_opset_out_of_range_is_a_usage_error(flag: str, tmp_path: Path) -> None:
    assert "13 to 25" in refuse("convert", Case("te_linear_fp8_ds").path, tmp_path / "o.onnx", flag, code=2)
    assert not list(tmp_path.iterdir())


def test_converting_twice_changes_nothing_more(converted: Make, tmp_path: Path) -> None:
    once = converted("rms_swiglu_gqa_rope")
    succeed("convert", once, tmp_path / "twice.onnx")
    assert sorted(ops(tmp_path / "twice.onnx")) == sorted(ops(once))
    a, b = initializers(once), initializers(tmp_path / "twice.onnx")
    assert sorted(array.tobytes() for array in a.values()) == sorted(array.tobytes() for array in b.values())
