"""Models that are no LLM: what CNNs, detectors, recurrent and audio models have that decoders have not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.support import FLOAT, Array, Feeds, Session, info, normal, refuse, rel_l2, stored, succeed, write

N = helper.make_node
X = normal(2, 4, 6, 6, seed=9)


def image(
    path: Path, nodes: list[onnx.NodeProto], weights: Feeds, opset: int = 17, shape: list[Any] | None = None,
    ir_version: int = 8, output: list[Any] | None = None,
) -> Path:  # fmt: skip
    """x [n, 4, 6, 6] -> nodes -> y."""
    for index, node in enumerate(nodes):
        node.name = node.name or f"{node.op_type}_{index}"
    ends = [info("y", output if output is not None else [f"d{i}" for i in range(4)])]
    inputs = [info("x", shape or ["n", 4, 6, 6])]
    return write(path, nodes, inputs, ends, stored(**weights), opset=opset, ir_version=ir_version)


def same(a: Path, b: Path, feeds: Feeds | None = None) -> float:
    feeds = feeds or {"x": X}
    return rel_l2(Session(b)(feeds)["y"], Session(a)(feeds)["y"])


CONV = N("Conv", ["x", "w"], ["c"], name="conv")
W = normal(8, 4, 1, 1, seed=1)

# --- old opsets -------------------------------------------------------------------------------------------------------

OLD: dict[str, tuple[int, list[onnx.NodeProto], Feeds]] = {
    "Upsample-7": (7, [N("Upsample", ["x"], ["y"], scales=[1.0, 1.0, 2.0, 2.0])], {}),
    "Upsample-9": (9, [N("Upsample", ["x", "s"], ["y"])], {"s": np.array([1, 1, 2, 2], np.float32)}),
    "Resize-10": (10, [N("Resize", ["x", "s"], ["y"])], {"s": np.array([1, 1, 1.5, 1.7], np.float32)}),
    "Upsample-9, linear": (9, [N("Upsample", ["x", "s"], ["y"], mode="linear")],
                           {"s": np.array([1, 1, 2, 2], np.float32)}),
    "Slice-1": (8, [N("Slice", ["x"], ["y"], starts=[1], ends=[3], axes=[2])], {}),
    "Pad-2": (9, [N("Pad", ["x"], ["y"], pads=[0, 0, 1, 1, 0, 0, 1, 1], mode="reflect")], {}),
    "Clip-6": (10, [N("Clip", ["x"], ["y"], min=-0.5, max=0.5)], {}),
    "Dropout-7": (8, [N("Dropout", ["x"], ["y"], ratio=0.5)], {}),
    "BatchNormalization-7": (7, [N("BatchNormalization", ["x", "a", "b", "m", "v"], ["y"])], {
        "a": np.ones(4, np.float32), "b": np.full(4, 0.5, np.float32), "m": np.zeros(4, np.float32),
        "v": np.full(4, 2, np.float32),
    }),
    "MaxPool-8, Softmax": (9, [
        N("MaxPool", ["x"], ["p"], kernel_shape=[2, 2], strides=[2, 2]), N("Softmax", ["p"], ["y"]),
    ], {}),
    "Flatten, Gemm, Reshape": (7, [
        N("Flatten", ["x"], ["f"]), N("Gemm", ["f", "g", "h"], ["z"], transB=1), N("Reshape", ["z", "to"], ["y"]),
    ], {"g": normal(8, 144), "h": normal(8), "to": np.array([-1, 2, 2, 2])}),
}  # fmt: skip


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("version", [19, 23])
def test_opsets_before_11_are_raised(kind: str, version: int, tmp_path: Path) -> None:
    opset, nodes, weights = OLD[kind]
    path = image(tmp_path / "m.onnx", nodes, weights, opset, ir_version=4)
    succeed("set-opset", path, tmp_path / "o.onnx", "--version", str(version))
    assert same(path, tmp_path / "o.onnx") < 1e-6
    onnx.checker.check_model(onnx.load(tmp_path / "o.onnx"), full_check=True)


def test_what_a_model_says_of_itself_is_kept(tmp_path: Path) -> None:
    model = onnx.load(image(tmp_path / "m.onnx", [N("Relu", ["x"], ["y"])], {}, 9, ir_version=4))
    model.producer_name, model.model_version, model.doc_string = "exporter", 5, "a text"
    helper.set_model_props(model, {"names": "cat,dog"})
    onnx.save(model, tmp_path / "m.onnx")
    succeed("set-opset", tmp_path / "m.onnx", tmp_path / "o.onnx")
    found = onnx.load(tmp_path / "o.onnx")
    assert (found.producer_name, found.model_version, found.doc_string) == ("exporter", 5, "a text")
    assert {"names": "cat,dog"}.items() <= {p.key: p.value for p in found.metadata_props}.items()


@pytest.mark.parametrize("channels", [8, 11, 13])
def test_groups_are_normalized_by_channel(channels: int, tmp_path: Path) -> None:
    """Opset 21: a scale for each channel. Two in a row: the shape behind the first one is known."""
    groups = 1 if channels % 4 else 4
    nodes = [N("Conv", ["x", "k"], ["c"]), N("GroupNormalization", ["c", "s", "b"], ["g"], num_groups=groups),
             N("Conv", ["g", "k2"], ["d"]),
             N("GroupNormalization", ["d", "s", "b"], ["y"], num_groups=groups)]  # fmt: skip
    weights = {"k": normal(channels, 4, 1, 1), "k2": normal(channels, channels, 1, 1), "s": normal(groups, seed=5),
               "b": normal(groups, seed=6)}  # fmt: skip
    path = image(tmp_path / "m.onnx", nodes, weights, 18)
    succeed("set-opset", path, tmp_path / "o.onnx", "--version", "21")
    assert same(path, tmp_path / "o.onnx") < 1e-5


def test_roi_align_keeps_its_corners(tmp_path: Path) -> None:
    rois = {"rois": np.array([[0.2, 0.3, 4.7, 3.9]], np.float32), "which": np.array([0])}
    path = image(tmp_path / "m.onnx", [N("RoiAlign", ["x", "rois", "which"], ["y"], output_height=2, output_width=2)],
                 rois, 12, ir_version=7)  # fmt: skip
    succeed("set-opset", path, tmp_path / "o.onnx")
    assert same(path, tmp_path / "o.onnx") == 0


@pytest.mark.parametrize("command", [["cleanup"], ["precision"], ["prune"]])
def test_initializers_of_ir_3_need_a_newer_one(command: list[str], tmp_path: Path) -> None:
    model = onnx.load(image(tmp_path / "m.onnx", [N("Relu", ["x"], ["r"]), N("Conv", ["r", "w"], ["y"])], {"w": W}, 8))
    model.ir_version = 3
    model.graph.input.append(info("w", [8, 4, 1, 1]))
    onnx.save(model, tmp_path / "m.onnx")
    succeed(*command, tmp_path / "m.onnx", tmp_path / "o.onnx", "--tolerance", "1", "--force")
    if command != ["cleanup"]:
        onnx.checker.check_model(onnx.load(tmp_path / "o.onnx"), full_check=True)
        assert onnx.load(tmp_path / "o.onnx").ir_version >= 4


def test_functions_are_named_before_their_opset_is_raised(tmp_path: Path) -> None:
    inner = [N("Relu", ["a"], ["b"])]
    function = helper.make_function("local", "F", ["a"], ["b"], inner, [helper.make_opsetid("", 17)])
    graph = helper.make_graph([N("F", ["x"], ["y"], domain="local")], "g", [info("x", [4])], [info("y", [4])])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8), tmp_path / "m.onnx")
    assert "inline-functions" in refuse("set-opset", tmp_path / "m.onnx", tmp_path / "o.onnx", "--version", "21")


def test_a_declared_rank_that_is_wrong(tmp_path: Path) -> None:
    nodes = [N("Shape", ["x"], ["s"]), N("Slice", ["s", "from", "to"], ["two"]),
             N("Concat", ["two", "rest"], ["t"], axis=0), N("Reshape", ["x", "t"], ["y"])]  # fmt: skip
    numbers = {"from": np.array([0]), "to": np.array([2]), "rest": np.array([-1])}
    path = image(tmp_path / "m.onnx", nodes, numbers, 12, ir_version=7, output=["n", 36])
    assert "drop-stale-types" in refuse("set-opset", path, tmp_path / "o.onnx")
    succeed("drop-stale-types", path, tmp_path / "d.onnx")
    succeed("set-opset", tmp_path / "d.onnx", tmp_path / "o.onnx")
    assert same(path, tmp_path / "o.onnx") == 0


# --- folding ----------------------------------------------------------------------------------------------------------


def test_a_static_graph_with_large_values_keeps_its_additions(tmp_path: Path) -> None:
    """Beyond the elements that are evaluated nothing is known, and a static graph has no other sizes to ask."""
    nodes = [N("Neg", ["x"], ["m"]), N("Relu", ["x"], ["r"]), N("Add", ["m", "r"], ["y"])]
    path = image(tmp_path / "m.onnx", nodes, {}, shape=[1, 8, 2048, 2100], output=[1, 8, 2048, 2100])
    succeed("fold-constants", path, tmp_path / "o.onnx", "--no-check")
    assert [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node] == ["Neg", "Relu", "Add"]


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("first", [False, True])
def test_recurrent_layers_load_again(op: str, gates: int, first: bool, tmp_path: Path) -> None:
    """torch's batch_first: transpositions on both sides, on which ONNX Runtime's fp16 fusions crash."""
    nodes = [
        *([N("Transpose", ["x"], ["t"], perm=[1, 0, 2])] if first else []),
        N(op, ["t" if first else "x", "w", "r"], ["s"], hidden_size=4), N("Squeeze", ["s", "one"], ["q"]),
        N("Transpose", ["q"], ["u"], perm=[1, 0, 2]), N("MatMul", ["u", "m"], ["y"]),
    ]  # fmt: skip
    weights = {"w": normal(1, gates * 4, 4), "r": normal(1, gates * 4, 4, seed=2), "m": normal(4, 8),
               "one": np.array([1])}  # fmt: skip
    for node in nodes:
        node.name = f"node_{node.output[0]}"
    path = write(tmp_path / "m.onnx", nodes, [info("x", [2, 5, 4])], [info("y", ["a", "b", 8])], stored(**weights),
                 opset=14)  # fmt: skip
    succeed("precision", path, tmp_path / "h.onnx", "--to", "fp16", "--keep-io")
    x = normal(2, 5, 4)
    assert rel_l2(Session(tmp_path / "h.onnx")({"x": x})["y"], Session(path)({"x": x})["y"]) < 1e-3


def test_validate_gives_each_model_its_type(tmp_path: Path) -> None:
    path = image(tmp_path / "m.onnx", [N("Conv", ["x", "w"], ["y"])], {"w": W})
    succeed("precision", path, tmp_path / "h.onnx", "--to", "fp16")
    succeed("validate", path, tmp_path / "h.onnx")
    np.savez(tmp_path / "x.npz", x=X)
    succeed("validate", path, tmp_path / "h.onnx", "--inputs", tmp_path / "x.npz")


DEFAULTS: dict[str, list[onnx.NodeProto]] = {
    "ConstantOfShape": [N("Shape", ["x"], ["s"]), N("ConstantOfShape", ["s"], ["z"])],
    "RandomNormal": [N("RandomNormal", [], ["z"], shape=[8, 1, 1], scale=1e-6)],
    "HannWindow": [N("HannWindow", ["six"], ["z"])],
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_types_that_are_left_to_their_default(kind: str, tmp_path: Path) -> None:
    path = image(tmp_path / "m.onnx", [CONV, N("Relu", ["x"], ["x2"]), N("Conv", ["x2", "v"], ["d"]), *DEFAULTS[kind],
                 N("Add", ["d", "z"], ["e"]), N("Concat", ["c", "e"], ["y"], axis=1)],
                 {"w": W, "v": normal(8, 4, 1, 1) if kind != "ConstantOfShape" else normal(4, 4, 1, 1),
                  "six": np.array(6)})  # fmt: skip
    succeed("precision", path, tmp_path / "h.onnx", "--to", "fp16", "--keep-io")
    assert same(path, tmp_path / "h.onnx") < 2e-3


def test_a_branch_whose_results_have_no_recorded_type(tmp_path: Path) -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        return helper.make_graph([N(op, ["c"], [f"{name}_out"])], name, [],
                                 [helper.make_empty_tensor_value_info(f"{name}_out")])  # fmt: skip

    choice = N("If", ["yes"], ["i"], then_branch=branch("then", "Relu"), else_branch=branch("else", "Neg"))
    path = image(tmp_path / "m.onnx", [CONV, choice, N("Conv", ["i", "v"], ["y"])],
                 {"w": W, "v": normal(4, 8, 1, 1), "yes": np.array(True)})  # fmt: skip
    succeed("precision", path, tmp_path / "h.onnx", "--to", "fp16", "--keep-io")
    assert same(path, tmp_path / "h.onnx") < 2e-3


def test_sizes_that_must_fit_leave_the_types_known(tmp_path: Path) -> None:
    """A pyramid whose stand-in sizes do not meet: halves of odd numbers, and an Add of what was halved and doubled."""
    nodes = [N("Conv", ["x", "w"], ["c"], strides=[2, 2]), N("Resize", ["c", "", "twice"], ["u"]),
             N("Conv", ["x", "v"], ["d"]), N("Add", ["u", "d"], ["e"]),
             N("BatchNormalization", ["e", "one", "zero", "zero", "one"], ["y"])]  # fmt: skip
    weights = {"w": W, "v": normal(8, 4, 1, 1, seed=4), "twice": np.array([1, 1, 2, 2], np.float32),
               "one": np.ones(8, np.float32), "zero": np.zeros(8, np.float32)}  # fmt: skip
    path = image(tmp_path / "m.onnx", nodes, weights, shape=["n", 4, "h", "w"])
    succeed("precision", path, tmp_path / "h.onnx", "--to", "fp16", "--keep-io", "--no-check")
    onnx.checker.check_model(onnx.load(tmp_path / "h.onnx"), full_check=True)
    assert same(path, tmp_path / "h.onnx") < 2e-3


def test_bf16_says_which_opset_a_convolution_needs(tmp_path: Path) -> None:
    nodes = [CONV, N("GlobalAveragePool", ["c"], ["p"]), N("Flatten", ["p"], ["f"]), N("MatMul", ["f", "m"], ["y"])]
    path = image(tmp_path / "m.onnx", nodes, {"w": W, "m": normal(8, 16)}, output=["n", 16])
    assert "Conv takes bfloat16 from opset 22" in succeed("precision", path, tmp_path / "h.onnx", "--to", "bf16").out


def test_infinite_masks_and_scalars_while_calibrating(tmp_path: Path) -> None:
    nodes = [CONV, N("Where", ["keep", "zero", "low"], ["mask"]), N("Add", ["c", "mask"], ["y"]),
             N("ReduceMax", ["c"], ["most"], keepdims=0), N("Mul", ["most", "most"], ["square"])]  # fmt: skip
    keep = np.ones((1, 1, 6, 6), bool)
    keep[..., 3:] = False
    path = image(tmp_path / "m.onnx", nodes, {"w": W, "zero": np.float32(0), "low": np.float32(-np.inf), "keep": keep})
    model = onnx.load(path)
    model.graph.output.append(info("square", []))
    onnx.save(model, path)
    np.savez(tmp_path / "x.npz", x=X)
    succeed("precision", path, tmp_path / "h.onnx", "--to", "fp16", "--calib", tmp_path / "x.npz")


# --- quantizing and pruning -------------------------------------------------------------------------------------------


def calibrated(path: Path, out: Path, *flags: str, data: Array = X) -> str:
    np.savez(path.with_suffix(".npz"), x=data)
    return succeed("quantize", path, out, *flags, "--calib", path.with_suffix(".npz"), "--tolerance", "1").out


@pytest.mark.parametrize("flags", [["--int4-awq"], ["--int4-awq", "--gptq"], ["--int8", "--all-layers", "--gptq"]])
def test_linear_layers_over_images(flags: list[str], tmp_path: Path) -> None:
    """ConvNeXt's products: the activations have four axes, and the last one is the channels."""
    path = tmp_path / "m.onnx"
    nodes = [N("MatMul", ["x", "a"], ["h"], name="first"), N("Relu", ["h"], ["r"]),
             N("MatMul", ["r", "b"], ["y"], name="second")]  # fmt: skip
    write(path, nodes, [info("x", ["n", 6, 6, 32])], [info("y", ["n", 6, 6, 32])],
          stored(a=normal(32, 64), b=normal(64, 32)), opset=17)  # fmt: skip
    x = normal(2, 6, 6, 32)
    calibrated(path, tmp_path / "q.onnx", *flags, data=x)
    assert rel_l2(Session(tmp_path / "q.onnx")({"x": x})["y"], Session(path)({"x": x})["y"]) < 0.2
    succeed("prune", path, tmp_path / "p.onnx", "--method", "sparsegpt", "--calib", path.with_suffix(".npz"),
            "--tolerance", "1")  # fmt: skip


def test_several_images_for_a_graph_of_one(tmp_path: Path) -> None:
    path = image(tmp_path / "m.onnx", [N("Conv", ["x", "w"], ["y"], name="conv")], {"w": W}, shape=[1, 4, 6, 6])
    told = calibrated(path, tmp_path / "q.onnx", "--int8", data=normal(5, 4, 6, 6))
    assert "calibrated on 5 texts" in told


def test_inputs_without_a_batch_are_used_again(tmp_path: Path) -> None:
    nodes = [N("Conv", ["x", "w"], ["c"], name="conv"), N("Add", ["c", "anchor"], ["y"])]
    path = image(tmp_path / "m.onnx", nodes, {"w": W}, shape=[1, 4, 6, 6])
    model = onnx.load(path)
    model.graph.input.append(info("anchor", [8, 1, 1]))
    onnx.save(model, path)
    np.savez(tmp_path / "x.npz", x=normal(5, 4, 6, 6), anchor=normal(8, 1, 1))
    flags = ("--int8", "--calib", tmp_path / "x.npz", "--tolerance", "1")
    assert "calibrated on 5 texts" in succeed("quantize", path, tmp_path / "q.onnx", *flags).out
    np.savez(tmp_path / "x.npz", x=normal(5, 4, 6, 6), anchor=normal(16, 1, 1))
    assert "not the same number" in refuse("quantize", path, tmp_path / "q.onnx", *flags, "--force")


@pytest.mark.parametrize("to", ["fp16", "bf16"])
def test_quantized_values_of_old_opsets_stay_fp32(to: str, tmp_path: Path) -> None:
    """Before opset 19 a DequantizeLinear makes float32 alone."""
    nodes = [N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("DequantizeLinear", ["q", "s", "z"], ["d"]),
             N("Conv", ["d", "w"], ["c"]), N("Relu", ["c"], ["y"])]  # fmt: skip
    path = image(tmp_path / "m.onnx", nodes, {"w": W, "s": np.float32(0.05), "z": np.int8(0)})
    succeed("precision", path, tmp_path / "h.onnx", "--to", to, "--keep-io")
    onnx.checker.check_model(onnx.load(tmp_path / "h.onnx"), full_check=True)


def test_the_range_of_a_convolution_follows_the_method(tmp_path: Path) -> None:
    path = image(tmp_path / "m.onnx", [N("Conv", ["x", "w"], ["y"], name="conv")], {"w": W}, shape=["n", 4, 60, 60])
    x = normal(4, 4, 60, 60)
    x[0, 0, 0, 0] = 5000
    errors = {}
    for method in ("max", "percentile"):
        calibrated(path, tmp_path / f"{method}.onnx", "--int8", "--calib-method", method, data=x)
        found, expected = (Session(p)({"x": x[1:]})["y"] for p in (tmp_path / f"{method}.onnx", path))
        errors[method] = rel_l2(found, expected)
    assert errors["percentile"] < 0.05 < errors["max"]


def test_int8_means_the_same_beside_a_convolution(tmp_path: Path) -> None:
    nodes = [N("Conv", ["x", "w"], ["c"], name="patch"), N("LayerNormalization", ["c", "g", "b"], ["l"], axis=-1),
             N("MatMul", ["l", "one"], ["h"], name="behind"), N("Relu", ["h"], ["r"]),
             N("MatMul", ["r", "two"], ["y"], name="other")]  # fmt: skip
    weights = {"w": W, "g": np.ones(32, np.float32), "b": np.zeros(32, np.float32), "one": normal(32, 32),
               "two": normal(32, 32)}  # fmt: skip
    path = image(tmp_path / "m.onnx", nodes, weights, shape=["n", 4, 6, 32])
    told = calibrated(path, tmp_path / "q.onnx", "--int8", data=normal(2, 4, 6, 32))
    assert "1 left: not behind a norm (--all-layers takes it)" in told and "2 of 3 places" in told


LEFT: dict[str, tuple[list[onnx.NodeProto], Feeds, str]] = {
    "ConvTranspose": ([N("ConvTranspose", ["x", "t"], ["y"])], {"t": normal(4, 8, 1, 1)}, "transposed convolution"),
    "weight norm": ([N("Mul", ["w", "s"], ["k"]), N("Conv", ["x", "k"], ["y"])],
                    {"s": normal(8, 1, 1, 1)}, "computed from constants"),
    "half weight": ([N("Cast", ["h"], ["k"], to=FLOAT), N("Conv", ["x", "k"], ["y"])],
                    {"h": W.astype(np.float16)}, "goes through Cast"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT)
@pytest.mark.parametrize("alone", [False, True])
def test_what_is_left_is_said(kind: str, alone: bool, tmp_path: Path) -> None:
    nodes, weights, reason = LEFT[kind]
    also = [] if alone else [N("Conv", ["x", "w"], ["z"], name="plain"), N("Concat", ["y1", "z"], ["y"], axis=1)]
    nodes = [helper.make_node(n.op_type, n.input, ["y1" if o == "y" and not alone else o for o in n.output], name=o)
             for n in nodes for o in n.output]  # fmt: skip
    for node, (original, _, _) in zip(nodes, [LEFT[kind]] * len(nodes), strict=True):
        node.attribute.extend(next(o for o in original if o.op_type == node.op_type).attribute)
    path = image(tmp_path / "m.onnx", [*nodes, *also], {**weights, "w": W})
    if not alone:
        assert reason in calibrated(path, tmp_path / "q.onnx", "--int8")
        return
    np.savez(tmp_path / "m.npz", x=X)
    told = refuse("quantize", path, tmp_path / "q.onnx", "--int8", "--calib", tmp_path / "m.npz")
    assert "nothing is quantized" in told and reason in told


def test_a_weight_behind_an_identity_is_quantized(tmp_path: Path) -> None:
    path = image(
        tmp_path / "m.onnx", [N("Identity", ["w"], ["k"]), N("Conv", ["x", "k"], ["y"], name="conv")], {"w": W}
    )
    assert "1 of 1 places quantized" in calibrated(path, tmp_path / "q.onnx", "--int8")
    assert same(path, tmp_path / "q.onnx") < 0.05


def test_a_product_of_two_constants(tmp_path: Path) -> None:
    """DeBERTa's positions: nothing is calibrated where nothing flows."""
    nodes = [N("MatMul", ["p", "w"], ["k"], name="positions"), N("MatMul", ["x", "w2"], ["h"], name="fc"),
             N("Add", ["h", "k"], ["y"])]  # fmt: skip
    weights = {"p": normal(8, 32), "w": normal(32, 32), "w2": normal(32, 32, seed=3)}
    path = write(tmp_path / "m.onnx", nodes, [info("x", [1, 8, 32])], [info("y", [1, 8, 32])], stored(**weights),
                 opset=17)  # fmt: skip
    x = normal(1, 8, 32)
    assert "both operands are constants" in calibrated(path, tmp_path / "q.onnx", "--fp8", data=x)
    for method in ("wanda", "sparsegpt"):
        told = succeed("prune", path, tmp_path / f"{method}.onnx", "--method", method, "--calib", tmp_path / "m.npz",
                       "--tolerance", "1").out  # fmt: skip
        assert "1 of " in told


# --- engines ----------------------------------------------------------------------------------------------------------


def test_unknown_sizes_have_no_common_name(tmp_path: Path) -> None:
    """Paddle calls every size that it does not know "?"."""
    pytest.importorskip("tensorrt_rtx", reason="engines are built with TensorRT-RTX (make setup installs it)")
    path = image(tmp_path / "m.onnx", [N("Conv", ["x", "w"], ["y"])], {"w": W}, shape=["?", 4, "?", "?"])
    shapes = [f"--{bound}-shapes=x:1x4x48x192" for bound in ("min", "opt", "max")]
    succeed("build", path, tmp_path / "m.engine", *shapes)


@pytest.mark.parametrize("name", ["N", "b", "batch"])
def test_names_of_the_batch(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="engines are built with TensorRT-RTX (make setup installs it)")
    path = image(tmp_path / "m.onnx", [N("Conv", ["x", "w"], ["y"])], {"w": W}, shape=[name, 4, 6, 6])
    succeed("build", path, tmp_path / "m.engine")


def test_random_inputs_that_do_not_fit_name_the_way_out(tmp_path: Path) -> None:
    nodes = [N("Conv", ["x", "w"], ["c"]), N("Reshape", ["c", "to"], ["y"])]
    path = image(tmp_path / "m.onnx", nodes, {"w": W, "to": np.array([-1, 8, 6, 7])}, shape=["n", 4, "h", "w"])
    assert "--inputs" in refuse("validate", path, path)
