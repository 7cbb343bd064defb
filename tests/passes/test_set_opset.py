"""`set-opset`: a higher opset means the same, and nothing is ever lowered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.support import INT64, Session, info, normal, opsets, refuse, rel_l2, stored, succeed, write

X = np.abs(normal(4, 6)) + 0.5
REDUCE = {
    "ReduceMean": X.mean(-1, keepdims=True),
    "ReduceMax": X.max(-1, keepdims=True),
    "ReduceMin": X.min(-1, keepdims=True),
    "ReduceProd": X.prod(-1, keepdims=True),
    "ReduceSumSquare": (X * X).sum(-1, keepdims=True),
    "ReduceL1": np.abs(X).sum(-1, keepdims=True),
    "ReduceL2": np.sqrt((X * X).sum(-1, keepdims=True)),
    "ReduceLogSum": np.log(X.sum(-1, keepdims=True)),
    "ReduceLogSumExp": np.log(np.exp(X).sum(-1, keepdims=True)),
}


def upgrade(path: Path, version: int = 19) -> Path:
    out = path.with_name("out.onnx")
    succeed("set-opset", path, out, "--version", str(version))
    onnx.checker.check_model(str(out), full_check=True)
    return out


@pytest.mark.parametrize("op", REDUCE)
def test_axes_attribute_becomes_an_input(op: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.onnx",
        [helper.make_node(op, ["x"], ["y"], axes=[-1])],
        [info("x", [4, 6])],
        [info("y", [4, 1])],
        opset=17,
    )
    assert rel_l2(Session(upgrade(path))({"x": X})["y"], REDUCE[op]) <= 1e-6


@pytest.mark.parametrize("keepdims", [0, 1])
def test_reduce_without_axes_reduces_all(keepdims: int, tmp_path: Path) -> None:
    shape = [1, 1] if keepdims else []
    path = write(
        tmp_path / "in.onnx",
        [helper.make_node("ReduceMax", ["x"], ["y"], keepdims=keepdims)],
        [info("x", [4, 6])],
        [info("y", shape)],
        opset=17,
    )
    assert np.array_equal(Session(upgrade(path))({"x": X})["y"], X.max().reshape(shape))


@pytest.mark.parametrize(("count", "width"), [(2, 3), (3, 2)])
def test_split_without_sizes(count: int, width: int, tmp_path: Path) -> None:
    names = [f"y{i}" for i in range(count)]
    path = write(
        tmp_path / "in.onnx",
        [helper.make_node("Split", ["x"], names, axis=-1)],
        [info("x", [4, 6])],
        [info(n, [4, width]) for n in names],
        opset=17,
    )
    result = Session(upgrade(path))({"x": X})
    assert all(np.array_equal(result[f"y{i}"], part) for i, part in enumerate(np.split(X, count, -1)))


def test_split_with_sizes_keeps_them(tmp_path: Path) -> None:
    nodes = [helper.make_node("Split", ["x", "sizes"], ["a", "b"], axis=1)]
    path = write(
        tmp_path / "in.onnx",
        nodes,
        [info("x", [4, 6])],
        [info("a", [4, 5]), info("b", [4, 1])],
        stored(sizes=np.array([5, 1])),
        opset=17,
    )
    assert np.array_equal(Session(upgrade(path))({"x": X})["b"], X[:, 5:])


def test_axes_of_opset_11(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Unsqueeze", ["x"], ["u"], axes=[0, 3]),
        helper.make_node("ReduceSum", ["u"], ["r"], axes=[1], keepdims=1),
        helper.make_node("Squeeze", ["r"], ["q"], axes=[0, 1]),
        helper.make_node("Split", ["q"], ["a", "b"], axis=0, split=[2, 4]),
        helper.make_node("Neg", ["b"], ["y"]),
    ]
    path = write(
        tmp_path / "in.onnx", nodes, [info("x", [4, 6])], [info("y", [4, 1]), info("a", [2, 1])], opset=11, ir_version=6
    )
    assert rel_l2(Session(upgrade(path))({"x": X})["y"], -X.sum(0)[2:, None]) <= 1e-6


@pytest.mark.parametrize("version", [13, 19, 20])
def test_an_opset_is_never_lowered(version: int, tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.onnx",
        [helper.make_node("Gelu", ["x"], ["y"])],
        [info("x", [4, 6])],
        [info("y", [4, 6])],
        opset=20,
    )
    assert opsets(upgrade(path, version)) == {"": 20}


@pytest.mark.parametrize("version", [13, 17, 19, 21, 23, 24, 25])
def test_the_ir_version_carries_the_opset(version: int, tmp_path: Path) -> None:
    """ONNX Runtime loads IR up to 13; the checker knows which IR an opset needs."""
    path = write(
        tmp_path / "in.onnx",
        [helper.make_node("Relu", ["x"], ["y"])],
        [info("x", [4, 6])],
        [info("y", [4, 6])],
        opset=13,
        ir_version=7,
    )
    out = upgrade(path, version)
    assert opsets(out) == {"": version}
    assert np.array_equal(Session(out)({"x": X})["y"], X)


def test_the_old_names_of_the_default_domain(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.onnx",
        [helper.make_node("ReduceMax", ["x"], ["y"], axes=[1], domain="ai.onnx")],
        [info("x", [4, 6])],
        [info("y", [4, 1])],
        opset=17,
    )
    assert np.array_equal(Session(upgrade(path))({"x": X})["y"], X.max(1, keepdims=True))


def one_node(path: Path, op: str, old: int, attributes: dict[str, Any], outputs: int = 1) -> Path:
    """`op` on a [2, 4, 6] input, with the statistics that a BatchNormalization takes."""
    extra = (
        {name: np.linspace(0.5, 1.5, 4, dtype=np.float32) for name in ("scale", "bias", "mean", "var")}
        if op == "BatchNormalization"
        else {}
    )
    made = ["y", "running_mean", "running_var"][:outputs]
    shapes = [[2, 4, 6], [4], [4]][:outputs]
    node = helper.make_node(op, ["x", *extra], made, "the_node", **attributes)
    return write(
        path,
        [node],
        [info("x", [2, 4, 6])],
        [info(n, s) for n, s in zip(made, shapes, strict=True)],
        stored(**extra),
        opset=old,
        ir_version=7,
    )


@pytest.mark.parametrize(
    ("op", "attributes", "old"),
    [("Softmax", {"axis": 2}, 11), ("LogSoftmax", {"axis": -1}, 12), ("Hardmax", {"axis": 2}, 12),
        ("BatchNormalization", {"epsilon": 0.25}, 11),
     ("Softmax", {"axis": 1}, 12), ("Softmax", {}, 12), ("LogSoftmax", {"axis": -2}, 12), ("Hardmax", {"axis": 0}, 12),
     ("BatchNormalization", {}, 13), ("Dropout", {"ratio": 0.25}, 11)],
)  # fmt: skip
def test_operators_whose_inference_kept_its_meaning(
    op: str, attributes: dict[str, Any], old: int, tmp_path: Path
) -> None:
    path = one_node(tmp_path / "in.onnx", op, old, attributes)
    x = normal(2, 4, 6, seed=3)
    out = upgrade(path)
    np.testing.assert_allclose(Session(out)({"x": x})["y"], Session(path)({"x": x})["y"], rtol=1e-6)


@pytest.mark.parametrize(
    ("op", "attributes", "old", "outputs"),
    [("BatchNormalization", {}, 13, 3)],
)
def test_an_operator_that_changed_its_meaning_is_named(
    op: str, attributes: dict[str, Any], old: int, outputs: int, tmp_path: Path
) -> None:
    path = one_node(tmp_path / "in.onnx", op, old, attributes, outputs)
    assert "the_node" in refuse("set-opset", path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("version", ["12", "26", "x"])
def test_versions_out_of_range_are_usage_errors(version: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.onnx", [helper.make_node("Relu", ["x"], ["y"])], [info("x", [4])], [info("y", [4])], opset=13
    )
    refuse("set-opset", path, tmp_path / "out.onnx", "--version", version, code=2)


def test_reduce_inside_a_subgraph(tmp_path: Path) -> None:
    """Both branches of an If hold operators whose form changed."""
    then = helper.make_graph([helper.make_node("ReduceMax", ["x"], ["t"], axes=[1])], "then", [], [info("t", [4, 1])])
    other = helper.make_graph([helper.make_node("ReduceMin", ["x"], ["e"], axes=[1])], "else", [], [info("e", [4, 1])])
    node = helper.make_node("If", ["flag"], ["y"], "choice", then_branch=then, else_branch=other)
    path = write(
        tmp_path / "in.onnx",
        [node],
        [info("x", [4, 6]), info("flag", [], onnx.TensorProto.BOOL)],
        [info("y", [4, 1])],
        opset=17,
    )
    session = Session(upgrade(path))
    assert np.array_equal(session({"x": X, "flag": np.array(True)})["y"], X.max(1, keepdims=True))
    assert np.array_equal(session({"x": X, "flag": np.array(False)})["y"], X.min(1, keepdims=True))


def test_cast_to_and_integer_types_survive(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.onnx",
        [helper.make_node("Cast", ["x"], ["y"], to=INT64)],
        [info("x", [4, 6])],
        [info("y", [4, 6], INT64)],
        opset=13,
        ir_version=7,
    )
    assert np.array_equal(Session(upgrade(path))({"x": X})["y"], X.astype(np.int64))


def test_an_older_ir_version_for_an_older_reader(tmp_path: Path) -> None:
    """onnx's own table: opset 19 came with IR 9, 21 with IR 10."""
    path = write(
        tmp_path / "in.onnx",
        [helper.make_node("Relu", ["x"], ["y"])],
        [info("x", [4, 6])],
        [info("y", [4, 6])],
        opset=19,
        ir_version=11,
    )
    succeed("set-opset", path, tmp_path / "out.onnx", "--version", "19", "--ir-version", "9")
    assert onnx.load(tmp_path / "out.onnx").ir_version == 9
    assert "takes 9 to" in refuse(
        "set-opset", path, tmp_path / "no.onnx", "--version", "19", "--ir-version", "8", code=2
    )
    assert "takes 10 to" in refuse(
        "set-opset", path, tmp_path / "no.onnx", "--version", "21", "--ir-version", "9", code=2
    )
