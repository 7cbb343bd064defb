"""`precision` keeps in fp32 what 16 bits would make another number: angles, masks, sizes, small and large constants,
graphs inside nodes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from tests.support import FLOAT, INT64, Array, Feeds, info, normal, refuse, rel_l2, stored, succeed, write

N = helper.make_node
BOOL = TensorProto.BOOL
LOW = float(np.finfo(np.float32).min)
W = normal(64, 64, seed=1) / np.float32(8)
ARRAYS: Feeds = {
    "W": W, "V": W.T.copy(), "inv_freq": (10000.0 ** (-np.arange(32) / 32)).astype(np.float32), "one": np.array([1]),
    "zero": np.array([0]),
         "two": np.array([2]),
    "axes": np.array([-1]), "base": np.float32(10000), "unit": np.float32(1), "half": np.float32(0.5),
    "start": np.array(0), "step": np.array(1),
         "two_f": np.float32(2),
    "pi": np.float32(np.pi), "first": np.array(0), "yes": np.array(True),
}  # fmt: skip
PLACES = np.arange(3990, 4010)
X = normal(20, 64, seed=4)


def onnxruntime(path: Path, feeds: Feeds) -> Array:
    """y of the file as it is; inputs are cast to the types that it has."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = {
        value.name: np.float16 if value.type == "tensor(float16)" else feeds[value.name].dtype
        for value in session.get_inputs()
    }
    return session.run(["y"], {name: feeds[name].astype(kind) for name, kind in wanted.items()})[0]  # type: ignore[no-any-return]


def difference(
    tmp_path: Path,
    nodes: list[onnx.NodeProto],
    feeds: Feeds,
    arrays: Feeds | None = None,
    *,
    opset: int = 18,
    flags: tuple[str, ...] = (),
) -> float:
    """Relative L2 between y of the fp32 graph and of the narrowed one, both on ONNX Runtime; NaN and infinity fail."""
    known = {**ARRAYS, **(arrays or {})}
    read = {name for node in nodes for name in node.input} | {
        name for node in nodes for a in node.attribute if a.HasField("g") for inner in a.g.node for name in inner.input
    }
    inputs = [info(name, array.shape, helper.np_dtype_to_tensor_dtype(array.dtype)) for name, array in feeds.items()]
    write(
        tmp_path / "m.onnx",
        nodes,
        inputs,
        [info("y", None)],
        stored(**{name: array for name, array in known.items() if name in read}),
        opset=opset,
    )
    succeed("precision", tmp_path / "m.onnx", tmp_path / "n.onnx", "--no-check", *flags)
    expected, found = onnxruntime(tmp_path / "m.onnx", feeds), onnxruntime(tmp_path / "n.onnx", feeds)
    assert np.isfinite(expected).all() and np.isfinite(found.astype(np.float32)).all()
    return rel_l2(found, expected)


# --- angles -----------------------------------------------------------------------------------------------------------

COLUMN = [N("Cast", ["places"], ["p"], to=FLOAT), N("Unsqueeze", ["p", "axes"], ["column"])]
LAST = [N("Concat", ["angle", "angle"], ["wide"], axis=-1), N("Cos", ["wide"], ["cos"]), N("Sin", ["wide"], ["sin"]),
    N("MatMul", ["x", "W"], ["q"], name="mm"),
        N("Mul", ["q", "cos"], ["a"]), N("MatMul", ["q", "V"], ["r"], name="mm2"), N("Mul", ["r", "sin"], ["b"]),
        N("Add", ["a", "b"], ["y"])]  # fmt: skip
TABLE = (np.arange(4096)[:, None] * ARRAYS["inv_freq"]).astype(np.float32)
BRANCH = helper.make_graph([N("Mul", ["column", "inv_freq"], ["inner"])], "branch", [], [info("inner", [20, 32])])
SINE = helper.make_graph([N("Sin", ["u"], ["sine"])], "sine", [], [info("sine", [20, 32])])
ANGLES: dict[str, list[onnx.NodeProto]] = {
    "product": [*COLUMN, N("Mul", ["column", "inv_freq"], ["angle"])],
    "MatMul": [*COLUMN, N("Unsqueeze", ["inv_freq", "zero"], ["row"]),
        N("MatMul", ["column", "row"], ["angle"], name="outer")],
    "Einsum": [N("Cast", ["places"], ["p"], to=FLOAT), N("Einsum", ["p", "inv_freq"], ["angle"], equation="i,j->ij")],
    "Gemm": [*COLUMN, N("Unsqueeze", ["inv_freq", "zero"], ["row"]),
        N("Gemm", ["column", "row"], ["angle"], name="outer")],
    "division": [*COLUMN, N("Reciprocal", ["inv_freq"], ["period"]), N("Div", ["column", "period"], ["angle"])],
    "a power": [*COLUMN, N("Log", ["inv_freq"], ["log"]), N("Exp", ["log"], ["f"]),
        N("Mul", ["column", "f"], ["angle"])],
    "a scaled product": [*COLUMN, N("Mul", ["column", "inv_freq"], ["twice"]), N("Mul", ["twice", "half"], ["angle"])],
    "a choice": [*COLUMN, N("Mul", ["column", "inv_freq"], ["u"]), N("Mul", ["u", "half"], ["v"]),
        N("Where", ["yes", "u", "v"], ["angle"])],
    "a looked-up table": [N("Gather", ["table", "places"], ["angle"])],
    "a slice of a table": [N("Slice", ["table", "from", "to"], ["angle"])],
    "expanded": [*COLUMN, N("Shape", ["inv_freq"], ["n"]), N("Concat", ["len", "n"], ["size"], axis=0),
        N("Expand", ["column", "size"], ["e"]),
         N("Mul", ["e", "inv_freq"], ["angle"])],
    "modulo": [*COLUMN, N("Mul", ["column", "inv_freq"], ["u"]), N("Mod", ["u", "pi2"], ["angle"], fmod=1)],
    "a branch": [*COLUMN, N("If", ["yes"], ["angle"], then_branch=BRANCH, else_branch=BRANCH)],
}  # fmt: skip


@pytest.mark.parametrize("how", ANGLES)
def test_angles_are_those_of_fp32_at_position_4000(how: str, tmp_path: Path) -> None:
    arrays = {
        "table": TABLE,
        "from": np.array([3990]),
        "to": np.array([4010]),
        "len": np.array([20]),
        "pi2": np.float32(2 * np.pi),
    }
    assert difference(tmp_path, [*ANGLES[how], *LAST], {"x": X, "places": PLACES}, arrays) < 3e-3


@pytest.mark.parametrize("kind", ["float input", "Range", "CumSum"])
def test_positions_may_be_floats_or_be_counted(kind: str, tmp_path: Path) -> None:
    length = 20 if kind == "float input" else 4010
    x = normal(length, 64, seed=4)
    counted = {
        "float input": [N("Identity", ["floats"], ["p"])],
        "Range": [
            N("Shape", ["x"], ["s"], end=1),
            N("Squeeze", ["s"], ["n"]),
            N("Range", ["start", "n", "step"], ["i"]),
            N("Cast", ["i"], ["p"], to=FLOAT),
        ],
        "CumSum": [N("Cast", ["ones"], ["f"], to=FLOAT), N("CumSum", ["f", "first"], ["p"])],
    }[kind]
    feeds = {
        "x": x,
        **(
            {"floats": PLACES.astype(np.float32)}
            if kind == "float input"
            else {"ones": np.ones(length, np.int64)}
            if kind == "CumSum"
            else {}
        ),
    }
    nodes = [*counted, N("Unsqueeze", ["p", "axes"], ["column"]), N("Mul", ["column", "inv_freq"], ["angle"]), *LAST]
    assert difference(tmp_path, nodes, feeds) < 3e-3


def test_sines_inside_a_branch_are_those_of_fp32(tmp_path: Path) -> None:
    nodes = [*COLUMN, N("Mul", ["column", "inv_freq"], ["u"]),
        N("If", ["yes"], ["s"], then_branch=SINE, else_branch=SINE),
             N("Concat", ["s", "s"], ["wide"], axis=-1), N("MatMul", ["x", "W"], ["q"], name="mm"),
             N("Mul", ["q", "wide"], ["y"])]  # fmt: skip
    assert difference(tmp_path, nodes, {"x": X, "places": PLACES}) < 3e-3


def test_sizes_that_are_computed_in_floats_stay_right(tmp_path: Path) -> None:
    """As upsampling is exported: floor(length * scale) as an integer; fp16 knows no 2,501."""
    nodes = [N("MatMul", ["x", "W"], ["h"], name="mm"), N("Shape", ["x"], ["s"], end=1),
        N("Cast", ["s"], ["f"], to=FLOAT), N("Mul", ["f", "half"], ["g"]),
             N("Floor", ["g"], ["k"]), N("Cast", ["k"], ["n"], to=INT64),
             N("Slice", ["h", "zero", "n"], ["y"])]  # fmt: skip
    assert difference(tmp_path, nodes, {"x": normal(5003, 64)}) < 3e-3


# --- masks ------------------------------------------------------------------------------------------------------------


def attention(mask: list[onnx.NodeProto], join: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [N("MatMul", ["x", "W"], ["q"], name="q"), N("MatMul", ["x", "V"], ["k"], name="k"),
        N("Transpose", ["k"], ["kt"], perm=[1, 0]), *mask,
            N("MatMul", ["q", "kt"], ["s"], name="qk"), join, N("Softmax", ["m"], ["p"]),
            N("MatMul", ["p", "x"], ["y"], name="pv")]  # fmt: skip


ADD = N("Add", ["s", "mask"], ["m"])
CAUSAL = np.tril(np.ones((20, 20), bool))
MASKS: dict[str, tuple[list[onnx.NodeProto], onnx.NodeProto]] = {
    "added": ([], N("Add", ["s", "table"], ["m"])),
    "sliced": ([N("Slice", ["big", "zeros", "sizes"], ["mask"])], ADD),
    "sliced twice": ([N("Slice", ["big", "zero", "twenty", "zero"], ["part"]),
        N("Slice", ["part", "zero", "twenty", "one"], ["mask"])], ADD),
    "looked up": ([N("Gather", ["long", "places"], ["mask"])], ADD),
    "behind Unsqueeze and Squeeze": ([N("Unsqueeze", ["table", "zero"], ["u"]), N("Squeeze", ["u", "zero"], ["mask"])],
        ADD),
    "chosen": ([], N("Where", ["keep", "s", "table"], ["m"])),
    "of a scalar": ([], N("Where", ["keep", "s", "low"], ["m"])),
    "of a shape": ([N("ConstantOfShape", ["sizes"], ["mask"], value=helper.make_tensor("v", FLOAT, [1], [LOW])),
         N("Trilu", ["mask", "k1"], ["up"])], N("Add", ["s", "up"], ["m"])),
    "one minus": ([N("Cast", ["keep"], ["f"], to=FLOAT), N("Sub", ["unit", "f"], ["r"]),
        N("Mul", ["r", "low"], ["mask"])], ADD),
    "twice": ([N("Add", ["table", "table2"], ["mask"])], ADD),
    "subtracted": ([N("Cast", ["keep"], ["f"], to=FLOAT), N("Sub", ["unit", "f"], ["r"]),
        N("Mul", ["r", "high"], ["mask"])], N("Sub", ["s", "mask"], ["m"])),
    "the largest of two": ([N("Add", ["s", "table"], ["a"])], N("Max", ["a", "low"], ["m"])),
}  # fmt: skip


@pytest.mark.parametrize("lowest", [LOW, -1e9, -65504.0, -1e30, -np.inf])
@pytest.mark.parametrize("how", MASKS)
def test_masked_tokens_stay_masked(how: str, lowest: float, tmp_path: Path) -> None:
    if np.isinf(lowest) and how in ("one minus", "subtracted"):
        pytest.skip("0 times infinity is NaN in fp32 too")
    table, big = (np.where(np.tril(np.ones((size, size), bool)), 0, lowest).astype(np.float32) for size in (20, 64))
    arrays = {"table": table, "table2": table / 2, "big": big, "long": big[:, :20].copy(), "keep": CAUSAL,
        "low": np.float32(lowest),
         "high": np.float32(-lowest),
              "zeros": np.array([0, 0]), "sizes": np.array([20, 20]), "twenty": np.array([20]),
              "k1": np.array(1)}  # fmt: skip
    mask, join = MASKS[how]
    mask = (
        [N("ConstantOfShape", ["sizes"], ["mask"], value=helper.make_tensor("v", FLOAT, [1], [lowest])), *mask[1:]]
        if how == "of a shape"
        else mask
    )
    assert difference(tmp_path, attention(mask, join), {"x": X, "places": np.arange(20)}, arrays) < 5e-3


def test_a_row_that_two_masks_hide_is_still_a_row_of_numbers(tmp_path: Path) -> None:
    table = np.where(np.arange(20)[:, None] == 3, -1e9, np.zeros((20, 20))).astype(np.float32)
    assert difference(tmp_path, attention(*MASKS["twice"]), {"x": X}, {"table": table, "table2": table}) < 1


def test_a_table_of_embeddings_is_no_mask(tmp_path: Path) -> None:
    """Both are looked up and added; a number beyond fp16 in an embedding must not be cut without a word."""
    table = normal(64, 64)
    table[5, 5] = -1e6
    nodes = [
        N("Gather", ["table", "ids"], ["e"]),
        N("Add", ["e", "x"], ["s"]),
        N("MatMul", ["s", "W"], ["y"], name="mm"),
    ]
    write(
        tmp_path / "m.onnx",
        nodes,
        [info("x", [20, 64]), info("ids", [20], INT64)],
        [info("y", [20, 64])],
        stored(table=table, W=W),
    )
    assert "'table'" in refuse("precision", tmp_path / "m.onnx", tmp_path / "n.onnx", "--no-check")


# --- constants and operators ------------------------------------------------------------------------------------------

HIDDEN = N("MatMul", ["x", "W"], ["h"], name="mm")
CONSTANTS: dict[str, list[onnx.NodeProto]] = {
    "large factor": [HIDDEN, N("Mul", ["h", "million"], ["m"]), N("Div", ["m", "million"], ["y"])],
    "large divisor": [HIDDEN, N("Div", ["h", "million"], ["m"]), N("Mul", ["m", "million"], ["y"])],
    "large limit": [HIDDEN, N("Clip", ["h", "", "million"], ["y"])],
    "large summand": [HIDDEN, N("Add", ["h", "million"], ["m"]), N("Sub", ["m", "million"], ["d"]),
        N("Tanh", ["d"], ["y"])],
    "zero rows over their length": [HIDDEN, N("ReduceL2", ["h", "axes"], ["n"]), N("Max", ["n", "tiny"], ["c"]),
        N("Div", ["h", "c"], ["y"])],
    "the same, clipped and expanded": [
        HIDDEN, N("ReduceL2", ["h", "axes"], ["n"]), N("Clip", ["n", "tiny"], ["c"]), N("Shape", ["h"], ["s"]),
        N("Expand", ["c", "s"], ["e"]),
             N("Div", ["h", "e"], ["y"])
    ],
    "signs": [HIDDEN, N("Abs", ["h"], ["a"]), N("Max", ["a", "tiny"], ["c"]), N("Div", ["h", "c"], ["y"])],
    "a mean of nothing": [HIDDEN, N("ReduceSum", ["h", "axes"], ["n"]), N("Abs", ["n"], ["a"]),
        N("Add", ["a", "tiny"], ["c"]), N("Div", ["h", "c"], ["y"])],
    "sum of squares": [HIDDEN, N("Mul", ["h", "h"], ["q"]), N("ReduceMean", ["q", "axes"], ["v"]),
        N("Add", ["v", "tiny"], ["e"]),
         N("Sqrt", ["e"], ["r"]), N("Div", ["h", "r"], ["y"])],
}  # fmt: skip


@pytest.mark.parametrize("what", CONSTANTS)
def test_constants_that_fp16_does_not_have(what: str, tmp_path: Path) -> None:
    x = X.copy()
    x[3] = 0
    arrays = {"million": np.float32(1e6), "tiny": np.float32(1e-12)}
    assert difference(tmp_path, CONSTANTS[what], {"x": x}, arrays) < (0.1 if "summand" in what else 5e-3)


@pytest.mark.parametrize("opset", [13, 17, 18])
@pytest.mark.parametrize("sizes", [[1, 1, 2, 2], [1, 1, 1.7, 1.3]])
def test_scales_of_resize_stay_fp32(sizes: list[float], opset: int, tmp_path: Path) -> None:
    arrays = {"k": normal(8, 3, 3, 3) / np.float32(3), "sizes": np.array(sizes, np.float32)}
    nodes = [N("Conv", ["x", "k"], ["c"], name="conv"), N("Resize", ["c", "", "sizes"], ["y"], mode="nearest")]
    assert difference(tmp_path, nodes, {"x": normal(1, 3, 20, 20)}, arrays, opset=opset) < 3e-3


# --- graphs inside nodes ----------------------------------------------------------------------------------------------

ROW = [20, 64]
STATE = [info("i", [], INT64), info("go", [], BOOL), info("state", ROW)]
STEP = helper.make_graph([N("MatMul", ["state", "W"], ["u"]), N("Add", ["u", "h"], ["next"]),
    N("Identity", ["go"], ["on"]),
     N("ReduceMax", ["next"], ["seen"], keepdims=0)],
                         "step", STATE, [info("on", [], BOOL), info("next", ROW), info("seen", [])])  # fmt: skip
SCANNED = helper.make_graph([N("Add", ["carry", "row"], ["sum"]), N("Mul", ["sum", "gain"], ["o"])], "scan",
    [info("carry", [64]), info("row", [64])],
                            [info("sum", [64]), info("o", [64])])  # fmt: skip
THEN = helper.make_graph([N("MatMul", ["h", "W"], ["t"])], "then", [], [info("t", ROW)])
ELSE = helper.make_graph([N("Relu", ["h"], ["e"])], "else", [], [info("e", ROW)])
OUTER = helper.make_graph([N("If", ["yes"], ["o"], then_branch=THEN, else_branch=ELSE)], "outer", [], [info("o", ROW)])
INSIDE: dict[str, list[onnx.NodeProto]] = {
    "If": [N("If", ["yes"], ["z"], then_branch=THEN, else_branch=ELSE)],
    "If in If": [N("If", ["yes"], ["z"], then_branch=OUTER, else_branch=ELSE)],
    "Loop": [N("Loop", ["three", "yes", "h"], ["z", "all"], body=STEP)],
    "Scan": [N("MatMul", ["x", "V"], ["r"]),
        N("Scan", ["start_row", "r"], ["last", "z"], body=SCANNED, num_scan_inputs=1)],
}  # fmt: skip


@pytest.mark.parametrize("flags", [(), ("--keep-io",)], ids=["", "keep-io"])
@pytest.mark.parametrize("kind", INSIDE)
def test_values_that_graphs_inside_nodes_capture(kind: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    arrays = {
        "three": np.array(3),
        "start_row": np.zeros(64, np.float32),
        "gain": np.linspace(0.5, 2, 64, dtype=np.float32),
    }
    nodes = [HIDDEN, *INSIDE[kind], N("MatMul", ["z", "V"], ["y"], name="mm2")]
    assert difference(tmp_path, nodes, {"x": X}, {**ARRAYS, **arrays}, flags=flags) < 5e-3


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [9, 12, 13, 18, 21])
def test_bf16_is_refused_below_opset_13_and_right_above(opset: int, tmp_path: Path) -> None:
    nodes = [HIDDEN, N("Relu", ["h"], ["r"]), N("MatMul", ["r", "V"], ["y"], name="mm2")]
    write(
        tmp_path / "m.onnx", nodes, [info("x", [20, 64])], [info("y", [20, 64])], stored(W=W, V=W.T.copy()), opset=opset
    )
    args = ("precision", tmp_path / "m.onnx", tmp_path / "n.onnx", "--to", "bf16", "--no-check")
    if opset < 13:
        assert "opset 13" in refuse(*args)
        return
    succeed(*args)
    model = onnx.load(tmp_path / "n.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {t.data_type for t in model.graph.initializer} == {TensorProto.BFLOAT16}
    found = np.asarray(
        ReferenceEvaluator(model).run(None, {"x": X.astype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))})[0]
    ).astype(np.float32)
    assert 1e-4 < rel_l2(found, np.maximum(X @ W, 0) @ W.T) < 1e-2
