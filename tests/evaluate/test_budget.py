"""`quantize --budget`: what it writes keeps the budget by `accuracy`'s own figures, one layer less would not, and the
recipe makes it again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tokenizers
import yaml

pytest.importorskip("transformers")

from tests.calibration.texts import calibration_file
from tests.generation.models import exported
from tests.support import refuse, succeed


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama whose vocabulary are the words w0 to w96, and passages of them."""
    shutil.copytree(exported("llama", "concat").parent, tmp_path / "m")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "m/tokenizer.json"))
    generator = np.random.default_rng(0)
    rows = [[f"w{i}" for i in generator.integers(0, 97, 9)] for _ in range(40)]
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"context": " ".join(row[:-1]), "continuation": row[-1]}) + "\n" for row in rows)
    )
    return tmp_path / "m" / exported("llama", "concat").name


def loss(model: Path, other: Path, data: Path) -> float:
    """Per cent of perplexity a token."""
    found: dict[str, Any] = {}
    for path in (model, other):
        found[path.name] = json.loads(succeed("accuracy", path, "--dataset", data, "--json").out)["models"]["onnxrt"][
            "ppl_token"
        ]
    return 100 * (found[other.name] / found[model.name] - 1)


def test_the_budget_is_kept_with_as_few_layers_as_halving_finds(model: Path, tmp_path: Path) -> None:
    flags = ["--int4-awq", "--block-size", "16", "--calib", calibration_file(tmp_path)]
    data = tmp_path / "d.jsonl"
    succeed("quantize", model, model.with_name("all.onnx"), *flags)
    limit = loss(model, model.with_name("all.onnx"), data) / 2
    assert limit > 0.5, "the case shows nothing: nothing is lost"
    told = json.loads(
        succeed(
            "quantize",
            model,
            model.with_name("q.onnx"),
            *flags,
            "--budget",
            f"{limit:.4f}%",
            "--budget-data",
            data,
            "--json",
        ).out
    )
    losses = {trial["excluded"]: trial["loss"] for trial in told["trials"]}
    written = yaml.safe_load(Path(told["recipe"]).read_text())["passes"][0]["quantize"]["exclude_worst"]
    assert losses[written] <= limit < losses[written - 1] and losses[0] == pytest.approx(2 * limit, rel=1e-3)
    assert loss(model, model.with_name("q.onnx"), data) == pytest.approx(losses[written], abs=1e-3)
    assert not list(model.parent.glob("*trial*"))

    succeed("pipeline", told["recipe"], "--output", model.with_name("again.onnx"))
    first, again = (onnx.load(model.with_name(name)) for name in ("q.onnx", "again.onnx"))
    assert [t.SerializeToString() for t in first.graph.initializer] == [
        t.SerializeToString() for t in again.graph.initializer
    ]


def test_a_budget_that_is_kept_leaves_nothing_out(model: Path, tmp_path: Path) -> None:
    told = json.loads(
        succeed(
            "quantize", model, model.with_name("q.onnx"), "--fp8", "--calib", calibration_file(tmp_path), "--budget",
            "100pt", "--budget-data",
            tmp_path / "d.jsonl", "--budget-rows", "3", "--json",
        ).out
    )  # fmt: skip
    assert [trial["excluded"] for trial in told["trials"]] == [0]
    assert "exclude_worst" not in yaml.safe_load(Path(told["recipe"]).read_text())["passes"][0]["quantize"]


@pytest.mark.parametrize(("flags", "says"), [
    (["--fp8", "--budget", "half"], "0.5pt"), (["--fp8", "--budget", "1pt"], "--budget-data"),
    (["--fp8", "--budget-data", "d.jsonl"], "is for --budget"),
    (["--fp8", "--budget", "1pt", "--budget-data", "absent.jsonl"], "absent.jsonl"),
    (["--fp8", "--exclude-worst", "2", "--budget", "1pt", "--budget-data", "d.jsonl"], "leave one out"),
    (["--int4-rtn", "--budget", "1pt", "--budget-data", "d.jsonl"], "ranks layers"),
])  # fmt: skip
def test_refusals(flags: list[str], says: str, model: Path, tmp_path: Path) -> None:
    calib = [] if "--int4-rtn" in flags else ["--calib", calibration_file(tmp_path)]
    given = [str(tmp_path / flag) if flag.endswith("d.jsonl") else flag for flag in flags]
    assert says in refuse(
        "quantize", model, tmp_path / "q.onnx", *given, *calib, code=1 if "absent.jsonl" in flags else 2
    )
    assert not (tmp_path / "q.onnx").exists()
