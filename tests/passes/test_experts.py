"""Passes on a mixture of experts: the router keeps its precision, and experts without calibration data are said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("transformers", reason="the checkpoints are written by transformers (make setup installs it)")

from onnxtools.analysis.experts import mixtures
from onnxtools.ir.model import Model
from tests.exporter import hf
from tests.support import initializers, run, succeed


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 experts, so that the router is large enough to be quantized; two tokens choose four of them at most."""
    folder = tmp_path_factory.mktemp("mixtral")
    hf.make("mixtral", folder / "hf", {"num_local_experts": 17, "num_hidden_layers": 1, "intermediate_size": 96})
    succeed("export", folder / "hf", "-o", folder / "m.onnx")
    (folder / "texts.jsonl").write_text(json.dumps({"text": [5, 6]}))
    return folder


def readers(path: Path, weight: str) -> list[str]:
    graph = onnx.load(path, load_external_data=False).graph
    return [node.op_type for node in graph.node if weight in node.input]


QUANTIZED = {
    "fp8": ["--fp8"], "fp8 gptq": ["--fp8", "--gptq"], "fp8 mse": ["--fp8", "--calib-method", "mse"],
    "int8": ["--int8", "--all-layers"], "awq": ["--int4-awq", "--block-size", "32"],
    "awq gptq": ["--int4-awq", "--gptq", "--block-size", "32"],
}  # fmt: skip


@pytest.mark.parametrize("options", QUANTIZED.values(), ids=QUANTIZED)
def test_experts_that_no_token_chose_are_left_and_said(mixtral: Path, options: list[str], tmp_path: Path) -> None:
    job = ["quantize", mixtral / "m.onnx", tmp_path / "q.onnx", *options, "--calib", mixtral / "texts.jsonl"]
    said = " ".join(succeed(*job, "--tolerance", "9").out.split())
    assert "products saw no calibration token and are left" in said
    names = [f"model.layers.0.mlp.experts.{e}.gate_proj.weight" for e in range(17)]
    plain = [name for name in names if readers(tmp_path / "q.onnx", name) == ["Gemm"]]
    assert 13 <= len(plain) <= 15  # two tokens choose two to four experts
    assert readers(tmp_path / "q.onnx", "model.layers.0.mlp.gate.weight") == ["Gemm"]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_that_no_token_chose_are_pruned_by_magnitude(mixtral: Path, method: str, tmp_path: Path) -> None:
    result = run(
        "prune", mixtral / "m.onnx", tmp_path / "p.onnx", "--method", method, "--calib", mixtral / "texts.jsonl",
        "--no-check",
    )  # fmt: skip
    assert result.code == 0 and "are pruned by magnitude" in " ".join(result.out.split())
    before, after = initializers(mixtral / "m.onnx"), initializers(tmp_path / "p.onnx")
    for name in before:
        if ".experts." in name:
            fours = after[name].reshape(-1, 4)
            assert ((fours != 0).sum(axis=1) == 2).all(), name
    kept = [name for name in before if ".experts." in name and np.isin(after[name], [0, *before[name].ravel()]).all()]
    assert kept  # those by magnitude keep their numbers


def test_the_router_is_quantized_on_request(mixtral: Path, tmp_path: Path) -> None:
    job = ["quantize", mixtral / "m.onnx", tmp_path / "q.onnx", "--int4-rtn", "--block-size", "32"]
    succeed(*job, "--tolerance", "9")
    assert readers(tmp_path / "q.onnx", "model.layers.0.mlp.gate.weight") == ["Gemm"]
    succeed(*job, "--include", "*mlp.gate.*", "--tolerance", "9")
    assert readers(tmp_path / "q.onnx", "model.layers.0.mlp.gate.weight") != ["Gemm"]


def test_a_mixture_is_found_in_each_layer(mixtral: Path) -> None:
    (found,) = mixtures(Model.load(mixtral / "m.onnx").graph)
    assert len(found.rows) == len(found.results) == 17
