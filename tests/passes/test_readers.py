"""A weight is not a product: whoever else reads it reads what it read before, and what a report says of a layer is what
the files compute.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxtools.ir.model import Model
from onnxtools.passes.quantize.quantize_pass import Quantize
from onnxtools.pipeline.manager import PassManager
from onnxtools.pipeline.passbase import Pass, PassResult
from tests.support import Array, Feeds, info, initializers, normal, refuse, rel_l2, run, stored, succeed, write

SCHEMES = (
    "--smoothquant 0.5 --all-layers", "--smoothquant 0.5 --all-layers --gptq --per-channel", "--int4-awq",
    "--int4-awq --gptq", "--int8 --all-layers --gptq",
)  # fmt: skip
N = helper.make_node
ROWS = 48
X = normal(ROWS, 64, seed=5) * np.geomspace(0.2, 5, 64, dtype=np.float32)
W = normal(64, 64, seed=1) * np.float32(0.2) * np.geomspace(3, 0.3, 64, dtype=np.float32)[:, None]
GAIN = np.where(np.arange(64) == 3, 20, 1).astype(np.float32)
NORM = {"g": GAIN, "b": normal(64, seed=3) * np.float32(0.1)}
IDS = np.array([0, 5, 63, 7])


def norm(source: str = "x", made: str = "h", number: str = "") -> onnx.NodeProto:
    return N("LayerNormalization", [source, f"g{number}", f"b{number}"], [made], name=f"ln{number}")


def fc(weight: str) -> onnx.NodeProto:
    return N("MatMul", ["h", weight], ["y"], name="fc")


def looked_up(table: str) -> tuple[onnx.NodeProto, ...]:
    return (N("Gather", [table, "ids"], ["t"], name="embed"),)


def literal(path: Path, feeds: Feeds) -> Feeds:
    """What the file says: ONNX Runtime without rewriting it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(
        zip(names, session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()}), strict=True)
    )


def graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    arrays: Feeds,
    outputs: tuple[str, ...] = ("y",),
    feeds: Feeds | None = None,
) -> Feeds:
    """Write a graph and its calibration data; inputs are `feeds`, by default x. Returns them."""
    feeds = {"x": X} if feeds is None else feeds
    inputs = [info(name, array.shape, helper.np_dtype_to_tensor_dtype(array.dtype)) for name, array in feeds.items()]
    write(path, nodes, inputs, [info(name, None) for name in outputs], stored(**arrays), opset=21)
    np.savez(path.with_suffix(".npz"), **feeds)
    return feeds


# --- other readers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """How a weight is stored, how the product sees it, and what else reads it (as `t`)."""

    stored: Array
    product: tuple[onnx.NodeProto, ...]
    other: tuple[onnx.NodeProto, ...]
    outputs: tuple[str, ...] = ("y", "t")


def _branch(weight: str) -> onnx.GraphProto:
    return helper.make_graph([N("Identity", [weight], ["inner"], name="read")], "branch", [], [info("inner", [64, 64])])


PLAIN = (fc("W"),)
SHARED = {
    "tied": Shared(W, PLAIN, looked_up("W")),
    "tied, transposed": Shared(W.T.copy(), (N("Transpose", ["W"], ["wt"], name="tr"), fc("wt")), looked_up("W")),
    "tied by a Gemm": Shared(W, (N("Gemm", ["h", "W"], ["y"], transB=1, name="fc"),), looked_up("W")),
    "behind a cast": Shared(W.astype(np.float16), (N("Cast", ["W"], ["wide"], to=1, name="cast"), fc("wide")),
        looked_up("wide")),
    "cast, then looked up": Shared(
        W.astype(np.float16), (N("Cast", ["W"], ["wide"], to=1, name="cast"), fc("wide")),
        (N("Gather", ["W", "ids"], ["t0"]), N("Cast", ["t0"], ["t"], to=1))
    ),
    "behind an identity": Shared(W, (N("Identity", ["W"], ["same"], name="id"), fc("same")), looked_up("W")),
    "an output": Shared(W, PLAIN, (), ("y", "W")),
    "an output behind a transposition": Shared(W, PLAIN, (N("Transpose", ["W"], ["t"], name="tr"),)),
    "elementwise": Shared(W, PLAIN, (N("ReduceMax", ["W"], ["t"], keepdims=0, name="max"),)),
    "in a branch": Shared(W, PLAIN,
        (N("If", ["cond"], ["t"], then_branch=_branch("W"), else_branch=_branch("W"), name="if"),)),
    "a product left out": Shared(W, PLAIN, (N("MatMul", ["x", "W"], ["t"], name="left"),)),
    "first operand": Shared(W, PLAIN,
        (N("Transpose", ["x"], ["xt"], name="xt"), N("MatMul", ["W", "xt"], ["t"], name="left"))),
    "a Constant node": Shared(W, (N("Constant", [], ["C"], value=numpy_helper.from_array(W, "C")), fc("C")),
        looked_up("C")),
}  # fmt: skip


@pytest.mark.parametrize("how", ["prune --lm-head", *(f"quantize {scheme} --lm-head" for scheme in SCHEMES)])
@pytest.mark.parametrize("kind", SHARED)
def test_other_readers_of_a_weight_see_what_they_saw(kind: str, how: str, tmp_path: Path) -> None:
    case = SHARED[kind]
    path = tmp_path / "m.onnx"
    arrays = {"W": case.stored, **NORM} if kind != "a Constant node" else NORM
    feeds = graph(
        path, [norm(), *case.product, *case.other], arrays, case.outputs, {"x": X, "ids": IDS, "cond": np.array(True)}
    )
    command, *flags = how.split()
    if kind == "in a branch" and command == "quantize":
        flags = ["--int4-rtn", "--lm-head"]  # calibration refuses graphs inside nodes
    data = ["--calib", tmp_path / "m.npz"] if command == "quantize" and "--int4-rtn" not in flags else []
    whole = (command, path, tmp_path / "o.onnx", *flags, *data, "--exclude", "left", "--no-check")
    if command == "prune" and run(*whole).code == 1:
        assert any(reason in refuse(*whole) for reason in ("left: also ", "left: summed along two different axes"))
        return
    succeed(*whole, "--force")
    before, after = literal(path, feeds), literal(tmp_path / "o.onnx", feeds)
    np.testing.assert_array_equal(after[case.outputs[1]], before[case.outputs[1]])
    assert rel_l2(after["y"], before["y"]) < (0.9 if command == "prune" else 0.2)


def test_a_tied_weight_is_pruned_for_its_table_only_when_asked(tmp_path: Path) -> None:
    case = SHARED["tied"]
    feeds = graph(
        tmp_path / "m.onnx", [norm(), *case.product, *case.other], {"W": W, **NORM}, case.outputs, {"x": X, "ids": IDS}
    )
    succeed("prune", tmp_path / "m.onnx", tmp_path / "o.onnx", "--lm-head", "--embeddings", "--no-check")
    after = literal(tmp_path / "o.onnx", feeds)
    assert ((initializers(tmp_path / "o.onnx")["W"].reshape(16, 4, 64) == 0).sum(1) == 2).all()
    np.testing.assert_array_equal(after["t"], initializers(tmp_path / "o.onnx")["W"][IDS])


# --- what a report says -----------------------------------------------------------------------------------------------

BIAS = normal(64, seed=8) * np.float32(5)
LAYERS: dict[str, tuple[list[onnx.NodeProto], Feeds]] = {
    "MatMul": ([fc("W")], {}),
    "MatMul and Add": ([fc("W"), N("Add", ["y", "bias"], ["z"], name="add")], {"bias": BIAS}),
    "Add of a square bias": ([fc("W"), N("Add", ["bias", "y"], ["z"], name="add")], {"bias": np.tile(BIAS, (ROWS, 1))}),
    "Gemm": ([N("Gemm", ["h", "W", "none"], ["y"], alpha=0.5, name="fc")], {"none": np.zeros(64, np.float32)}),
    "Gemm, transposed": ([N("Gemm", ["h", "V"], ["y"], transB=1, alpha=3.0, name="fc")], {"V": W.T.copy()}),
    "Constant": ([N("Constant", [], ["C"], value=numpy_helper.from_array(W)), fc("C")], {}),
    "Constant, transposed": (
        [N("Constant", [], ["C"], value=numpy_helper.from_array(W.T.copy())), N("Transpose", ["C"], ["ct"]), fc("ct")],
        {}
    ),
    "shared": ([fc("W"), norm("y", "h2", "2"), N("MatMul", ["h2", "W"], ["z"], name="fc2")],
        {"g2": GAIN[::-1].copy(), "b2": BIAS}),
    "twice in a group": ([fc("W"), N("MatMul", ["h", "W"], ["z"], name="fc2")], {}),
}  # fmt: skip


@pytest.mark.parametrize("scheme", [*SCHEMES, "--fp8", "--int8 --all-layers --per-token"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_error_of_a_layer_is_what_both_files_compute(layer: str, scheme: str, tmp_path: Path) -> None:
    nodes, arrays = LAYERS[layer]
    uses_w = any("W" in node.input for node in nodes)
    made = {name for node in nodes for name in node.output}
    feeds = graph(
        tmp_path / "m.onnx",
        [norm(), *nodes],
        {**({"W": W} if uses_w else {}), **NORM, **arrays},
        ("y", "z") if "z" in made else ("y",),
    )
    flags = [*scheme.split(), "--lm-head", "--calib", tmp_path / "m.npz", "--no-check", "--json"]
    told = json.loads(succeed("quantize", tmp_path / "m.onnx", tmp_path / "o.onnx", *flags).out)
    rows = {row["layer"]: row for row in told["steps"][0]["result"]["table"]}
    before, after = literal(tmp_path / "m.onnx", feeds), literal(tmp_path / "o.onnx", feeds)
    measured = rel_l2(after["y"], before["y"])
    assert not rows["fc"]["left"], rows
    assert rows["fc"]["error"] == pytest.approx(measured, rel=0.15, abs=2e-3)
    assert measured < 0.15
    for name in before:
        assert rel_l2(after[name], before[name]) < 0.25, name


@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (0.5, 2.0), (-2.0, 0.25)])
@pytest.mark.parametrize(
    "scheme",
    [
        "--int4-rtn --lower ort",
        "--int8 --all-layers --per-token",
        "--int8 --all-layers --gptq",
        "--int4-awq --lower ort",
    ],
)
def test_alpha_and_beta_of_a_gemm_stay(scheme: str, alpha: float, beta: float, tmp_path: Path) -> None:
    graph(
        tmp_path / "m.onnx",
        [norm(), N("Gemm", ["h", "W", "bias"], ["y"], alpha=alpha, beta=beta, name="fc")],
        {"W": W, "bias": BIAS, **NORM},
    )
    data = [] if "rtn" in scheme else ["--calib", tmp_path / "m.npz"]
    succeed("quantize", tmp_path / "m.onnx", tmp_path / "o.onnx", *scheme.split(), "--lm-head", *data)
    hidden = (X - X.mean(1, keepdims=True)) / np.sqrt(X.var(1, keepdims=True) + 1e-5) * GAIN + NORM["b"]
    assert rel_l2(literal(tmp_path / "o.onnx", {"x": X})["y"], alpha * (hidden @ W) + beta * BIAS) < 0.2


@pytest.mark.parametrize(
    "node, weight",
    [(N("MatMul", ["w", "x"], ["y"], name="fc"), W), (N("Gemm", ["w", "x"], ["y"], transA=1, name="fc"), W.T.copy())],
)
def test_a_weight_that_comes_first_is_summed_along_its_own_axis(
    node: onnx.NodeProto, weight: Array, tmp_path: Path
) -> None:
    x = normal(64, 20, seed=2)
    graph(tmp_path / "m.onnx", [node], {"w": weight}, feeds={"x": x})
    succeed("prune", tmp_path / "m.onnx", tmp_path / "p.onnx", "--lm-head", "--no-check")
    pruned = initializers(tmp_path / "p.onnx")["w"]
    along = pruned if node.op_type == "MatMul" else pruned.T
    groups, whole = along.reshape(64, 16, 4), W.reshape(64, 16, 4)
    keep = np.argsort(np.argsort(-np.abs(whole), axis=2, kind="stable"), axis=2) < 2
    np.testing.assert_array_equal(groups, np.where(keep, whole, 0))
    flags = ["--int8", "--all-layers", "--lm-head", "--calib", tmp_path / "m.npz", "--no-check"]
    assert "1 left: the weight is the first operand" in refuse(
        "quantize", tmp_path / "m.onnx", tmp_path / "q.onnx", *flags
    )


# --- folds ------------------------------------------------------------------------------------------------------------


FIRST = N("MatMul", ["h", "W"], ["a"], name="m1")


def last(value: str) -> onnx.NodeProto:
    return N("MatMul", [value, "V"], ["y"], name="m2")


def _gate(first: str, second: str) -> list[onnx.NodeProto]:
    """A product whose rows are scaled by one number each, which another product makes."""
    return [FIRST, N("MatMul", ["h", "one"], ["s"], name="gate"), N("Mul", [first, second], ["m"], name="mul"),
            last("m")]  # fmt: skip


CHAINS: dict[str, tuple[list[onnx.NodeProto], Feeds]] = {
    "Relu": ([FIRST, N("Relu", ["a"], ["r"], name="relu"), last("r")], {}),
    "Add": ([FIRST, N("Add", ["a", "bias"], ["s"], name="add"), last("s")], {"bias": BIAS}),
    "Gemm": ([N("Gemm", ["h", "W", "bias"], ["a"], beta=0.5, alpha=2.0, name="m1"), last("a")], {"bias": BIAS}),
    "a bias that is shared": (
        [N("Gemm", ["h", "W", "bias"], ["a"], name="m1"), N("MatMul", ["a", "V"], ["p"], name="m2"),
            N("Add", ["p", "bias"], ["y"])], {"bias": BIAS}
    ),
    "two biases": (
        [FIRST, N("Add", ["bias", "a"], ["s"]), N("Add", ["s", "more"], ["u"]), last("u")],
        {"bias": BIAS, "more": BIAS[::-1].copy()},
    ),
    "a gate of one channel": (_gate("a", "s"), {"one": normal(64, 1, seed=9) / np.float32(8)}),
    "a gate of one channel first": (_gate("s", "a"), {"one": normal(64, 1, seed=9) / np.float32(8)}),
    "one channel and a wide bias": (
        [N("MatMul", ["h", "one"], ["s"], name="m1"), N("Add", ["s", "bias"], ["u"], name="add"), last("u")],
        {"one": normal(64, 1, seed=9) / np.float32(8), "bias": BIAS},
    ),
    "a square": (
        [FIRST, N("Relu", ["a"], ["r"]), N("Mul", ["r", "r"], ["s"], name="sq"), last("s")], {}
    ),
    "both operands from one value": (
        [FIRST, N("Sigmoid", ["a"], ["s"]), N("Mul", ["a", "s"], ["u"], name="silu"), last("u")],
        {},
    ),
    "a norm whose gain is shared": (
        [FIRST, N("LayerNormalization", ["a", "g", "b"], ["u"], name="ln2"), last("u")], {}
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "scheme", ["--smoothquant 0.5 --all-layers --per-channel", "--smoothquant 0.5 --all-layers", "--int4-awq"]
)
@pytest.mark.parametrize("chain", CHAINS)
def test_folds_into_a_product_before_are_no_worse_with_gptq(chain: str, scheme: str, tmp_path: Path) -> None:
    """A factor that is folded after the weight was rounded (GPTQ) must reach its codes or their scales."""
    nodes, arrays = CHAINS[chain]
    uses = {name for node in nodes for name in node.input}
    uneven = {"W": W * np.geomspace(0.1, 10, 64, dtype=np.float32), "V": normal(64, 64, seed=2) / np.float32(8)}
    feeds = graph(
        tmp_path / "m.onnx",
        [norm(), *nodes],
        {**{name: array for name, array in uneven.items() if name in uses}, **NORM, **arrays},
    )
    expected, errors = literal(tmp_path / "m.onnx", feeds)["y"], []
    for more in ([], ["--gptq"]):
        succeed(
            "quantize",
            tmp_path / "m.onnx",
            tmp_path / "o.onnx",
            *scheme.split(),
            *more,
            "--lm-head",
            "--calib",
            tmp_path / "m.npz",
            "--no-check",
        )
        errors.append(rel_l2(literal(tmp_path / "o.onnx", feeds)["y"], expected))
    assert errors[0] < 0.25, errors
    assert errors[1] < 1.5 * errors[0] + 0.02, errors


@pytest.mark.parametrize("scheme", ["--smoothquant 0.5 --all-layers", "--int4-awq"])
def test_a_fold_leaves_a_weight_that_is_tied(scheme: str, tmp_path: Path) -> None:
    """The product before is left out, and its weight is a table too."""
    nodes = [norm(), FIRST, N("Relu", ["a"], ["r"], name="relu"), last("r"), *looked_up("W")]
    arrays = {"W": W * np.geomspace(0.1, 10, 64, dtype=np.float32), "V": normal(64, 64, seed=2) / np.float32(8), **NORM}
    feeds = graph(tmp_path / "m.onnx", nodes, arrays, ("y", "t"), {"x": X, "ids": IDS})
    flags = [*scheme.split(), "--lm-head", "--exclude", "m1", "--calib", tmp_path / "m.npz", "--no-check"]
    succeed("quantize", tmp_path / "m.onnx", tmp_path / "o.onnx", *flags)
    before, after = literal(tmp_path / "m.onnx", feeds), literal(tmp_path / "o.onnx", feeds)
    np.testing.assert_array_equal(after["t"], before["t"])
    assert rel_l2(after["y"], before["y"]) < 0.25


# --- the calibration cache --------------------------------------------------------------------------------------------


def test_weights_whose_names_differ_in_a_slash_keep_apart(tmp_path: Path) -> None:
    names = ("a/b", "a_b", "a.b")
    nodes = [norm(), *(N("MatMul", ["h", name], [f"y{i}"], name=f"fc{i}") for i, name in enumerate(names))]
    arrays = {name: np.roll(W, 7 * i, axis=1) * np.float32(10.0**i) for i, name in enumerate(names)}
    feeds = graph(tmp_path / "m.onnx", nodes, {**arrays, **NORM}, ("y0", "y1", "y2"))
    flags = [
        "--int8",
        "--all-layers",
        "--gptq",
        "--lm-head",
        "--calib",
        tmp_path / "m.npz",
        "--calib-cache",
        tmp_path / "cache",
    ]
    succeed("quantize", tmp_path / "m.onnx", tmp_path / "o.onnx", *flags)
    before, after = literal(tmp_path / "m.onnx", feeds), literal(tmp_path / "o.onnx", feeds)
    assert max(rel_l2(after[name], before[name]) for name in before) < 0.05


@dataclass(frozen=True)
class Edit(Pass):
    """A pass of somebody else, which does one thing."""

    name = "edit"
    what: str = "row 0"

    def apply(self, model: Model) -> PassResult:
        kind, _, number = self.what.partition(" ")
        if kind == "row":
            value = model.graph.initializers["W"]
            assert value.const_value is not None
            array = value.const_value.numpy().copy()
            array[int(number)] *= 9
            value.const_value = ir.Tensor(array, name="W")
        else:
            node = next(node for node in model.graph if node.op_type == "Gemm")
            node.attributes[kind] = ir.AttrFloat32(kind, float(number))
        return PassResult(True, 1)


@pytest.mark.parametrize("what", ["row 0", "row 21", "row 63", "alpha 7"])
def test_a_calibration_cache_is_not_used_after_another_pass(what: str, tmp_path: Path) -> None:
    """Whatever the pass before changed, the cache of a run without it gives the same file as no cache."""
    nodes = [
        norm(),
        N("Gemm", ["h", "W"], ["y"], name="fc"),
        norm("y", "h2", "2"),
        N("MatMul", ["h2", "V"], ["z"], name="fc2"),
    ]
    arrays = {"W": W, "V": W.T.copy(), **NORM, "g2": GAIN.copy(), "b2": BIAS}
    graph(tmp_path / "m.onnx", nodes, arrays, ("z",))

    def made(name: str, passes: list[Pass], cache: str) -> dict[str, Array]:
        quantize = Quantize(
            scheme="int8",
            gptq=True,
            all_layers=True,
            lm_head=True,
            calib=str(tmp_path / "m.npz"),
            calib_cache=str(tmp_path / cache),
        )
        model = Model.load(tmp_path / "m.onnx")
        PassManager([*passes, quantize]).run(model)
        model.save(tmp_path / name, copy_weights=True)
        return initializers(tmp_path / name)

    made("plain.onnx", [], "cache")
    cached, fresh = made("cached.onnx", [Edit(what)], "cache"), made("fresh.onnx", [Edit(what)], "empty")
    assert cached.keys() == fresh.keys()
    for name, array in fresh.items():
        np.testing.assert_array_equal(cached[name], array, err_msg=name)


@pytest.mark.parametrize("where", ["main", "If", "Loop"])
def test_constant_nodes_are_weights_wherever_they_are(where: str, tmp_path: Path) -> None:
    """What is said to be pruned is pruned in the file, and what is not pruned computes as before."""
    constant, product = (
        N("Constant", [], ["C"], value=numpy_helper.from_array(W, "C")),
        N("MatMul", ["h", "C"], ["p"], name="fc"),
    )
    if where == "main":
        nodes = [norm(), constant, product]
    elif where == "If":
        branch = helper.make_graph([constant, product], "branch", [], [info("p", None)])
        nodes = [norm(), N("If", ["yes"], ["p"], then_branch=branch, else_branch=branch, name="if")]
    else:
        state = [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("h", [ROWS, 64])]
        body = helper.make_graph(
            [constant, product, N("Identity", ["go"], ["go2"])],
            "body",
            state,
            [info("go2", [], TensorProto.BOOL), info("p", [ROWS, 64])],
        )
        nodes = [norm("x", "h0"), N("Loop", ["two", "yes", "h0"], ["p"], body=body, name="loop")]
    nodes.append(N("MatMul", ["p", "V"], ["y"], name="fc2"))
    feeds = graph(
        tmp_path / "m.onnx", nodes, {"V": W.T.copy(), "yes": np.array(True), "two": np.array(2), **NORM}, ("y", "p")
    )
    told = json.loads(
        succeed("prune", tmp_path / "m.onnx", tmp_path / "o.onnx", "--lm-head", "--no-check", "--json").out
    )
    pruned = {row["node"] for row in told["steps"][0]["result"]["table"] if not row["left"]}
    assert pruned == ({"fc", "fc2"} if where == "main" else {"fc2"})
    before, after = literal(tmp_path / "m.onnx", feeds), literal(tmp_path / "o.onnx", feeds)
    sparse = np.where(
        np.argsort(np.argsort(-np.abs(W.reshape(16, 4, 64)), axis=1, kind="stable"), axis=1) < 2,
        W.reshape(16, 4, 64),
        0,
    ).reshape(64, 64)
    hidden = (X - X.mean(1, keepdims=True)) / np.sqrt(X.var(1, keepdims=True) + 1e-5) * GAIN + NORM["b"]
    assert rel_l2(after["p"], hidden @ sparse if where == "main" else before["p"]) < 1e-5
