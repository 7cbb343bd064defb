"""`prune`: the mask of a stable argsort, on the axis that is summed, for every dtype and storage order."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.conftest import Make
from tests.support import (
    FLOAT,
    FP8,
    INT64,
    Array,
    Case,
    Session,
    e4m3,
    external,
    info,
    initializers,
    linear,
    normal,
    refuse,
    stored,
    succeed,
    write,
)


def reference(weight: Array, axis: int) -> Array:
    """Zero the two smallest magnitudes of every four along `axis`; of equal ones the lower index goes (stable
    argsort).
    """
    moved = np.moveaxis(weight.copy(), axis, -1)
    groups = np.ascontiguousarray(moved).reshape(-1, 4)
    order = np.argsort(np.abs(groups.astype(np.float64)), axis=1, kind="stable")
    np.put_along_axis(groups, order[:, :2], np.zeros((), weight.dtype), axis=1)
    return np.moveaxis(groups.reshape(moved.shape), -1, axis)


def same(path: Path, name: str, expected: Array) -> bool:
    return initializers(path)[name].tobytes() == np.ascontiguousarray(expected).tobytes()


def prune(path: Path, *flags: str) -> Path:
    out = path.with_name("out.onnx")
    succeed("prune", path, out, "--no-check", *flags)
    return out


PRODUCTS = {
    "MatMul right": (helper.make_node("MatMul", ["x", "w"], ["y"]), [4, 64], (64, 32), [4, 32], 0),
    "MatMul left": (helper.make_node("MatMul", ["w", "x"], ["y"]), [64, 4], (32, 64), [32, 4], 1),
    "MatMul batched": (helper.make_node("MatMul", ["x", "w"], ["y"]), [3, 4, 64], (3, 64, 32), [3, 4, 32], 1),
    "Gemm": (helper.make_node("Gemm", ["x", "w"], ["y"]), [4, 64], (64, 32), [4, 32], 0),
    "Gemm transB": (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), [4, 64], (32, 64), [4, 32], 1),
    "Gemm transA": (helper.make_node("Gemm", ["w", "x"], ["y"], transA=1), [64, 4], (64, 32), [32, 4], 0),
    "Conv": (helper.make_node("Conv", ["x", "w"], ["y"]), [1, 8, 5, 5], (16, 8, 3, 3), [1, 16, 3, 3], 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("outside", [False, True], ids=["inline", "external"])
def test_the_summed_axis_is_pruned(kind: str, outside: bool, tmp_path: Path) -> None:
    node, given, shape, made, axis = PRODUCTS[kind]
    weight = normal(*shape)
    path = write(tmp_path / "in.onnx", [node], [info("x", given)], [info("y", made)], stored(w=weight))
    if outside:
        external(path)
    assert same(prune(path), "w", reference(weight, axis))


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, FP8, ml_dtypes.float8_e5m2], ids=lambda d: np.dtype(d).name
)
@pytest.mark.parametrize("transposed", [0, 1])
def test_every_type(dtype: type, transposed: int, tmp_path: Path) -> None:
    """Many equal magnitudes and both zeros, so that ties decide."""
    numbers = np.random.default_rng(0).integers(-3, 4, (64, 64)).astype(np.float32) * np.random.default_rng(1).choice(
        [-0.5, 0.5], (64, 64)
    )
    weight = numbers.astype(dtype)
    tensor = helper.make_tensor(
        "w", helper.np_dtype_to_tensor_dtype(weight.dtype), weight.shape, weight.tobytes(), raw=True
    )
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=FLOAT),
        helper.make_node("Gemm", ["x", "wide"], ["y"], transB=transposed),
    ]
    path = write(tmp_path / "in.onnx", nodes, [info("x", [4, 64])], [info("y", [4, 64])], [tensor], opset=19)
    assert same(prune(path), "w", reference(weight, transposed))


def test_a_transpose_between_weight_and_product_counts(tmp_path: Path) -> None:
    nodes = [helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]), helper.make_node("MatMul", ["x", "wt"], ["y"])]
    weight = normal(32, 64)
    path = write(tmp_path / "in.onnx", nodes, [info("x", [4, 64])], [info("y", [4, 32])], stored(w=weight))
    assert same(prune(path), "w", reference(weight, 1))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_of_many_slabs_is_pruned_as_one(axis: int, tmp_path: Path) -> None:
    """36 MB, read in slabs of 8 MB whose bounds fall inside no group."""
    weight = normal(3000, 3000)
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=axis)
    path = external(
        write(tmp_path / "in.onnx", [node], [info("x", [1, 3000])], [info("y", [1, 3000])], stored(w=weight))
    )
    assert same(prune(path), "w", reference(weight, axis))


def test_fp8_weights_are_pruned_by_their_stored_magnitude(converted: Make, tmp_path: Path) -> None:
    case = Case("te_linear_fp8_ds")
    source = converted(case.name)
    weight = next(a for a in initializers(source).values() if a.dtype == FP8 and a.size > 1)
    succeed("prune", source, tmp_path / "out.onnx")
    pruned = next(a for a in initializers(tmp_path / "out.onnx").values() if a.dtype == FP8 and a.size > 1)
    assert pruned.tobytes() == reference(weight, 1).tobytes()
    assert Session(tmp_path / "out.onnx")(case.feeds)["y"].shape == case.expected.shape


def gpt(path: Path, *, tied: bool = False) -> Path:
    """table -> proj -> lm_head; the head reads the table where it is tied."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h"], "embed"),
        helper.make_node("MatMul", ["h", "w"], ["p"], "proj"),
        *([helper.make_node("Transpose", ["table"], ["head"], perm=[1, 0])] if tied else []),
        helper.make_node("MatMul", ["p", "head"], ["logits"], "lm_head"),
    ]  # fmt: skip
    arrays = {"table": normal(32, 16), "w": normal(16, 16, seed=1)} | ({} if tied else {"head": normal(16, 32, seed=2)})
    return write(path, nodes, [info("ids", ["b", "s"], INT64)], [info("logits", ["b", "s", 32])], stored(**arrays))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_stay_unless_asked(tied: bool, tmp_path: Path) -> None:
    path = gpt(tmp_path / "in.onnx", tied=tied)
    before, after = initializers(path), initializers(prune(path))
    assert np.array_equal(after["w"], reference(before["w"], 0))
    assert all(np.array_equal(after[name], before[name]) for name in before if name != "w")


def test_the_head_on_request(tmp_path: Path) -> None:
    path = gpt(tmp_path / "in.onnx")
    assert same(prune(path, "--lm-head"), "head", reference(initializers(path)["head"], 0))
    both = prune(gpt(tmp_path / "tied.onnx", tied=True), "--lm-head", "--embeddings")
    assert same(both, "table", reference(normal(32, 16), 1))


@pytest.mark.parametrize(
    ("flags", "pruned"),
    [
        (["--include", "w"], {"w"}),
        (["--include", "lm_*", "--lm-head"], {"head"}),
    ],
)
def test_patterns(flags: list[str], pruned: set[str], tmp_path: Path) -> None:
    path = gpt(tmp_path / "in.onnx")
    before, after = initializers(path), initializers(prune(path, *flags))
    assert {name for name in before if not np.array_equal(before[name], after[name])} == pruned


@pytest.mark.parametrize("flags", [["--exclude", "proj"], ["--include", "*", "--exclude", "w"]])
def test_patterns_that_leave_nothing_are_an_error(flags: list[str], tmp_path: Path) -> None:
    told = refuse("prune", gpt(tmp_path / "in.onnx"), tmp_path / "out.onnx", *flags)
    assert "nothing is pruned" in told and "1 left: excluded" in told
    assert not (tmp_path / "out.onnx").exists()


def test_an_axis_that_is_no_multiple_of_four_is_reported(tmp_path: Path) -> None:
    path = linear(tmp_path / "in.onnx", normal(62, 8))
    assert "K = 62 is no multiple of 4" in refuse("prune", path, tmp_path / "out.onnx")


def test_a_weight_summed_along_two_axes_is_left_and_said(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("Gemm", ["a", "w"], ["y"], "second", transB=1),
    ]
    path = write(tmp_path / "in.onnx", nodes, [info("x", [4, 16])], [info("y", [4, 16])], stored(w=normal(16, 16)))
    assert "summed along two different axes" in refuse("prune", path, tmp_path / "out.onnx")


def test_it_says_what_pruning_costs(tmp_path: Path) -> None:
    result = succeed("prune", linear(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    assert "speed studies" in result.out and "1 of 1" in result.out


def test_the_input_data_file_is_untouched(tmp_path: Path) -> None:
    path = external(linear(tmp_path / "in.onnx"))
    before = (tmp_path / "weights.bin").read_bytes()
    prune(path)
    assert (tmp_path / "weights.bin").read_bytes() == before
    assert same(path, "w", normal(64, 128)) and same(tmp_path / "out.onnx", "w", reference(normal(64, 128), 0))


def test_bf16_and_unsupported_types_are_told_apart(tmp_path: Path) -> None:
    weight = np.arange(64 * 8).reshape(64, 8).astype(np.float64)
    path = write(
        tmp_path / "in.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [info("x", [4, 64], TensorProto.DOUBLE)],
        [info("y", [4, 8], TensorProto.DOUBLE)],
        stored(w=weight),
    )
    assert "DOUBLE cannot be pruned" in refuse("prune", path, tmp_path / "out.onnx")


def test_a_weight_folded_in_the_same_run_is_pruned_after_rounding(tmp_path: Path) -> None:
    """convert and prune in one recipe: the pruned weight is the FP8 one, before anything was on disk."""
    case = Case("te_linear_fp8_ds")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"input: {case.path}\noutput: out.onnx\npasses: [convert, prune]\n")
    succeed("pipeline", recipe)
    weight = next(a for a in initializers(case.path).values() if a.ndim == 2)
    scale = next(a for a in initializers(tmp_path / "out.onnx").values() if a.dtype == np.float32 and a.size == 1)
    found = next(a for a in initializers(tmp_path / "out.onnx").values() if a.dtype == FP8 and a.size > 1)
    assert scale.size and np.count_nonzero(found.astype(np.float32).reshape(-1, 4), axis=1).max() <= 2
    assert found.shape == weight.shape and e4m3(weight).shape == found.shape
