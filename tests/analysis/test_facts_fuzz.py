"""What the analysis says of a graph is what ONNX Runtime computes: types, shapes and elements of many operators on
random inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxtools.analysis.facts import analyse, constants
from onnxtools.ir.model import Model
from tests.support import FLOAT, Array, info, succeed

Case = tuple[list[Any], dict[str, Any], int]
"""Inputs, attributes, number of outputs."""
Make = Callable[[np.random.Generator], Case]
FLOATS, INTEGERS = (np.float32, np.float64, np.float16), (np.int64, np.int32, np.int8, np.uint8)


def some(r: np.random.Generator, *kinds: type, rank: int | None = None) -> Array:
    shape = r.integers(1, 5, r.integers(1, 4) if rank is None else rank)
    kind = (kinds or (np.float32, np.int64, np.int32))[r.integers(len(kinds or "abc"))]
    return np.asarray(
        np.abs(r.normal(size=shape) * 5) if np.issubdtype(kind, np.unsignedinteger) else r.normal(size=shape) * 5
    ).astype(kind)


def axis_of(r: np.random.Generator, x: Array) -> int:
    return int(r.integers(-x.ndim, x.ndim))


def one(*kinds: type) -> Make:
    return lambda r: ([some(r, *kinds)], {}, 1)


def two(*kinds: type, nonzero: bool = False) -> Make:
    def make(r: np.random.Generator) -> Case:
        x = some(r, *kinds)
        y = np.asarray(r.normal(size=[int(r.choice([1, size])) for size in x.shape]) * 3).astype(x.dtype)
        return [x, np.where(y == 0, 1, y).astype(x.dtype) if nonzero else y], {}, 1

    return make


def along(*kinds: type, **attributes: Any) -> Make:
    def make(r: np.random.Generator) -> Case:
        x = some(r, *kinds)
        return [x], {"axis": axis_of(r, x), **attributes}, 1

    return make


def reduced(r: np.random.Generator) -> Case:
    x = some(r, np.float32, np.int64, np.int32)
    axes = (
        []
        if r.random() < 0.3
        else [np.sort(r.choice(x.ndim, r.integers(1, x.ndim + 1), replace=False)) - x.ndim * int(r.random() < 0.5)]
    )
    return [x, *axes], {"keepdims": int(r.integers(2)), "noop_with_empty_axes": int(r.integers(2))}, 1


def best(r: np.random.Generator) -> Case:
    x = some(r, np.float32, np.int64, np.int32)
    x[..., 0] = x[..., -1]  # ties
    return [x], {"axis": axis_of(r, x), "keepdims": int(r.integers(2)), "select_last_index": int(r.integers(2))}, 1


def top(r: np.random.Generator) -> Case:
    x = r.permutation(24).reshape(2, 3, 4).astype([np.float32, np.int64, np.int32][r.integers(3)])
    axis = axis_of(r, x)
    return [x, np.array([r.integers(1, x.shape[axis] + 1)])], {"axis": axis, "largest": int(r.integers(2))}, 2


def one_hot(r: np.random.Generator) -> Case:
    kind = [np.float32, np.int64, np.int32][r.integers(3)]
    ids = r.integers(-5, 6, r.integers(1, 4, 2)).astype([np.int64, np.int32, np.float32][r.integers(3)])
    return [ids, np.array([4], np.int64)[0:1].reshape(()), np.array([2, 7], kind)], {"axis": int(r.integers(-3, 3))}, 1


def eye(r: np.random.Generator) -> Case:
    x = some(r, np.float32, np.int64, np.int32, rank=2)
    return (
        [x],
        {"k": int(r.integers(-2, 3)), **({"dtype": int(r.choice([1, 6, 7, 11]))} if r.random() < 0.7 else {})},
        1,
    )


def infinite(r: np.random.Generator) -> Case:
    x = some(r, np.float32, np.float64)
    x.flat[0], x.flat[-1] = [np.inf, -np.inf, np.nan][r.integers(3)], -np.inf
    return [x], {"detect_negative": int(r.integers(2)), "detect_positive": int(r.integers(2))}, 1


def sliced(r: np.random.Generator) -> Case:
    x = some(r)
    axes = r.choice(x.ndim, r.integers(1, x.ndim + 1), replace=False)
    return (
        [
            x,
            r.integers(-7, 8, len(axes)),
            r.choice([-8, -1, 0, 2, 8, 2**62, -(2**62)], len(axes)),
            axes,
            r.choice([1, 2, -1, -2], len(axes)),
        ],
        {},
        1,
    )


def cast(r: np.random.Generator) -> Case:
    x = some(r, np.float32, np.int64, np.int32, np.float16)
    return [x], {"to": int(r.choice([1, 6, 7, 9, 10, 11]))}, 1


def gathered(r: np.random.Generator) -> Case:
    x = some(r, *FLOATS, *INTEGERS)
    axis = axis_of(r, x)
    return [x, r.integers(-x.shape[axis], x.shape[axis], r.integers(1, 4, r.integers(0, 3)))], {"axis": axis}, 1


def gathered_nd(r: np.random.Generator) -> Case:
    x, batch = some(r, *FLOATS, *INTEGERS, rank=3), int(r.integers(2))
    depth = int(r.integers(1, 4 - batch))
    places = np.stack([r.integers(-size, size, (*x.shape[:batch], 2)) for size in x.shape[batch : batch + depth]], -1)
    return [x, places], {"batch_dims": batch}, 1


def scattered_nd(r: np.random.Generator) -> Case:
    """Each place once: ONNX leaves the order of several writes to one place open."""
    x, depth = some(r, np.float32, np.int64, np.int32, rank=3), int(r.integers(1, 4))
    all_places = np.stack(np.meshgrid(*map(np.arange, x.shape[:depth]), indexing="ij"), -1).reshape(-1, depth)
    places = r.permutation(all_places)[: r.integers(1, len(all_places) + 1)]
    updates = np.ones((len(places), *x.shape[depth:])).astype(x.dtype) * 3
    return [x, places, updates], {"reduction": ["none", "add", "mul", "max", "min"][r.integers(5)]}, 1


def padded(r: np.random.Generator) -> Case:
    x = some(r)
    mode = ["constant", "edge", "wrap"][r.integers(3)]
    return (
        [x, r.integers(0, 3, 2 * x.ndim), *([np.array(3, x.dtype)] if mode == "constant" and r.random() < 0.5 else [])],
        {"mode": mode},
        1,
    )


def summed(r: np.random.Generator) -> Case:
    x = some(r, np.float32, np.int64, np.int32)
    return [x, np.array(axis_of(r, x))], {"exclusive": int(r.integers(2)), "reverse": int(r.integers(2))}, 1


def split(r: np.random.Generator) -> Case:
    x = some(r)
    axis = axis_of(r, x)
    count = int(r.integers(1, x.shape[axis] + 1))
    if r.random() < 0.5:
        return (
            [x],
            {"axis": axis, "num_outputs": count},
            len(range(0, x.shape[axis], -(-x.shape[axis] // count))) if x.shape[axis] % count == 0 else count,
        )
    return [x, np.array([1] * (count - 1) + [x.shape[axis] - count + 1])], {"axis": axis}, count


def unique(r: np.random.Generator) -> Case:
    return [r.integers(0, 4, 6).astype([np.int64, np.float32][r.integers(2)])], {"sorted": 1}, 4


def like(*more: Callable[[np.random.Generator, Array], Any], **attributes: Any) -> Make:
    def make(r: np.random.Generator) -> Case:
        x = some(r)
        return [x, *(part(r, x) for part in more)], attributes, 1

    return make


FUZZED: dict[str, Make] = {
    "NonZero": one(np.float32, np.int64, np.int32), "ArgMax": best, "ArgMin": best, "TopK": top, "IsInf": infinite, 
    "IsNaN": lambda r: ([infinite(r)[0][0]], {}, 1),
    "OneHot": one_hot, "EyeLike": eye, "Cast": cast, "Slice": sliced, "Split": split, "Gather": gathered, "Pad": padded,
    "CumSum": summed, "Unique": unique,
    **dict.fromkeys(("ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceMean"), reduced),
    **{name: two(np.float32, np.int64, np.int32) for name in ("Add", "Sub", "Mul", "Max", "Min", "Equal", "Greater",
        "LessOrEqual")},
    "Div": two(np.float32, np.int64, np.int32, nonzero=True), "Mod": two(np.int64, np.int32, nonzero=True),
    "Size": one(), "Shape": lambda r: ([some(r)], {"start": int(r.integers(-4, 4)), "end": int(r.integers(-4, 4))}, 1),
    "Abs": one(np.float32, np.int64), "Neg": one(np.float32, np.int32), "Sign": one(np.float32, np.int64),
    "Floor": one(np.float32), "Ceil": one(np.float32),
    "Round": lambda r: ([np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.4], np.float32)], {}, 1),
    "Softmax": along(np.float32), "LogSoftmax": along(np.float32),
    "Flatten": along(), "Transpose": lambda r: ([some(r, rank=3)], {"perm": r.permutation(3).tolist()}, 1),
    "Not": lambda r: ([some(r) > 0], {}, 1), "And": lambda r: ([some(r, rank=2) > 0, np.array(True)], {}, 1),
    "Where": like(lambda r, x: x * 2), "Expand": like(lambda r, x: np.array([2, *x.shape])),
    "Tile": like(lambda r, x: r.integers(0, 3, x.ndim)),
    "Compress": like(lambda r, x: r.random(x.size) < 0.5),
    "Clip": like(lambda r, x: np.array(-1, x.dtype), lambda r, x: np.array(2, x.dtype)),
    "Trilu": lambda r: ([some(r, rank=2), np.array(r.integers(-3, 4))], {"upper": int(r.integers(2))}, 1),
    "Range": lambda r: ([np.array(v, k) for k in [[np.int64, np.float32][r.integers(2)]] for v in (1, r.integers(-5, 9),
        r.choice([1, 2, -1]))], {}, 1),
    "ConstantOfShape": lambda r: ([r.integers(0, 4, 2)],
        {"value": numpy_helper.from_array(np.array([3], [np.int64, np.float32, np.bool_][r.integers(3)]))}, 1),
    "GatherElements": like(lambda r, x: np.zeros(x.shape, np.int64)),
    "GatherND": gathered_nd, "ScatterND": scattered_nd,
    "ScatterElements": lambda r: ([(x := some(r)), np.zeros(x.shape, np.int64), x],
        {"axis": 0, "reduction": ["none", "add", "max"][r.integers(3)]}, 1),
    "BitShift": lambda r: ([np.arange(4, dtype=np.uint32), np.ones(4, np.uint32)],
        {"direction": ["LEFT", "RIGHT"][r.integers(2)]}, 1),
    "BitwiseXor": lambda r: ([r.integers(-9, 9, 4), r.integers(-9, 9, 4)], {}, 1),
    "Einsum": lambda r: ([some(r, np.float32, rank=2)], {"equation": "ij->ji"}, 1),
    "MatMul": lambda r: ([(x := some(r, np.float32, rank=2)), x.T.copy()], {}, 1), 
    "CastLike": like(lambda r, x: np.array(1, np.float16)),
    "MatMulInteger": lambda r: ([r.integers(0, 9, (2, 3)).astype(np.uint8), r.integers(-9, 9, (3, 2)).astype(np.int8)],
        {}, 1),
    "MaxPool": lambda r: ([r.normal(size=(1, 1, 4, 4)).astype(np.float32)], {"kernel_shape": [2, 2]}, 2),
    "DynamicQuantizeLinear": lambda r: ([some(r, np.float32)], {}, 3),
    "Det": lambda r: ([r.normal(size=(2, 3, 3)).astype(np.float32)], {}, 1),
}  # fmt: skip


def runtime(proto: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array] | None:
    """None where ONNX Runtime does not take the case."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return list(
            ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
                None, feeds
            )
        )
    except Exception:
        return None


def small(op: str, case: Case, *, dynamic: bool) -> onnx.ModelProto:
    arrays, attributes, count = case
    names = [f"i{index}" for index in range(len(arrays))]
    if op == "Where":
        arrays, names = [arrays[0] > 0, *arrays], ["c", *names]
    node = helper.make_node(op, names, [f"o{index}" for index in range(count)], **attributes)
    tensors = [numpy_helper.from_array(np.asarray(array), name) for array, name in zip(arrays, names, strict=True)]
    inputs = [info(names[0], np.shape(arrays[0]), tensors[0].data_type)] if dynamic else []
    graph = helper.make_graph(
        [node],
        "g",
        inputs,
        [onnx.ValueInfoProto(name=name) for name in node.output],
        tensors[1:] if dynamic else tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("op", FUZZED)
def test_facts_are_what_onnxruntime_computes(op: str) -> None:
    compared = 0
    for seed in range(20):
        case = FUZZED[op](np.random.default_rng(seed))
        for dynamic in (False, True):
            proto = small(op, case, dynamic=dynamic)
            first = np.asarray(case[0][0] > 0 if op == "Where" else case[0][0])
            expected = runtime(proto, {proto.graph.input[0].name: first} if dynamic else {})
            if expected is None:
                continue
            model = Model(ir.from_proto(proto))
            facts, known = analyse(model), constants(model)[1]
            for output, array in zip(model.graph.outputs, expected, strict=True):
                fact, where = facts[output], (op, seed, dynamic, case)
                compared += 1
                assert fact.shape is None or tuple(fact.shape) == array.shape, (where, fact.shape, array.shape)
                assert fact.dtype is None or fact.dtype.numpy() == array.dtype, (where, fact.dtype, array.dtype)
                for found in (fact.value, known.get(output)):
                    if found is not None:
                        assert np.asarray(found).dtype == array.dtype, where
                        np.testing.assert_allclose(
                            np.asarray(found, np.float64),
                            array.astype(np.float64),
                            rtol=1e-3,
                            atol=1e-5,
                            err_msg=str(where),
                        )
    assert compared >= 8, "ONNX Runtime takes hardly any of the cases"


NARROW = [
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
    TensorProto.BFLOAT16,
    TensorProto.FLOAT16,
]


@pytest.mark.parametrize("saturate", [0, 1])
@pytest.mark.parametrize("kind", NARROW, ids=TensorProto.DataType.Name)
def test_folded_casts_are_those_of_onnxruntime(kind: int, saturate: int, tmp_path: Path) -> None:
    """Through the type and back; a folded file computes the same."""
    x = np.array(
        [
            0,
            -0.0,
            1,
            1.0625,
            -3.3,
            0.001,
            1e-9,
            240,
            447,
            449,
            464,
            470,
            1000,
            -1e6,
            57344,
            61440,
            65504,
            1e30,
            np.inf,
            -np.inf,
            np.nan,
        ],
        np.float32,
    )
    if kind == TensorProto.FLOAT8E5M2 and not saturate:
        x = x[
            (np.abs(x) < 61440) | (np.abs(x) > 65536)
        ]  # NaN in ONNX Runtime, infinity in ONNX's own table and reference
    flags = {"saturate": saturate} if kind in NARROW[:4] else {}
    nodes = [
        helper.make_node("Cast", ["x"], ["n"], to=kind, **flags),
        helper.make_node("Cast", ["n"], ["w"], to=FLOAT),
        helper.make_node("Add", ["w", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [info("z", [len(x)])], [info("y", [len(x)])], [numpy_helper.from_array(x, "x")]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(proto, tmp_path / "m.onnx")
    succeed("fold-constants", tmp_path / "m.onnx", tmp_path / "o.onnx", "--no-check")
    zeros = {"z": np.zeros(len(x), np.float32)}
    expected, found = runtime(proto, zeros), runtime(onnx.load(tmp_path / "o.onnx"), zeros)
    assert expected is not None and found is not None
    np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize(
    "op", ["NonZero", "ArgMax", "TopK", "IsInf", "OneHot", "EyeLike", "Unique", "Slice", "Cast", "ReduceProd"]
)
def test_a_folded_file_computes_the_same(op: str, tmp_path: Path) -> None:
    """The constant goes through one more node, as what is an output itself is not folded."""
    for seed in range(6):
        case = FUZZED[op](np.random.default_rng(seed))
        proto = small(op, case, dynamic=False)
        proto.graph.node.append(helper.make_node("Cast", ["o0"], ["as_float"], to=FLOAT))
        proto.graph.node.append(helper.make_node("Add", ["as_float", "z"], ["y"]))
        del proto.graph.output[:]
        proto.graph.output.append(info("y", None))
        proto.graph.input.append(info("z", []))
        feeds: dict[str, Array] = {"z": np.array(0, np.float32)}
        expected = runtime(proto, feeds)
        if expected is None:
            continue
        onnx.save(proto, tmp_path / "m.onnx")
        succeed("fold-constants", tmp_path / "m.onnx", tmp_path / "o.onnx", "--no-check")
        folded = onnx.load(tmp_path / "o.onnx")
        found = runtime(folded, feeds)
        assert found is not None
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, err_msg=f"{op} {seed} {case}")


TEXTS = np.array(["b", "a", "b"], object)
TEXT_GRAPHS: dict[str, list[onnx.NodeProto]] = {
    "a table": [helper.make_node("Gather", ["s", "i"], ["y"])],
    "joined": [helper.make_node("Concat", ["s", "s"], ["t"], axis=0), helper.make_node("Gather", ["t", "i"], ["y"])],
    "in a Constant node": [helper.make_node("Constant", [], ["c"], value_strings=[b"b", b"a"]),
        helper.make_node("Gather", ["c", "i"], ["y"])],
    "computed": [helper.make_node("Unique", ["s"], ["t"]), helper.make_node("Gather", ["t", "i"], ["y"])],
    "a label": [helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("ArgMax", ["h"], ["a"], axis=1, keepdims=0),
        helper.make_node("Gather", ["s", "a"], ["y"])],
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXT_GRAPHS)
def test_graphs_that_hold_texts_are_taken(kind: str, tmp_path: Path) -> None:
    nodes, feeds = TEXT_GRAPHS[kind], {"i": np.array([1, 0, 1])}
    inputs = [info("i", ["n"], TensorProto.INT64)] if kind != "a label" else [info("x", [3, 16])]
    tensors = [numpy_helper.from_array(TEXTS, "s"), numpy_helper.from_array(np.eye(16, 3, dtype=np.float32), "w")]
    used = [tensor for tensor in tensors if any(tensor.name in node.input for node in nodes)]
    feeds = feeds if kind != "a label" else {"x": np.eye(3, 16, dtype=np.float32)}
    graph = helper.make_graph(
        nodes, "g", inputs, [info("y", ["n" if kind != "a label" else 3], TensorProto.STRING)], used
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(proto, tmp_path / "m.onnx")
    expected = runtime(proto, feeds)
    assert expected is not None
    for command in ("fold-constants", "cleanup", "legalize"):
        succeed(command, tmp_path / "m.onnx", tmp_path / "o.onnx")
        found = runtime(onnx.load(tmp_path / "o.onnx"), feeds)
        assert found is not None and found[0].tolist() == expected[0].tolist()
    succeed("validate", tmp_path / "m.onnx", tmp_path / "o.onnx")
