"""The KV cache in 8 bits: keys and values are told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

pytest.importorskip("transformers")

from tests.calibration.texts import calibration_file
from tests.passes.test_quantize import quantized
from tests.passes.test_quantize_attention import projections
from tests.support import refuse


@pytest.mark.parametrize(("kind", "top"), [("int8", 127), ("fp8", 448)])
def test_scales_of_values_are_of_values_and_those_of_keys_cover_every_rotation(
    kind: str, top: int, tmp_path: Path
) -> None:
    model = onnx.load(quantized(tmp_path, "--kv-cache", kind))
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    seen = projections()
    for layer in range(2):
        scales = {
            c: next(
                float(v)
                for n, v in stored.items()
                if n.startswith(f"past_key_values.{layer}.{c}/") and n.endswith("_scale")
            )
            for c in ("key", "value")
        }
        assert scales["value"] == pytest.approx(np.abs(seen[f"{layer}.value"]).max() / top, rel=1e-5)
        keys = seen[f"{layer}.key"]
        half = keys.shape[-1] // 2
        envelope = np.hypot(keys[..., :half], keys[..., half:]).max() / top
        assert scales["key"] == pytest.approx(envelope, rel=1e-5)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_cache_is_not_quantized_again(kind: str, tmp_path: Path) -> None:
    source = quantized(tmp_path, "--kv-cache", kind)
    told = refuse("quantize", source, tmp_path / "r.onnx", "--kv-cache", "int8", "--calib", calibration_file(tmp_path))
    assert "its cache 'past_key_values.0.key' is " in told and "already" in told
