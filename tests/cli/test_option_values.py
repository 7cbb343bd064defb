"""Values of options that a new user gave in a trial: each is refused in one line, with the name of what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import fixture_path, linear, normal, refuse


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return linear(tmp_path / "m.onnx")


WRONG: dict[str, tuple[list[str], str]] = {
    "a required option of a path": (["summarize", "M"], "--dataset"),
    "a required option of a text": (["accuracy", "M"], "--dataset"),
    "an empty path": (["validate", "", "M"], "the path is empty"),
    "an empty path of an option": (["validate", "M", "M", "--save-inputs", ""], "the path is empty"),
    "a negative seed": (["validate", "M", "M", "--seed", "-1"], "--seed"),
    "sizes beside a file of inputs": (
        ["validate", "M", "M", "--inputs", "x.npz", "--batch", "3"],
        "--batch is of random",
    ),
    "more threads than memory": (["run", "M", "--prompt", "a", "--threads", "100000"], "threads is 100000"),
    "a stride of passages": (["accuracy", "M", "--dataset", "x.jsonl", "--stride", "5"], "--stride is for wikitext"),
    "an engine called .onnx": (["build", "M", "-o", "n.onnx"], "name it .engine"),
    "two engines": (["build", "M", "x.engine", "-o", "y.engine"], "ENGINE is x.engine and -o is y.engine"),
    "options of an engine": (["validate", "x.engine", "--seed", "3"], "leave the options out"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_command_line_that_cannot_be_meant_is_code_2(case: str, graph: Path) -> None:
    words, names = WRONG[case]
    assert names in refuse(*(str(graph) if word == "M" else word for word in words), code=2)


def test_a_comparison_that_fails_says_so_on_stderr(graph: Path, tmp_path: Path) -> None:
    other = linear(tmp_path / "other.onnx", 1.5 * normal(64, 128))
    line = refuse("validate", graph, other)
    assert "other.onnx" in line and "1 of 1 comparisons failed" in line and "'y'" in line and "--per-layer" in line
    recipe = tmp_path / "r.yaml"
    recipe.write_text("input: m.onnx\noutput: o.onnx\npasses: [cleanup]\nvalidate: {against: other.onnx}\n")
    assert "comparisons failed" in refuse("pipeline", recipe)


@pytest.mark.parametrize(("check", "says", "code"), [
    ("{against: m.onnx, tolerance: .nan}", "validate.tolerance", 2),
    ("{against: m.onnx, tolerance: -1}", "validate.tolerance", 2),
    ("{against: absent.onnx}", "absent.onnx: no such file", 1),
])  # fmt: skip
def test_a_recipe_is_checked_before_anything_is_written(
    check: str, says: str, code: int, graph: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"input: m.onnx\noutput: o.onnx\npasses: [cleanup]\nvalidate: {check}\n")
    assert says in refuse("pipeline", recipe, code=code)
    assert not (tmp_path / "o.onnx").exists()


def test_what_a_command_cannot_read_is_said_with_the_next_step(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is a folder; name a model" in refuse("validate", tmp_path / "empty", graph)
    assert "no Hugging Face folder" in refuse("run", tmp_path / "empty", "--prompt", "x")
    te = fixture_path("te_gpt_fp8_ds_dyn")
    assert "run `onnxtools convert` first" in refuse("benchmark", te, "--iterations", "1", "--runtime", "onnxrt")
