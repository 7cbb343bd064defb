"""What an attack on `quantize`, `precision` and `prune` found: graphs that are no language models, damaged caches,
damaged data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("transformers")

from tests.calibration.texts import calibration_file
from tests.generation.models import exported
from tests.support import refuse, rel_l2, succeed

Array = np.ndarray[Any, Any]
GENERATOR = np.random.default_rng(3)
X = GENERATOR.standard_normal((256, 64)).astype(np.float32)


def weights(count: int, **changed: Array) -> dict[str, Array]:
    generator = np.random.default_rng(count)
    made = {f"w{i}": (generator.standard_normal((64, 64)) / 8).astype(np.float32) for i in range(count)}
    return made | changed


def chain(path: Path, arrays: dict[str, Array], *, relu: bool = True) -> Path:
    """MatMul after MatMul, Relu between; the last one's result is the graph's."""
    nodes, value = [], "x"
    for index, name in enumerate(arrays):
        last = index == len(arrays) - 1
        nodes.append(helper.make_node("MatMul", [value, name], ["y" if last else f"a{index}"], name=f"m{index}"))
        value = f"a{index}"
        if relu and not last:
            nodes.append(helper.make_node("Relu", [value], [f"r{index}"], name=f"r{index}"))
            value = f"r{index}"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", 64]) for name in "xy")
    graph = helper.make_graph(
        nodes, "g", [x], [y], [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    np.savez(path.with_suffix(".npz"), x=X)
    return path


def expected(arrays: dict[str, Array], x: Array) -> Array:
    names = list(arrays)
    for name in names:
        x = x @ arrays[name]
        x = x if name == names[-1] else np.maximum(x, 0)
    return x


def relative(told: str) -> float:
    return float(json.loads(told)["steps"][0]["measures"]["rel_l2"])


@pytest.mark.parametrize("flags", [
    "--fp8", "--fp8 --gptq", "--int8 --all-layers --calib-method mse", "--smoothquant 0.5 --all-layers", "--int4-awq",
    "--int4-awq --gptq",
    "--int8 --all-layers --per-token",
])  # fmt: skip
@pytest.mark.parametrize("head", [[], ["--lm-head"]])
@pytest.mark.parametrize("count", [1, 3])
def test_products_without_a_language_model_around(count: int, head: list[str], flags: str, tmp_path: Path) -> None:
    """Also FP8 behind a Relu, which ONNX Runtime's own rewrite would drop."""
    arrays = weights(count)
    source = chain(tmp_path / "m.onnx", arrays)
    told = succeed(
        "quantize",
        source,
        tmp_path / "q.onnx",
        *flags.split(),
        *head,
        "--calib",
        source.with_suffix(".npz"),
        "--inputs",
        source.with_suffix(".npz"),
        "--json",
    ).out
    assert 1e-4 < relative(told) < 0.35
    assert rel_l2(expected(arrays, X), X) > 0.5, "the case shows something"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_pruning_reaches_the_last_product(method: str, tmp_path: Path) -> None:
    succeed(
        "prune",
        exported("llama", "concat"),
        tmp_path / "p.onnx",
        "--method",
        method,
        "--lm-head",
        "--calib",
        calibration_file(tmp_path),
        "--no-check",
    )
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "p.onnx").graph.initializer}
    head = next(array for name, array in found.items() if "lm_head" in name)
    assert ((head.reshape(-1, 4) == 0).sum(axis=1) >= 2).all()


@pytest.mark.parametrize(
    "flags", ["--fp8", "--fp8 --gptq", "--int4-awq", "--int4-awq --lower ort", "--smoothquant 0.5 --all-layers"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["w0", "w2"])
def test_a_damaged_weight_is_named_whatever_the_scheme(which: str, value: float, flags: str, tmp_path: Path) -> None:
    arrays = weights(3)
    arrays[which][3, 5] = value
    source = chain(tmp_path / "m.onnx", arrays)
    told = refuse(
        "quantize", source, tmp_path / "q.onnx", *flags.split(), "--lm-head", "--calib", source.with_suffix(".npz")
    )
    assert "infinite or NaN" in told and (which in told or which == "w0") and not (tmp_path / "q.onnx").exists()


def test_a_cache_folder_keeps_what_is_not_ours(tmp_path: Path) -> None:
    calib = calibration_file(tmp_path)
    for name, note in (("a", "[1]"), ("b", "{not json"), ("c", json.dumps({"mine": 1}))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "calibration.json").write_text(note)
        told = refuse(
            "quantize",
            exported("llama", "concat"),
            tmp_path / "q.onnx",
            "--fp8",
            "--calib",
            calib,
            "--calib-cache",
            folder,
        )
        assert "--calib-cache" in told and (folder / "calibration.json").read_text() == note
    (tmp_path / "a/precious.txt").write_text("keep")
    assert "precious.txt" in refuse(
        "quantize",
        exported("llama", "concat"),
        tmp_path / "q.onnx",
        "--fp8",
        "--calib",
        calib,
        "--calib-cache",
        tmp_path / "a",
    )
    assert (tmp_path / "a/precious.txt").read_text() == "keep"


def test_a_damaged_part_of_the_cache_is_named(tmp_path: Path) -> None:
    arguments = (
        "quantize",
        exported("llama", "concat"),
        tmp_path / "q.onnx",
        "--fp8",
        "--gptq",
        "--calib",
        calibration_file(tmp_path),
        "--calib-cache",
    )
    folder = tmp_path / "cache"
    succeed(*arguments, folder)
    part = folder / "0001.npz"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    assert "0001.npz" in (told := refuse(*arguments, folder)) and "remove the folder" in told
    part.write_bytes(whole)
    next((folder / "weights").iterdir()).unlink()
    assert "remove the folder" in refuse(*arguments, folder)


def test_texts_end_where_the_model_does(tmp_path: Path) -> None:
    """The tiny Llama has 64 positions and the default is 512 tokens."""
    calib = calibration_file(tmp_path, [np.random.default_rng(0).integers(0, 97, 300).tolist()])
    succeed("quantize", exported("llama", "concat"), tmp_path / "q.onnx", "--fp8", "--calib", calib)


@pytest.mark.parametrize(("array", "says"), [
    (X.astype(np.float64), "float64 [256, 64]"), (X[0], "float32 [64]"), (X[:, :8], "float32 [256, 8]"),
    (X[:0], "is empty"),
    (np.where(X > 2, np.nan, X).astype(np.float32), "NaN numbers"), (X.astype(str), "<U"),
])  # fmt: skip
def test_arrays_that_are_not_the_input(array: Array, says: str, tmp_path: Path) -> None:
    source = chain(tmp_path / "m.onnx", weights(2))
    np.savez(tmp_path / "bad.npz", x=array)
    told = refuse("quantize", source, tmp_path / "q.onnx", "--fp8", "--calib", tmp_path / "bad.npz")
    assert "bad.npz" in told and "'x'" in told and says in told


@pytest.mark.parametrize(
    "flags", ["--kv-cache int8", "--kv-cache fp8", "--smoothquant 0.5 --per-token --per-channel --all-layers"]
)
def test_the_check_compares_what_is_computed_not_how_the_cache_is_stored(flags: str, tmp_path: Path) -> None:
    told = succeed(
        "quantize",
        exported("llama", "concat"),
        tmp_path / "q.onnx",
        *flags.split(),
        "--calib",
        calibration_file(tmp_path),
        "--json",
    ).out
    assert 1e-5 < relative(told) < 0.1


def test_an_fp8_cache_of_grouped_query_attention_is_written_unchecked(tmp_path: Path) -> None:
    """ONNX Runtime has its kernel on CUDA alone."""
    succeed(
        "quantize",
        exported("llama", "gqa"),
        tmp_path / "q.onnx",
        "--kv-cache",
        "fp8",
        "--calib",
        calibration_file(tmp_path),
    )
    assert not list(tmp_path.glob("*.crash"))


@pytest.mark.parametrize(("flags", "says"), [
    ("--fp8 --int8", "leave one out"), ("--qformat fp8 --kv-cache int8 --kv-cache-dtype fp8", "contradict each other"),
])  # fmt: skip
def test_options_that_contradict_each_other(flags: str, says: str, tmp_path: Path) -> None:
    told = refuse(
        "quantize",
        exported("llama", "concat"),
        tmp_path / "q.onnx",
        *flags.split(),
        "--calib",
        calibration_file(tmp_path),
        code=2,
    )
    assert says in told


@pytest.mark.parametrize(
    ("row", "says"), [([True, False], "neither text nor a list of tokens"), ([1.5], "[1.5]"), ([], "[]")]
)
def test_rows_that_are_no_tokens(row: list[Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": row}))
    assert says in refuse(
        "quantize", exported("llama", "concat"), tmp_path / "q.onnx", "--fp8", "--calib", tmp_path / "c.jsonl", code=2
    )


def test_a_weight_beyond_fp16_is_an_error(tmp_path: Path) -> None:
    source = chain(tmp_path / "m.onnx", weights(2, w1=np.full((64, 64), 1e6, np.float32)))
    assert "w1" in refuse("precision", source, tmp_path / "q.onnx")


def test_a_graph_inside_a_node_is_named(tmp_path: Path) -> None:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    branches = {
        key: helper.make_graph(
            [helper.make_node("MatMul", ["x", weight], ["z"])],
            key,
            [],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        )
        for key, weight in (("then_branch", "w0"), ("else_branch", "w1"))
    }
    nodes = [helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["c"], to=TensorProto.BOOL),
             helper.make_node("If", ["c"], ["y"], name="choice", **branches)]  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", 64])
    nodes.append(helper.make_node("MatMul", ["x", "w0"], ["o"]))
    o = helper.make_tensor_value_info("o", TensorProto.FLOAT, ["tokens", 64])
    graph = helper.make_graph(
        nodes, "g", [x], [y, o], [numpy_helper.from_array(array, name) for name, array in weights(2).items()]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=X)
    told = refuse(
        "quantize", tmp_path / "m.onnx", tmp_path / "q.onnx", "--fp8", "--lm-head", "--calib", tmp_path / "c.npz"
    )
    assert "'choice' (If)" in told


def test_a_weight_without_elements_is_left(tmp_path: Path) -> None:
    arrays = weights(2)
    source = chain(tmp_path / "m.onnx", arrays)
    model = onnx.load(source)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((0, 64), np.float32), "none"))
    model.graph.node.append(helper.make_node("MatMul", ["e", "none"], ["o"], name="empty"))
    model.graph.input.append(helper.make_tensor_value_info("e", TensorProto.FLOAT, ["tokens", 0]))
    model.graph.output.append(helper.make_tensor_value_info("o", TensorProto.FLOAT, ["tokens", 64]))
    onnx.save(model, source)
    told = succeed("prune", source, tmp_path / "p.onnx", "--lm-head", "--no-check", "--json").out
    assert [
        row["reason"] if "reason" in row else row.get("left")
        for row in json.loads(told)["steps"][0]["result"]["table"]
        if row["weight"] == "none"
    ]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("flags", "limit"), [
    ("--fp8", 0.06), ("--fp8 --gptq", 0.06), ("--smoothquant 0.5 --all-layers", 0.05), ("--int4-awq", 0.2),
    ("--int4-awq --gptq", 0.2),
])  # fmt: skip
def test_values_whose_squares_exceed_fp32(flags: str, limit: float, tmp_path: Path) -> None:
    """Weights and activations of 1e25: norms and errors must not overflow, and no scale may become 0."""
    arrays = weights(2)
    arrays["w0"], arrays["w1"] = arrays["w0"] * np.float32(1e25), arrays["w1"] * np.float32(1e-25)
    source = chain(tmp_path / "m.onnx", arrays)
    data = source.with_suffix(".npz")
    told = succeed(
        "quantize",
        source,
        tmp_path / "q.onnx",
        *flags.split(),
        "--lm-head",
        "--calib",
        data,
        "--inputs",
        data,
        "--json",
    ).out
    assert 1e-4 < relative(told) < limit
