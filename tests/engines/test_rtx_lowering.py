"""What is changed for TensorRT-RTX computes the same on ONNX Runtime, and the engine's manifest says it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the checkpoints are written by transformers (make setup installs it)")
pytest.importorskip("tensorrt_rtx", reason="engines are built with TensorRT-RTX (make setup installs it)")

import torch

from onnxtools.engines.tensorrt.rtx_lowering import lower_for_rtx, needs_lowering
from onnxtools.ir.model import Model
from tests.exporter import hf
from tests.exporter.driver import decode
from tests.support import ops, succeed

IDS, MASK = np.random.default_rng(3).integers(3, 97, (2, 12)), np.ones((2, 12), np.int64)


@pytest.mark.parametrize(
    "name",
    ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "cohere", "gptj", "glm4"],
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_lowered_graph_computes_the_same(name: str, dtype: str, tmp_path: Path) -> None:
    hf.make(name, tmp_path / "hf")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--dtype", dtype)
    model = Model.load(tmp_path / "m.onnx")
    assert needs_lowering(model) and lower_for_rtx(model) and not needs_lowering(model)
    model.save(tmp_path / "lowered.onnx")
    assert "NonZero" not in ops(tmp_path / "lowered.onnx")
    whole, found = (decode(tmp_path / f"{file}.onnx", "concat", IDS, MASK, [9, 1, 2]) for file in ("m", "lowered"))
    np.testing.assert_allclose(found, whole, atol=1e-5 if dtype == "fp32" else 2e-2)


def test_a_token_that_overflows_in_another_expert_keeps_its_numbers(tmp_path: Path) -> None:
    """Every expert runs every token, so an expert may overflow on tokens that are none of its own."""
    model = hf.make("mixtral", tmp_path / "hf")
    with torch.no_grad():  # the last expert overflows; some tokens do not choose it
        down = model.model.layers[1].mlp.experts.down_proj
        down[-1] = 3e38 * down[-1].sign()
    model.save_pretrained(tmp_path / "hf")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx")
    lowered = Model.load(tmp_path / "m.onnx")
    lower_for_rtx(lowered)
    lowered.save(tmp_path / "lowered.onnx")
    found = decode(tmp_path / "lowered.onnx", "concat", IDS, MASK, [12])
    whole = decode(tmp_path / "m.onnx", "concat", IDS, MASK, [12])
    kept = np.isfinite(whole).all(axis=-1)
    assert kept.any() and not kept.all()  # those that did choose it overflow
    assert np.isfinite(found[kept]).all()
    np.testing.assert_allclose(found[kept], whole[kept], atol=1e-5)


def test_the_manifest_says_it(tmp_path: Path) -> None:
    hf.make("deepseek_v3", tmp_path / "hf")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx")
    succeed("build", tmp_path / "m.onnx", tmp_path / "m.engine", "--compute-capability", "8.9", "--max-seq-len", "32")
    mends = " ".join(json.loads((tmp_path / "m.engine.json").read_text())["mends"])
    assert "1 mixtures of experts run every expert" in mends and "4 RotaryEmbedding nodes sorted" in mends
