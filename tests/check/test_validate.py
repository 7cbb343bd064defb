"""`validate`: right models pass, and every way to be wrong fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxtools.check.runner import Runner
from onnxtools.check.validate import Difference, split_points, validate
from onnxtools.ir.model import Model
from tests.conftest import Make
from tests.support import (
    E4M3,
    FP8,
    HALF_PRECISION,
    MX,
    STYLE,
    TE,
    Array,
    Case,
    Session,
    info,
    linear,
    normal,
    refuse,
    rel_l2,
    run,
    stored,
    succeed,
    write,
)


def judged(*args: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("validate", *args, "--json").out)
    return found


def edited(path: Path, target: Path, change: Any) -> Path:
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, target)
    return target


# --- the measure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_difference_follows_its_definition(dtype: Any) -> None:
    a, b = normal(5, 7).astype(dtype), normal(5, 7, seed=1).astype(dtype)
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    found = Difference.of(a, b)
    assert found.max_abs == pytest.approx(np.abs(x - y).max())
    assert found.rel_l2 == pytest.approx(np.sqrt(((x - y) ** 2).sum()) / np.sqrt((x**2).sum()))
    assert found.cosine == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)))


@pytest.mark.parametrize(
    ("a", "b", "infinite"),
    [([1, np.nan], [1, 2], True), ([1, 2], [1, np.nan], True), ([1, np.inf], [1, 2], True), ([0, 0], [0, 1], True),
        ([0, 0], [0, 0], False), ([], [], False),
     ([1, np.inf], [1, -np.inf], True), ([1, np.nan], [1, np.inf], True)],
)  # fmt: skip
def test_what_is_not_finite_never_passes_by_accident(a: list[float], b: list[float], infinite: bool) -> None:
    found = Difference.of(np.array(a), np.array(b))
    assert (found.rel_l2 == float("inf")) == infinite


@pytest.mark.parametrize("sequence", [1, 2, 3, 4, 7, 16])
def test_split_points_cover_the_sequence(sequence: int) -> None:
    ways = split_points(sequence)
    assert ways and all(sum(way) == sequence and min(way) > 0 for way in ways)
    assert [1] * sequence in ways and [sequence] in ways and len({tuple(way) for way in ways}) == len(ways)


# --- running exports as they are --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name in (*TE, *STYLE) if name not in MX], indirect=True)
def test_the_runner_gives_the_exporters_numbers_before_any_pass(case: Case) -> None:
    """What a pass is judged against must itself be right: the raw export, `trt` operators and all."""
    result = next(iter(Runner(Model.load(case.path))(case.feeds).values()))
    assert rel_l2(result, case.expected) <= (0.1 if case.name in HALF_PRECISION else 1e-6)


def test_the_runner_computes_mxfp8(tmp_path: Path) -> None:
    for case in map(Case, MX):
        assert rel_l2(next(iter(Runner(Model.load(case.path))(case.feeds).values())), case.expected) <= 1e-5, case.name


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    ["te_gpt_fp8_ds_dyn", "rms_swiglu_gqa_rope", "padding_mask", "gpt_static_arange", "gpt_fp16_fp8", "gpt_bf16_fp8"],
    indirect=True,
)
def test_a_cached_model_is_decoded_at_several_splits(case: Case, cached: Make) -> None:
    result = judged(case.path, cached(case.name))
    assert result["passed"] and len(result["rows"]) >= 4
    assert {"prefill", f"steps 1 x {16 if 'static' not in case.name else 12}"} <= {
        row["check"] for row in result["rows"]
    }


@pytest.mark.parametrize(
    "flags", [["--policy", "new", "--layout", "sbnh", "--naming", "nemo"], ["--layout", "sbnh"]], ids=" ".join
)
def test_every_cache_layout_is_understood(flags: list[str], cached: Make) -> None:
    assert judged(Case("rms_swiglu_gqa_rope").path, cached("rms_swiglu_gqa_rope", *flags))["passed"]


def test_inputs_from_a_file(cached: Make, tmp_path: Path) -> None:
    case = Case("rms_swiglu_gqa_rope")
    np.savez(tmp_path / "in.npz", **case.feeds)
    from polygraphy.json import save_json

    save_json([case.feeds], str(tmp_path / "in.json"))
    for name in ("in.npz", "in.json"):
        result = judged(case.path, cached(case.name), "--inputs", tmp_path / name)
        assert result["passed"] and "steps 1 x 12" in {row["check"] for row in result["rows"]}


def swap_outputs(proto: onnx.ModelProto) -> None:
    """Keys come out under the name of values: a prefill is right, every later step is wrong."""
    a, b = (next(v for v in proto.graph.output if v.name == f"present.0.{kind}") for kind in ("key", "value"))
    for node in proto.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = {"present.0.key": "present.0.value", "present.0.value": "present.0.key"}.get(name, name)
    assert a.type == b.type


def test_a_cache_that_only_prefills_right_fails(cached: Make, tmp_path: Path) -> None:
    case = Case("rms_swiglu_gqa_rope")
    bad = edited(cached(case.name), tmp_path / "bad.onnx", swap_outputs)
    result = judged(case.path, bad)
    passed = {row["check"]: row["passed"] for row in result["rows"]}
    whole = [name for name in passed if name.endswith("prefill")]
    assert (
        "prefill" in whole
        and all(passed.pop(name) for name in whole)
        and not any(passed.values())
        and not result["passed"]
    )
    assert run("validate", case.path, bad).code == 1


def nudge(proto: onnx.ModelProto, factor: float = 1.001, index: int = 0) -> None:
    found = [tensor for tensor in proto.graph.initializer if len(tensor.dims) >= 2 and tensor.data_type != E4M3]
    tensor = found[index]
    tensor.CopyFrom(
        numpy_helper.from_array((numpy_helper.to_array(tensor) * np.float32(factor)).astype(np.float32), tensor.name)
    )


def test_a_weight_that_moved_fails(tmp_path: Path) -> None:
    path = linear(tmp_path / "in.onnx")
    result = judged(path, edited(path, tmp_path / "bad.onnx", nudge))
    assert not result["passed"] and result["rows"][0]["rel_l2"] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(("tolerance", "code"), [("0.01", 0), ("0.0001", 1)])
def test_the_tolerance_decides(tolerance: str, code: int, tmp_path: Path) -> None:
    path = linear(tmp_path / "in.onnx")
    assert run("validate", path, edited(path, tmp_path / "bad.onnx", nudge), "--tolerance", tolerance).code == code


def chain(path: Path, factor: float) -> Path:
    """Three products; the second weight is scaled."""
    weights = {"a": normal(8, 8), "b": normal(8, 8, seed=1) * np.float32(factor), "c": normal(8, 8, seed=2)}
    nodes = [
        helper.make_node("MatMul", [s, w], [r], f"mm_{w}")
        for s, w, r in (("x", "a", "h1"), ("h1", "b", "h2"), ("h2", "c", "y"))
    ]
    return write(path, nodes, [info("x", [4, 8])], [info("y", [4, 8])], stored(**weights))


def test_per_layer_names_the_first_value_that_differs(tmp_path: Path) -> None:
    a, b = chain(tmp_path / "a.onnx", 1), chain(tmp_path / "b.onnx", 1.01)
    found = judged(a, b, "--per-layer")["first_divergence"]
    assert (found["value"], found["node"], found["op_type"]) == ("h2", "mm_b", "MatMul")
    assert found["difference"]["rel_l2"] == pytest.approx(0.01, rel=1e-2)
    assert "mm_b" in run("validate", a, b, "--per-layer").out


def test_per_layer_finds_nothing_where_nothing_differs(tmp_path: Path) -> None:
    a = chain(tmp_path / "a.onnx", 1)
    assert judged(a, a, "--per-layer")["first_divergence"] is None


def test_per_layer_across_convert_and_cache(cached: Make, converted: Make, tmp_path: Path) -> None:
    """Names survive the passes well enough to point at the layer."""
    bad = edited(converted("te_gpt_none_dyn"), tmp_path / "bad.onnx", lambda proto: nudge(proto, 1.1, 3))
    found = judged(Case("te_gpt_none_dyn").path, bad, "--per-layer")["first_divergence"]
    assert found is not None and found["compared"] > 1


def test_an_output_that_is_missing_is_said(tmp_path: Path) -> None:
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["z"])]
    both = write(tmp_path / "a.onnx", nodes, [info("x", [4])], [info("y", [4]), info("z", [4])])
    one = write(tmp_path / "b.onnx", nodes[:1], [info("x", [4])], [info("y", [4])])
    result = judged(both, one)
    assert not result["passed"] or "z" in " ".join(result["notes"])


def test_models_without_a_shared_output_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["y"])], [info("x", [4])], [info("y", [4])])
    b = write(tmp_path / "b.onnx", [helper.make_node("Neg", ["x"], ["z"])], [info("x", [4])], [info("z", [4])])
    assert "share no output" in refuse("validate", a, b)


def test_outputs_of_different_shapes_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["y"])], [info("x", [4])], [info("y", [4])])
    b = write(tmp_path / "b.onnx", [helper.make_node("ReduceMax", ["x"], ["y"])], [info("x", [4])], [info("y", [1])])
    assert "shape" in refuse("validate", a, b)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["in.json", "in.npz"])
def test_unreadable_inputs_are_named(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    path = linear(tmp_path / "in.onnx")
    assert name in refuse("validate", path, path, "--inputs", tmp_path / name)


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", other=normal(4, 64))
    path = linear(tmp_path / "in.onnx")
    assert "'x'" in refuse("validate", path, path, "--inputs", tmp_path / "in.npz")


def test_random_inputs_depend_on_the_seed_alone(tmp_path: Path) -> None:
    a, b = chain(tmp_path / "a.onnx", 1), chain(tmp_path / "b.onnx", 1.01)
    one, again, other = (judged(a, b, "--seed", seed)["rows"] for seed in ("1", "1", "2"))
    assert one == again != other


def test_an_fp8_output_is_compared_as_numbers(tmp_path: Path) -> None:
    zero = helper.make_tensor("z", E4M3, [], [0.0])
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])]
    paths = [
        write(
            tmp_path / f"{s}.onnx",
            nodes,
            [info("x", [64])],
            [info("y", [64], E4M3)],
            [*stored(s=np.float32(s)), zero],
            opset=19,
        )
        for s in (1, 2)
    ]
    x: Array = normal(64)
    assert Session(paths[0])({"x": x})["y"].dtype == FP8
    assert judged(paths[0], paths[0])["passed"] and not judged(*paths)["passed"]


def test_good_models_are_exit_code_0(converted: Make) -> None:
    case = Case("te_linear_fp8_ds")
    assert "pass" in succeed("validate", case.path, converted(case.name), "--inputs", case.path.with_suffix(".npz")).out


def test_infinities_that_both_have_are_no_damage(tmp_path: Path) -> None:
    """Logits of a padded vocabulary."""
    bias = np.zeros(8, np.float32)
    bias[5:] = -np.inf
    nodes = [helper.make_node("Add", ["x", "b"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, [info("x", [2, 8])], [info("y", [2, 8])], stored(b=bias))
    assert judged(path, path)["passed"]


def test_a_model_whose_steps_are_not_its_full_run_is_still_itself(tmp_path: Path) -> None:
    """Without a causal mask a step sees less than the full run does: a copy passes, a changed one fails, and it is
    said.
    """
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Concat", ["past_key_values.0.key", "x"], ["present.0.key"], axis=1),
        helper.make_node("Transpose", ["present.0.key"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "t"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"]), helper.make_node("MatMul", ["p", "present.0.key"], ["logits"]),
    ]  # fmt: skip
    inputs = [
        info("input_ids", ["batch", "sequence"], onnx.TensorProto.INT64),
        info("past_key_values.0.key", ["batch", "past_sequence", 8]),
    ]
    outputs = [info("logits", ["batch", "sequence", 8]), info("present.0.key", ["batch", "total_sequence", 8])]
    paths = []
    for name, scale in (("a", 1.0), ("b", 1.0), ("c", 1.01)):
        table = stored(table=np.float32(scale) * normal(16, 8).astype(np.float32))
        paths.append(write(tmp_path / f"{name}.onnx", nodes, inputs, outputs, table, opset=21))
    same, other = (validate(Model.load(paths[0]), Model.load(path)) for path in paths[1:])
    assert same.passed and any("its attention is not causal?" in note for note in same.notes)
    assert not other.passed
