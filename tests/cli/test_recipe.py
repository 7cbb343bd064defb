"""Recipes: the chain declared in YAML, and every way to write one wrongly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onnxtools.base.errors import UsageError
from onnxtools.cli.recipe import read_recipe
from onnxtools.passes.convert import Convert
from onnxtools.passes.kv_cache.add_kv_cache import AddKvCache
from tests.support import Case, Session, decode, linear, max_abs, opsets, refuse, run, succeed

HEAD = "input: in.onnx\noutput: out.onnx\n"


def recipe(folder: Path, text: str) -> Path:
    (folder / "r.yaml").write_text(text)
    return folder / "r.yaml"


def test_a_recipe_is_read(tmp_path: Path) -> None:
    plan = read_recipe(
        recipe(
            tmp_path,
            HEAD
            + "passes:\n - convert: {opset: 21, fold-weights: false}\n - add-kv-cache\nvalidate: {against: a.onnx, "
            "tolerance: 1}\n",
        )
    )
    assert (
        plan.input == tmp_path / "in.onnx"
        and plan.output == tmp_path / "out.onnx"
        and plan.against == tmp_path / "a.onnx"
    )
    assert (
        plan.passes == [Convert(opset=21, fold_weights=False), AddKvCache()]
        and plan.tolerance == 1
        and plan.engine is None
    )


def test_the_chain_runs_and_is_validated(tmp_path: Path) -> None:
    case = Case("rms_swiglu_gqa_rope")
    text = (
        f"input: {case.path}\noutput: kv.onnx\npasses: [convert, {{add-kv-cache: {{policy: new}}}}]\nvalidate: "
        f"{{against: {case.path}}}\n"
    )
    result = succeed("pipeline", recipe(tmp_path, text))
    assert "prefill" in result.out and "FAIL" not in result.out
    assert max_abs(decode(Session(tmp_path / "kv.onnx"), case.feeds, [3, *[1] * 9]), case.expected) <= 1e-5


def test_a_failed_validation_is_exit_code_1(tmp_path: Path) -> None:
    linear(tmp_path / "in.onnx")
    result = run("pipeline", recipe(tmp_path, HEAD + "passes: [prune]\nvalidate: {against: in.onnx}\n"))
    assert result.code == 1 and "FAIL" in result.out


def test_input_and_output_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    linear(tmp_path / "other.onnx")
    succeed(
        "pipeline",
        recipe(tmp_path, "passes: [convert]\n"),
        "--input",
        tmp_path / "other.onnx",
        "--output",
        tmp_path / "made.onnx",
    )
    assert opsets(tmp_path / "made.onnx") == {"": 19}


BAD = {
    "not yaml": "input: [",
    "a list": "- convert",
    "a word": "convert",
    "empty": "",
    "no input": "output: out.onnx\npasses: [convert]",
    "no output": "input: in.onnx\npasses: [convert]",
    "unknown key": HEAD + "steps: [convert]",
    "unknown pass": HEAD + "passes: [convrt]",
    "unknown option": HEAD + "passes: [{convert: {colour: 1}}]",
    "wrong type": HEAD + "passes: [{convert: {opset: high}}]",
    "wrong value": HEAD + "passes: [{convert: {opset: 99}}]",
    "wrong choice": HEAD + "passes: [{add-kv-cache: {layout: x}}]",
    "passes no list": HEAD + "passes: convert",
    "two in one": HEAD + "passes: [{convert: {}, prune: {}}]",
    "number as pass": HEAD + "passes: [3]",
    "options no mapping": HEAD + "passes: [{convert: 19}]",
    "validate unknown": HEAD + "passes: []\nvalidate: {with: a.onnx}",
    "validate word": HEAD + "passes: []\nvalidate: a.onnx",
    "tolerance text": HEAD + "passes: []\nvalidate: {against: in.onnx, tolerance: low}",
    "build no engine": HEAD + "passes: []\nbuild: {fp8: true}",
    "build unknown": HEAD + "passes: []\nbuild: {engine: e, colour: 1}",
    "input number": "input: 5\noutput: o.onnx\npasses: []",
    "bytes": "\x00\x01",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_wrong_recipe_is_a_usage_error(kind: str, tmp_path: Path) -> None:
    linear(tmp_path / "in.onnx")
    path = recipe(tmp_path, BAD[kind])
    refuse("pipeline", path, code=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "r.yaml"]


def test_an_absent_recipe_is_named(tmp_path: Path) -> None:
    assert "absent.yaml" in refuse("pipeline", tmp_path / "absent.yaml")


@pytest.mark.parametrize("output", ["out.pb", "out"])
def test_an_output_that_is_not_onnx_is_a_usage_error(output: str, tmp_path: Path) -> None:
    linear(tmp_path / "in.onnx")
    refuse("pipeline", recipe(tmp_path, f"input: in.onnx\noutput: {output}\npasses: [convert]\n"), code=2)
    assert not (tmp_path / output).exists()


@pytest.mark.parametrize(("build", "says"), [
    ("{engine: e.engine, compute_capability: 8.9}", "quote it, as '8.9'"),
    ("{engine: e.engine, sparsity: true}", "disable, enable, force; YAML reads"),
])  # fmt: skip
def test_what_yaml_reads_as_something_else_is_explained(build: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"input: a.onnx\noutput: b.onnx\npasses: []\nbuild: {build}\n")
    with pytest.raises(UsageError, match=re.escape(says)):
        read_recipe(tmp_path / "r.yaml")
