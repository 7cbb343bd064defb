"""`legalize`: what exporters leave and TensorRT refuses, replaced; the reference is onnx.reference on the input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from tests.support import FLOAT, HALF, INT64, Array, Session, dims, info, normal, ops, refuse, stored, succeed, write

X = normal(4, 6)


def check(path: Path, *, command: str = "legalize", x: Array = X) -> Path:
    """Run the pass; every output of the result must equal, by name and value, that of the input."""
    out = path.with_name("out.onnx")
    succeed(command, path, out)
    onnx.checker.check_model(str(out), full_check=True)
    before, after = onnx.load(path).graph.output, onnx.load(out).graph.output
    assert [(v.name, dims(v)) for v in after] == [(v.name, dims(v)) for v in before]
    expected = ReferenceEvaluator(str(path)).run(None, {"x": x})
    result = Session(out)({"x": x})
    for value, array in zip(before, expected, strict=True):
        assert np.array_equal(result[value.name], array), value.name
    return out


def pieces(split: Sequence[str], indices: Sequence[int], **attributes: int) -> list[onnx.NodeProto]:
    nodes = [helper.make_node("SplitToSequence", ["x", *split], ["seq"], "cut", **attributes)]
    for index, number in enumerate(indices):
        nodes += [
            helper.make_node("Constant", [], [f"i{index}"], value=helper.make_tensor("", INT64, [], [number])),
            helper.make_node("SequenceAt", ["seq", f"i{index}"], [f"p{index}"]),
            helper.make_node("Neg", [f"p{index}"], [f"y{index}"]),
        ]
    return nodes


@pytest.mark.parametrize(("sizes", "widths"), [([2, 4], [2, 4]), ([1, 2, 3], [1, 2, 3]), (3, [3, 3]), (4, [4, 2])])
@pytest.mark.parametrize("axis", [1, -1])
def test_split_to_sequence(sizes: list[int] | int, widths: list[int], axis: int, tmp_path: Path) -> None:
    nodes = pieces(["sizes"], range(len(widths)), axis=axis)
    outputs = [info(f"y{i}", [4, w]) for i, w in enumerate(widths)]
    out = check(
        write(tmp_path / "in.onnx", nodes, [info("x", [4, 6])], outputs, stored(sizes=np.array(sizes, dtype=np.int64)))
    )
    assert not [op for op in ops(out) if "Sequence" in op]


def test_pieces_counted_from_the_end_or_left_unused(tmp_path: Path) -> None:
    outputs = [info("y0", [4, 3]), info("y1", [4, 1])]
    check(
        write(
            tmp_path / "in.onnx",
            pieces(["sizes"], [-1, 0], axis=1),
            [info("x", [4, 6])],
            outputs,
            stored(sizes=np.array([1, 2, 3])),
        )
    )


@pytest.mark.parametrize("keepdims", [0, 1])
def test_split_into_single_rows(keepdims: int, tmp_path: Path) -> None:
    outputs = [info(f"y{i}", [1, 6] if keepdims else [6]) for i in range(2)]
    check(write(tmp_path / "in.onnx", pieces([], [3, 1], axis=0, keepdims=keepdims), [info("x", [4, 6])], outputs))


def test_keepdims_means_nothing_where_sizes_are_given(tmp_path: Path) -> None:
    check(
        write(
            tmp_path / "in.onnx",
            pieces(["sizes"], [0], axis=1, keepdims=0),
            [info("x", [4, 6])],
            [info("y0", [4, 2])],
            stored(sizes=np.array([2, 4])),
        )
    )


def test_a_sequence_with_a_computed_index_is_refused_by_name(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["seq"], "cut", axis=0),
        helper.make_node("SequenceAt", ["seq", "i"], ["y"], "pick"),
    ]
    path = write(tmp_path / "in.onnx", nodes, [info("x", [4, 6]), info("i", [], INT64)], [info("y", [1, 6])])
    assert "pick" in refuse("legalize", path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_computed_sizes_are_refused_by_name(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("SplitToSequence", ["x", "sizes"], ["seq"], "cut", axis=1),
        helper.make_node("Constant", [], ["i"], value_int=0),
        helper.make_node("SequenceAt", ["seq", "i"], ["y"], "pick"),
    ]
    path = write(tmp_path / "in.onnx", nodes, [info("x", [4, 6]), info("sizes", [2], INT64)], [info("y", [4, None])])
    assert "cut" in refuse("legalize", path, tmp_path / "out.onnx", "--no-check")


def test_cast_like_becomes_cast(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("CastLike", ["x", "like"], ["c"]),
        helper.make_node("Cast", ["c"], ["y"], to=FLOAT),
        helper.make_node("CastLike", ["x", "x"], ["z0"]),
        helper.make_node("Neg", ["z0"], ["z"]),
    ]
    out = check(
        write(
            tmp_path / "in.onnx",
            nodes,
            [info("x", [4, 6])],
            [info("y", [4, 6]), info("z", [4, 6])],
            stored(like=np.float16(0)),
        )
    )
    assert sorted(ops(out)) == ["Cast", "Cast", "Neg"]


@pytest.mark.parametrize("op", ["Identity", "Dropout", "Cast"])
def test_nodes_without_effect_go(op: str, tmp_path: Path) -> None:
    attributes = {"to": FLOAT} if op == "Cast" else {}
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node(op, ["a"], ["b"], **attributes),
        helper.make_node("Abs", ["b"], ["y"]),
    ]
    assert ops(check(write(tmp_path / "in.onnx", nodes, [info("x", [4, 6])], [info("y", [4, 6])]))) == ["Neg", "Abs"]


@pytest.mark.parametrize("op", ["Identity", "Dropout", "Cast"])
def test_a_graph_output_keeps_its_name_and_type(op: str, tmp_path: Path) -> None:
    attributes = {"to": FLOAT} if op == "Cast" else {}
    nodes = [helper.make_node("Neg", ["x"], ["a"]), helper.make_node(op, ["a"], ["y"], **attributes)]
    check(write(tmp_path / "in.onnx", nodes, [info("x", [4, 6])], [info("y", [4, 6])]))


def test_cast_like_that_makes_a_graph_output(tmp_path: Path) -> None:
    nodes = [helper.make_node("CastLike", ["x", "like"], ["y"])]
    check(
        write(tmp_path / "in.onnx", nodes, [info("x", [4, 6])], [info("y", [4, 6], HALF)], stored(like=np.float16(0)))
    )


def test_an_output_that_is_an_input_stays(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["x"], ["z"])]
    check(write(tmp_path / "in.onnx", nodes, [info("x", [4, 6])], [info("y", [4, 6]), info("z", [4, 6])]))


def test_dropout_in_training_mode_stays(tmp_path: Path) -> None:
    nodes = [helper.make_node("Dropout", ["x", "ratio", "training"], ["d"]), helper.make_node("Abs", ["d"], ["y"])]
    path = write(
        tmp_path / "in.onnx",
        nodes,
        [info("x", [4, 6])],
        [info("y", [4, 6])],
        stored(ratio=np.float32(0.5), training=np.array(True)),
    )
    succeed("legalize", path, tmp_path / "out.onnx", "--no-check")
    assert ops(tmp_path / "out.onnx") == ["Dropout", "Abs"]


@pytest.mark.parametrize("target", [[-1], [1]])
def test_a_reshaped_scalar_becomes_unsqueeze(target: list[int], tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Reshape", ["m", "t"], ["r"]),
        helper.make_node("Mul", ["x", "r"], ["y"]),
    ]
    assert "Reshape" not in ops(
        check(write(tmp_path / "in.onnx", nodes, [info("x", [4, 6])], [info("y", [4, 6])], stored(t=np.array(target))))
    )


def test_functions_are_inlined(tmp_path: Path) -> None:
    """Two calls of one function with an attribute-free body; the reference evaluates the function itself."""
    body = [helper.make_node("Mul", ["a", "a"], ["s"]), helper.make_node("Identity", ["s"], ["b"])]
    function = helper.make_function("mine", "Square", ["a"], ["b"], body, [helper.make_opsetid("", 18)])
    nodes = [
        helper.make_node("Square", ["x"], ["s"], domain="mine"),
        helper.make_node("Square", ["s"], ["q"], domain="mine"),
        helper.make_node("Neg", ["q"], ["y"]),
    ]
    path = write(tmp_path / "in.onnx", nodes, [info("x", [4, 6])], [info("y", [4, 6])], domains=["mine"])
    proto = onnx.load(path)
    proto.functions.append(function)
    onnx.save(proto, path)
    assert ops(check(path, command="convert")) == ["Mul", "Mul", "Neg"]
