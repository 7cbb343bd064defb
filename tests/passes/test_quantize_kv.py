"""The KV cache in 8 bits: keys and values are told apart, and what all keys have in common costs nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

pytest.importorskip("transformers")

from tests.calibration.texts import calibration_file
from tests.export import hf
from tests.generation.models import reference
from tests.passes.test_quantize import logits_error, quantized
from tests.passes.test_quantize_attention import projections
from tests.quantization.test_folding import run
from tests.support import rel_l2, succeed


@pytest.mark.parametrize(("kind", "top"), [("int8", 127), ("fp8", 448)])
def test_scales_of_values_are_of_values_and_those_of_keys_cover_every_rotation(kind: str, top: int, tmp_path: Path) -> None:
    model = onnx.load(quantized(tmp_path, "--kv-cache", kind))
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    seen = projections()
    for layer in range(2):
        scales = {
            c: next(float(v) for n, v in stored.items() if n.startswith(f"past_key_values.{layer}.{c}/") and n.endswith("_scale")) for c in ("key", "value")
        }
        assert scales["value"] == pytest.approx(np.abs(seen[f"{layer}.value"]).max() / top, rel=1e-5)
        keys = seen[f"{layer}.key"]
        half = keys.shape[-1] // 2
        envelope = np.hypot(keys[..., :half], keys[..., half:]).max() / top
        assert scales["key"] == pytest.approx(envelope, rel=1e-5) if kind == "int8" else scales["key"] >= envelope
    assert sum(node.op_type == "Sub" and "mean" in node.name for node in model.graph.node) == (2 if kind == "fp8" else 0)


@pytest.mark.parametrize("form", ["concat", "scatter"])
def test_channels_that_are_large_in_all_keys_cost_fp8_nothing(form: str, tmp_path: Path) -> None:
    """A bias of 40 on every other channel of all keys: softmax does not see it, FP8's rounding of 40 would be 1 or 2."""
    model = copy.deepcopy(reference("gpt2"))
    width = model.config.n_embd
    for block in model.transformer.h:
        block.attn.c_attn.bias.data[width : 2 * width : 2] += 40
    model.save_pretrained(tmp_path / "hf")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--kv-cache", form)
    succeed("quantize", tmp_path / "m.onnx", tmp_path / "q.onnx", "--kv-cache", "fp8", "--calib", calibration_file(tmp_path), "--no-check")
    ids = np.random.default_rng(2).integers(0, 97, (2, 9))
    expected = hf.logits(model, ids, np.ones((2, 9), np.int64))
    assert rel_l2(run(tmp_path / "m.onnx"), expected) < 1e-4
    found = rel_l2(run(tmp_path / "q.onnx"), expected)
    plain = logits_error(quantized(tmp_path, "--kv-cache", "fp8", name="gpt2", form=form), "gpt2")
    assert found < 1.2 * plain and plain > 0.005
