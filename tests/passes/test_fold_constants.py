"""`fold-constants` and `cleanup`: fewer nodes, the same results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from tests.support import FLOAT, INT64, Array, Session, dims, info, initializers, normal, ops, stored, succeed, write


def check(
    path: Path, command: str = "fold-constants", *flags: str, shapes: Sequence[tuple[int, ...]] = ((4, 6), (3, 6))
) -> Path:
    """Outputs equal those of the input at several sizes of a dynamic axis (onnx.reference)."""
    out = path.with_name("out.onnx")
    succeed(command, path, out, *flags)
    onnx.checker.check_model(str(out), full_check=True)
    before, after = onnx.load(path).graph.output, onnx.load(out).graph.output
    assert [(v.name, dims(v)) for v in after] == [(v.name, dims(v)) for v in before]
    for shape in shapes:
        x = normal(*shape)
        expected = ReferenceEvaluator(str(path)).run(None, {"x": x})
        result = Session(out)({"x": x})
        assert all(
            np.allclose(result[value.name], array, rtol=1e-6, atol=1e-6)
            for value, array in zip(before, expected, strict=True)
        )
    return out


def graph(path: Path, nodes: Sequence[onnx.NodeProto], output: Sequence[int | str] = ("n", 6), **arrays: Array) -> Path:
    return write(path, nodes, [info("x", ["n", 6])], [info("y", list(output))], stored(**arrays))


def test_a_chain_of_constants_becomes_an_initializer(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["c"], value_floats=[4.0]),
        helper.make_node("Reciprocal", ["c"], ["r"]),
        helper.make_node("Cast", ["r"], ["k"], to=FLOAT),
        helper.make_node("Mul", ["x", "k"], ["y"]),
    ]
    out = check(graph(tmp_path / "in.onnx", nodes))
    assert ops(out) == ["Mul"]
    assert [a.tolist() for a in initializers(out).values()] == [[0.25]]


def test_shape_arithmetic_of_a_static_axis_is_folded(tmp_path: Path) -> None:
    """Shape -> Gather -> Concat -> Reshape: the second axis is 6 for every batch."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "one"], ["g"]),
        helper.make_node("Unsqueeze", ["g", "zero"], ["u"]),
        helper.make_node("Concat", ["minus", "u"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["r"]),
        helper.make_node("Neg", ["r"], ["y"]),
    ]
    out = check(graph(tmp_path / "in.onnx", nodes, one=np.array(1), zero=np.array([0]), minus=np.array([-1])))
    assert ops(out) == ["Neg"]


def test_shape_arithmetic_of_a_dynamic_axis_stays(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=0, end=1),
        helper.make_node("Cast", ["s"], ["f"], to=FLOAT),
        helper.make_node("Div", ["x", "f"], ["y"]),
    ]
    assert "Shape" in ops(check(graph(tmp_path / "in.onnx", nodes)))


def test_results_beyond_the_limit_stay(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["a", "a"], ["b"]),
        helper.make_node("ReduceMax", ["b"], ["m"], keepdims=0),
        helper.make_node("Mul", ["x", "m"], ["y"]),
    ]
    big = normal(40, 40)
    assert ops(check(graph(tmp_path / "a.onnx", nodes, a=big))) == ["Mul"]
    keep = [helper.make_node("Add", ["a", "a"], ["b"]), helper.make_node("MatMul", ["x", "b"], ["y"])]
    path = graph(tmp_path / "in.onnx", keep, ("n", 300), a=normal(6, 300))
    assert ops(check(path)) == ["Add", "MatMul"]
    assert ops(check(path, "fold-constants", "--max-elements", "2000")) == ["MatMul"]


@pytest.mark.parametrize("make", ["Range", "Expand", "ConstantOfShape"])
def test_what_grows_from_nothing_is_not_stored(make: str, tmp_path: Path) -> None:
    first = {
        "Range": helper.make_node("Range", ["zero", "n", "one"], ["big"]),
        "Expand": helper.make_node("Expand", ["one", "shape"], ["big"]),
        "ConstantOfShape": helper.make_node(
            "ConstantOfShape", ["shape"], ["big"], value=helper.make_tensor("", INT64, [1], [3])
        ),
    }[make]
    nodes = [first, helper.make_node("Cast", ["big"], ["f"], to=FLOAT), helper.make_node("Add", ["x", "f"], ["y"])]
    out = check(
        graph(tmp_path / "in.onnx", nodes, zero=np.array(0), n=np.array(6), one=np.array(1), shape=np.array([6]))
    )
    assert make in ops(out)
    assert all(array.size == 1 for array in initializers(out).values())


@pytest.mark.parametrize(
    ("op", "number", "dropped"),
    [("Add", 0, True), ("Mul", 1, True), ("Add", 1, False), ("Mul", 0, False), ("Sub", 0, False), ("Div", 1, False)],
)
@pytest.mark.parametrize("first", [True, False])
def test_neutral_operands(op: str, number: int, dropped: bool, first: bool, tmp_path: Path) -> None:
    """x + 0 and x * 1 go; x * 0 stays for NaN and infinity; Sub and Div may stay (they do not commute)."""
    nodes = [helper.make_node(op, ["k", "a"] if first else ["a", "k"], ["b"]), helper.make_node("Abs", ["b"], ["y"])]
    out = check(
        graph(
            tmp_path / "in.onnx", [helper.make_node("Exp", ["x"], ["a"]), *nodes], k=np.full((1, 6), number, np.float32)
        )
    )
    assert (op in ops(out)) != dropped


def test_a_neutral_operand_that_broadcasts_stays(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "k"], ["b"]), helper.make_node("Neg", ["b"], ["y"])]
    assert "Add" in ops(check(graph(tmp_path / "in.onnx", nodes, (2, "n", 6), k=np.zeros((2, 1, 6), np.float32))))


def test_minus_zero_and_a_changed_type_stay(tmp_path: Path) -> None:
    """A slice that takes everything goes, one with a step or an end inside stays."""
    nodes = [
        helper.make_node("Slice", ["x", "zero", "end", "axis"], ["a"]),
        helper.make_node("Slice", ["a", "zero", "five", "axis"], ["b"]),
        helper.make_node("Slice", ["b", "minus", "start", "axis", "minus"], ["c"]),
        helper.make_node("Neg", ["c"], ["y"]),
    ]
    arrays = {"zero": [0], "end": [2**31 - 1], "axis": [1], "five": [5], "minus": [-1], "start": [-(2**31)]}
    out = check(graph(tmp_path / "in.onnx", nodes, ("n", 5), **{k: np.array(v) for k, v in arrays.items()}))
    assert ops(out) == ["Slice", "Slice", "Neg"]


def test_a_constant_graph_output_stays_an_output(tmp_path: Path) -> None:
    nodes = [helper.make_node("Constant", [], ["y"], value_floats=[1.0, 2.0]), helper.make_node("Neg", ["x"], ["z"])]
    path = write(tmp_path / "in.onnx", nodes, [info("x", ["n", 6])], [info("y", [2]), info("z", ["n", 6])])
    check(path)


def test_constants_of_every_kind(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["a"], value_float=2.0),
        helper.make_node("Constant", [], ["b"], value_int=1),
        helper.make_node("Constant", [], ["c"], value_ints=[1, 6]),
        helper.make_node("Constant", [], ["d"], value=helper.make_tensor("", FLOAT, [6], range(6))),
        helper.make_node("Reshape", ["d", "c"], ["e"]),
        helper.make_node("Cast", ["b"], ["f"], to=FLOAT),
        helper.make_node("Sum", ["x", "a", "e", "f"], ["y"]),
    ]
    assert ops(check(graph(tmp_path / "in.onnx", nodes))) == ["Sum"]


def test_a_constant_of_a_subgraph_is_not_lost(tmp_path: Path) -> None:
    """The branch reads a value that the outer graph computes from constants."""
    then = helper.make_graph([helper.make_node("Mul", ["x", "r"], ["t"])], "then", [], [info("t", ["n", 6])])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["e"])], "else", [], [info("e", ["n", 6])])
    nodes = [
        helper.make_node("Reciprocal", ["c"], ["r"]),
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Less", ["zero", "m"], ["flag"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other),
    ]
    check(graph(tmp_path / "in.onnx", nodes, c=np.float32(4), zero=np.float32(0)))


def test_cleanup_merges_equal_nodes_and_drops_the_unused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["a"]),
        helper.make_node("Exp", ["x"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
        helper.make_node("Neg", ["x"], ["unused"]),
    ]
    out = check(graph(tmp_path / "in.onnx", nodes, spare=normal(3)), "cleanup")
    assert ops(out) == ["Exp", "Add"] and not initializers(out)


def test_cleanup_keeps_equal_outputs_apart(tmp_path: Path) -> None:
    nodes = [helper.make_node("Exp", ["x"], ["y"]), helper.make_node("Exp", ["x"], ["z"])]
    check(
        write(tmp_path / "in.onnx", nodes, [info("x", ["n", 6])], [info("y", ["n", 6]), info("z", ["n", 6])]), "cleanup"
    )


def test_cleanup_keeps_random_nodes_apart(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["a"]),
        helper.make_node("RandomNormalLike", ["x"], ["b"]),
        helper.make_node("Sub", ["a", "b"], ["y"]),
    ]
    path = graph(tmp_path / "in.onnx", nodes)
    succeed("cleanup", path, tmp_path / "out.onnx", "--no-check")
    assert np.abs(Session(tmp_path / "out.onnx")({"x": normal(4, 6)})["y"]).max() > 0


def test_cleanup_drops_unused_domains(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.onnx",
        [helper.make_node("Neg", ["x"], ["y"])],
        [info("x", ["n", 6])],
        [info("y", ["n", 6])],
        domains=["trt", "com.microsoft"],
    )
    out = check(path, "cleanup")
    assert {entry.domain for entry in onnx.load(out).opset_import} == {""}


def test_a_recorded_shape_that_is_wrong_goes(tmp_path: Path) -> None:
    """TransformerEngine records a rank-0 scale as [1]; the full check of the checker refuses such a file."""
    nodes = [helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0), helper.make_node("Div", ["x", "m"], ["y"])]
    path = write(tmp_path / "in.onnx", nodes, [info("x", ["n", 6])], [info("y", ["n", 6])], value_info=[info("m", [1])])
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(str(path), full_check=True)
    succeed("convert", path, tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
