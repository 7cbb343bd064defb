"""What is known of every value: shapes and elements must be those that ONNX Runtime computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxtools.analysis.facts import analyse, constants, stand_ins
from onnxtools.analysis.operators import reshape_target
from onnxtools.ir.model import Model
from tests.support import (
    FLOAT,
    INT64,
    STATIC,
    STYLE,
    TE,
    Array,
    Case,
    Feeds,
    Session,
    dims,
    info,
    normal,
    stored,
    write,
)

PLAIN = ["sdpa_gqa", "rope_no_fp8", "padding_mask", "te_gpt_none_dyn"]


def feeds_for(path: Path, sizes: dict[str, int]) -> Feeds:
    """Integer inputs of the sizes that stand in for the dynamic ones."""
    made: Feeds = {}
    for value in onnx.load(path).graph.input:
        shape = [size if isinstance(size, int) else sizes[size] for size in dims(value)]
        made[value.name] = (
            np.broadcast_to(np.arange(shape[1]), shape).copy() if "position" in value.name else np.ones(shape, np.int64)
        )
    return made


@pytest.mark.parametrize("case", PLAIN, indirect=True)
def test_every_shape_and_element_is_what_onnxruntime_computes(case: Case, tmp_path: Path) -> None:
    """All inner values of a real export become outputs; each known fact is compared."""
    model = Model.load(case.path)
    facts = analyse(model)
    proto = onnx.load(case.path)
    del proto.graph.value_info[:], proto.graph.output[:]
    known = {
        v.name: facts[v]
        for node in model.graph
        for v in node.outputs
        if v.name and facts[v].shape is not None and facts[v].dtype is not None
    }
    proto.graph.output.extend(
        info(name, None, fact.dtype.value) for name, fact in known.items() if fact.dtype is not None
    )
    onnx.save(proto, tmp_path / "all.onnx")
    actual = Session(tmp_path / "all.onnx")(feeds_for(case.path, facts.dims))
    assert len(known) > 200
    for name, fact in known.items():
        assert actual[name].shape == fact.shape, name
        if fact.value is not None:
            assert np.allclose(actual[name].astype(np.float64), fact.value.astype(np.float64), equal_nan=True), name


@pytest.mark.parametrize("case", [*TE, *STYLE], indirect=True)
def test_almost_nothing_of_a_fixture_is_unknown(case: Case) -> None:
    model = Model.load(case.path)
    facts = analyse(model)
    sequences = {o for node in model.graph if node.op_type == "SplitToSequence" for o in node.outputs}
    assert not [v.name for node in model.graph for v in node.outputs if facts[v].shape is None and v not in sequences]


def test_stand_ins_are_primes_that_divide_no_constant() -> None:
    model = Model.load(Case("sdpa_gqa").path)
    sizes = set(stand_ins(model).values())
    assert len(sizes) == 2 and all(all(size % d for d in range(2, size)) for size in sizes)
    assert all(d % size for _, tensor in model.weights() for d in tensor.shape.numpy() for size in sizes if d)
    assert not sizes & set(stand_ins(model, above=1000).values())


@pytest.mark.parametrize("case", STATIC, indirect=True)
def test_a_static_export_needs_no_stand_ins(case: Case) -> None:
    assert stand_ins(Model.load(case.path)) == {}


SHAPES = [
    ((2, 3, 4), [0, -1], 0, (2, 12)),
    ((2, 3, 4), [-1], 0, (24,)),
    ((2, 3, 4), [4, 3, 2], 0, (4, 3, 2)),
    ((0, 3), [0, 3], 1, (0, 3)),
    ((0, 3), [0, -1], 0, (0, 0)),
    ((1,), [], 0, ()),
]


@pytest.mark.parametrize(("shape", "target", "allowzero", "expected"), SHAPES)
def test_reshape_targets(shape: tuple[int, ...], target: list[int], allowzero: int, expected: tuple[int, ...]) -> None:
    assert reshape_target(shape, target, allowzero) == expected


@pytest.mark.parametrize(("shape", "target"), [((2, 3), [4]), ((2, 3), [5, -1])])
def test_impossible_reshapes(shape: tuple[int, ...], target: list[int]) -> None:
    with pytest.raises(ValueError, match="reshape"):
        reshape_target(shape, target)


def one(path: Path, nodes: list[onnx.NodeProto], dtype: int, **arrays: Array) -> Array | None:
    """Elements that hold for every size of x [n, 6], as the analysis sees them; checked against ONNX Runtime at two
    sizes.
    """
    write(path, nodes, [info("x", ["n", 6])], [info("y", None, dtype)], stored(**arrays))
    model = Model.load(path)
    agreed = constants(model)[1].get(model.graph.outputs[0])
    for size in (1, 5):
        result = Session(path)({"x": normal(size, 6)})["y"]
        assert agreed is None or np.array_equal(result, agreed)
    return agreed


@pytest.mark.parametrize(("op_type", "other", "expected"), [
    ("Min", 3, None),  # 3 for every size but one
    ("Greater", 5000, None),  # false for every size but very large ones
    ("Mul", 0, [0]),
])  # fmt: skip
def test_what_depends_on_the_size_is_no_constant(
    op_type: str, other: int, expected: list[int] | None, tmp_path: Path
) -> None:
    nodes = [helper.make_node("Shape", ["x"], ["s"], start=0, end=1), helper.make_node(op_type, ["s", "c"], ["y"])]
    found = one(
        tmp_path / "m.onnx", nodes, onnx.TensorProto.BOOL if op_type == "Greater" else INT64, c=np.array([other])
    )
    assert (None if found is None else found.tolist()) == expected


INTEGERS = {"a": np.array([7, -7, 7, -7]), "b": np.array([2, 2, -2, -2])}
RULES: dict[str, tuple[list[onnx.NodeProto], int]] = {
    "integer division truncates": ([helper.make_node("Div", ["a", "b"], ["y"])], INT64),
    "modulo": ([helper.make_node("Mod", ["a", "b"], ["y"])], INT64),
    "fmod": ([helper.make_node("Mod", ["a", "b"], ["y"], fmod=1)], INT64),
    "slice backwards": ([helper.make_node("Slice", ["a", "i3", "low", "i0", "m1"], ["y"])], INT64),
    "slice from the end": ([helper.make_node("Slice", ["a", "m2", "high"], ["y"])], INT64),
    "gather from the end": ([helper.make_node("Gather", ["a", "m1"], ["y"])], INT64),
    "cast to integers truncates": ([helper.make_node("Cast", ["f"], ["y"], to=INT64)], INT64),
    "range down": ([helper.make_node("Range", ["seven", "zero", "minus"], ["y"])], INT64),
    "constant of shape": (
        [helper.make_node("ConstantOfShape", ["i3"], ["y"], value=helper.make_tensor("", INT64, [1], [9]))],
        INT64,
    ),
    "upper triangle": ([helper.make_node("Trilu", ["square", "one"], ["y"], upper=1)], FLOAT),
    "lower triangle": ([helper.make_node("Trilu", ["square"], ["y"], upper=0)], FLOAT),
    "split": ([helper.make_node("Split", ["a"], ["u", "y"], num_outputs=2)], INT64),
    "uneven split": ([helper.make_node("Split", ["a3"], ["u", "y"], num_outputs=2)], INT64),
    "where": (
        [helper.make_node("Greater", ["a", "b"], ["c"]), helper.make_node("Where", ["c", "a", "b"], ["y"])],
        INT64,
    ),
    "reduce": ([helper.make_node("ReduceProd", ["a"], ["y"], keepdims=0)], INT64),
    "cumulative sum": ([helper.make_node("CumSum", ["a", "zero"], ["y"])], INT64),
    "power": ([helper.make_node("Pow", ["f", "two"], ["y"])], FLOAT),
    "tile": ([helper.make_node("Tile", ["a", "i3"], ["y"])], INT64),
    "one hot": ([helper.make_node("OneHot", ["i3", "seven", "pair"], ["y"])], INT64),
    "max": ([helper.make_node("Max", ["a", "b"], ["y"])], INT64),
    "unsqueeze twice": ([helper.make_node("Unsqueeze", ["a", "axes"], ["y"])], INT64),
    "shape part": ([helper.make_node("Shape", ["x"], ["y"], start=-1)], INT64),
    "size of a part": (
        [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Gather", ["s", "one"], ["y"])],
        INT64,
    ),
    "not": (
        [
            helper.make_node("Cast", ["a"], ["c"], to=onnx.TensorProto.BOOL),
            helper.make_node("Not", ["c"], ["n"]),
            helper.make_node("Cast", ["n"], ["y"], to=INT64),
        ],
        INT64,
    ),
}
CONSTANTS = INTEGERS | {
    "a3": np.array([1, 2, 3]),
    "i3": np.array([3]),
    "i0": np.array([0]),
    "m1": np.array([-1]),
    "m2": np.array([-2]),
    "low": np.array([-(2**31) - 1]),
    "high": np.array([2**62]),
    "f": np.array([1.5, -1.5, 2.5, -0.5], np.float32),
    "seven": np.array(7),
    "zero": np.array(0),
    "minus": np.array(-2),
    "one": np.array(1),
    "two": np.float32(2),
    "square": normal(4, 4),
    "pair": np.array([5, 9]),
    "axes": np.array([0, -1]),
}


@pytest.mark.parametrize("rule", RULES)
def test_elements_follow_onnx(rule: str, tmp_path: Path) -> None:
    nodes, dtype = RULES[rule]
    used = {name: CONSTANTS[name] for node in nodes for name in node.input if name in CONSTANTS}
    assert one(tmp_path / "in.onnx", nodes, dtype, **used) is not None


def test_what_depends_on_a_dynamic_size_is_no_constant(tmp_path: Path) -> None:
    assert one(tmp_path / "in.onnx", [helper.make_node("Shape", ["x"], ["y"])], INT64) is None
    assert one(tmp_path / "in.onnx", [helper.make_node("Size", ["x"], ["y"])], INT64) is None


def test_random_values_are_no_constants(tmp_path: Path) -> None:
    node = helper.make_node("RandomNormal", [], ["y"], shape=[3])
    path = write(tmp_path / "in.onnx", [node], [info("x", ["n", 6])], [info("y", [3])])
    model = Model.load(path)
    assert not constants(model)[1]
