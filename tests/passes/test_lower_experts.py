"""`lower-ort` on mixtures of experts: ONNX Runtime's MoE computes what transformers does, or the reason is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the references are transformers' own models (make setup installs it)")

from onnxtools.engines.runtimes.onnxrt.ort_session import why_not_captured
from onnxtools.ir.model import Model
from tests.exporter import hf
from tests.exporter.driver import decode
from tests.support import ops, rel_l2, run, succeed

IDS, MASK = np.random.default_rng(3).integers(3, 97, (2, 12)), np.ones((2, 12), np.int64)


@pytest.mark.parametrize("form", ["concat", "gqa"])
@pytest.mark.parametrize("opset", ["19", "24"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen2_moe_mixed", "qwen3_moe"])
def test_logits_equal_transformers(name: str, opset: str, form: str, tmp_path: Path) -> None:
    model = hf.make(name, tmp_path / "hf")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--opset", opset, "--kv-cache", form)
    said = succeed("lower-ort", tmp_path / "m.onnx", tmp_path / "ort.onnx").out
    layers = 1 if name == "qwen2_moe_mixed" else 2
    assert f"{layers} mixtures of experts became MoE" in " ".join(said.split())
    found = ops(tmp_path / "ort.onnx")
    assert sum(op.endswith("MoE") for op in found) == layers and "NonZero" not in found
    expected = hf.logits(model, IDS, MASK)
    assert np.abs(decode(tmp_path / "ort.onnx", form, IDS, MASK, [9, 1, 1, 1]) - expected).max() <= 1e-4


def test_in_fp16(tmp_path: Path) -> None:
    model = hf.make("qwen3_moe", tmp_path / "hf")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--dtype", "fp16")
    succeed("lower-ort", tmp_path / "m.onnx", tmp_path / "ort.onnx")
    found = decode(tmp_path / "ort.onnx", "concat", IDS, MASK, [9, 1, 1, 1])
    assert rel_l2(found, hf.logits(model, IDS, MASK)) <= 2e-2


@pytest.mark.parametrize(
    ("name", "reason"),
    [("deepseek_v3", "its router is no softmax"), ("gpt_oss", "no SwiGLU of stored weights [out, in]")],
)
def test_what_the_operator_does_not_have_is_left_and_said(name: str, reason: str, tmp_path: Path) -> None:
    hf.make(name, tmp_path / "hf")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx")
    result = run("lower-ort", tmp_path / "m.onnx", tmp_path / "ort.onnx")
    assert reason in " ".join((result.out + result.err).split())


def test_a_graph_with_nonzero_is_not_captured_and_moe_is(tmp_path: Path) -> None:
    """ONNX Runtime captures NonZero in a CUDA graph and then reads memory that is not there."""
    hf.make("mixtral", tmp_path / "hf")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--kv-cache", "gqa")
    succeed("lower-ort", tmp_path / "m.onnx", tmp_path / "ort.onnx")
    assert "NonZero returns depends on the data; `lower-ort`" in why_not_captured(Model.load(tmp_path / "m.onnx"))
    assert not why_not_captured(Model.load(tmp_path / "ort.onnx"))
