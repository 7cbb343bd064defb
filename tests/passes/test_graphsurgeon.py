"""A GraphSurgeon function as a pass: weights stay on disk, and what GraphSurgeon drops comes back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxtools.ir.model import Model
from onnxtools.passes.graphsurgeon import GraphSurgeonPass
from onnxtools.pipeline.manager import PassManager
from tests.conftest import Make
from tests.support import (
    Case,
    Session,
    e4m3,
    external,
    info,
    initializers,
    linear,
    normal,
    ops,
    refuse,
    rel_l2,
    stored,
    succeed,
    write,
)

SURGERY = """
def relu_after(graph):
    import onnx_graphsurgeon as gs
    out = graph.outputs[0]
    inner = gs.Variable("before_relu", dtype=out.dtype, shape=out.shape)
    out.inputs[0].outputs = [inner]
    graph.nodes.append(gs.Node("Relu", "relu", inputs=[inner], outputs=[out]))

def double(graph):
    for tensor in graph.tensors().values():
        if tensor.name == "w":
            tensor.values = tensor.values * 2
    return graph

def nothing(graph):
    pass

def broken(graph):
    raise KeyError("surgery went wrong")
"""


@pytest.fixture
def surgery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_surgery.py").write_text(SURGERY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_surgery", raising=False)
    return "my_surgery"


def test_a_function_changes_the_graph(surgery: str, tmp_path: Path) -> None:
    path, x = linear(tmp_path / "in.onnx"), normal(4, 64, seed=1)
    succeed("graphsurgeon", path, tmp_path / "out.onnx", "--function", f"{surgery}:relu_after")
    assert ops(tmp_path / "out.onnx") == ["MatMul", "Relu"]
    assert rel_l2(Session(tmp_path / "out.onnx")({"x": x})["y"], np.maximum(x @ normal(64, 128), 0)) <= 1e-6


@pytest.mark.parametrize("outside", [False, True], ids=["inline", "external"])
def test_a_changed_weight_is_written(outside: bool, surgery: str, tmp_path: Path) -> None:
    path = linear(tmp_path / "in.onnx")
    if outside:
        external(path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    succeed("graphsurgeon", path, tmp_path / "out.onnx", "--function", f"{surgery}:double")
    assert np.array_equal(initializers(tmp_path / "out.onnx")["w"], 2 * normal(64, 128))
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())


def test_untouched_external_weights_stay_where_they_are(surgery: str, tmp_path: Path) -> None:
    path = external(linear(tmp_path / "in.onnx"))
    result = succeed("graphsurgeon", path, tmp_path / "out.onnx", "--function", f"{surgery}:relu_after")
    assert "weights.bin" in result.out
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix not in (".py", "")) == [
        "in.onnx",
        "out.onnx",
        "weights.bin",
    ]
    assert np.array_equal(initializers(tmp_path / "out.onnx")["w"], normal(64, 128))


def test_fp8_weights_keep_their_type_and_bits(surgery: str, converted: Make, tmp_path: Path) -> None:
    case, path = Case("te_linear_fp8_ds"), converted("te_linear_fp8_ds")
    succeed("graphsurgeon", path, tmp_path / "out.onnx", "--function", f"{surgery}:nothing")
    a, b = initializers(path), initializers(tmp_path / "out.onnx")
    assert {n: (x.dtype, x.tobytes()) for n, x in a.items()} == {n: (x.dtype, x.tobytes()) for n, x in b.items()}
    assert rel_l2(Session(tmp_path / "out.onnx")(case.feeds)["y"], case.expected) <= 1e-6


def test_metadata_survives(surgery: str, tmp_path: Path) -> None:
    proto = onnx.load(linear(tmp_path / "in.onnx"))
    proto.graph.node[0].doc_string, proto.doc_string, proto.producer_name = "the node", "the model", "a test"
    proto.graph.node[0].metadata_props.add(key="k", value="v")
    proto.metadata_props.add(key="model", value="data")
    onnx.save(proto, tmp_path / "in.onnx")
    succeed("graphsurgeon", tmp_path / "in.onnx", tmp_path / "out.onnx", "--function", f"{surgery}:nothing")
    after = onnx.load(tmp_path / "out.onnx")
    assert (after.graph.node[0].doc_string, after.doc_string, after.producer_name) == (
        "the node",
        "the model",
        "a test",
    )
    assert [(p.key, p.value) for p in after.graph.node[0].metadata_props] == [("k", "v")]
    assert ("model", "data") in [(p.key, p.value) for p in after.metadata_props]


def test_a_callable_in_python(tmp_path: Path) -> None:
    seen: list[int] = []

    def count(graph: Any) -> None:
        seen.append(len(graph.nodes))

    report = PassManager([GraphSurgeonPass(count)]).run(Model.load(linear(tmp_path / "in.onnx")))
    assert seen == [1] and report.steps[0].options["function"].endswith("count")


@pytest.mark.parametrize("function", ["", "nocolon", "no_such_module_at_all:f", "my_surgery:absent", "json:dumps:x"])
def test_a_function_that_cannot_be_found_is_a_usage_error(function: str, surgery: str, tmp_path: Path) -> None:
    refuse("graphsurgeon", linear(tmp_path / "in.onnx"), tmp_path / "out.onnx", "--function", function, code=2)
    assert not (tmp_path / "out.onnx").exists()


def test_custom_and_bf16_values_pass_through(surgery: str, tmp_path: Path) -> None:
    """GraphSurgeon has no FP8; an FP8 initializer and its dequantize survive."""
    weight = e4m3(normal(64, 8))
    tensor = helper.make_tensor("wq", onnx.TensorProto.FLOAT8E4M3FN, [64, 8], weight.tobytes(), raw=True)
    nodes = [
        helper.make_node("DequantizeLinear", ["wq", "s"], ["wd"], "dq"),
        helper.make_node("MatMul", ["x", "wd"], ["y"], "mm"),
    ]
    path = write(
        tmp_path / "in.onnx",
        nodes,
        [info("x", [4, 64])],
        [info("y", [4, 8])],
        [tensor, *stored(s=np.float32(0.5))],
        opset=19,
    )
    succeed("graphsurgeon", path, tmp_path / "out.onnx", "--function", f"{surgery}:relu_after")
    x = normal(4, 64, seed=2)
    assert (
        rel_l2(Session(tmp_path / "out.onnx")({"x": x})["y"], np.maximum(x @ (weight.astype(np.float32) / 2), 0))
        <= 1e-6
    )
