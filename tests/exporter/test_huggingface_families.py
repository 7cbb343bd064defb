"""Every Hugging Face family against transformers: one run, prefill and steps, padding on either side, every cache
lowering.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the references are transformers' own models (make setup installs it)")

from onnxtools.base.errors import JobError
from onnxtools.exporter.export import export
from onnxtools.exporter.export_options import ExportOptions
from tests.exporter import hf
from tests.exporter.driver import decode

ROTARY = "multiples of 16"
NOT_GROUPED = {
    "falcon_alibi": "no ALiBi", "bloom": "no ALiBi", "bloom_residual": "no ALiBi", "bloom_odd_heads": "no ALiBi",
    "mpt": "no ALiBi", "mpt_clipped": "no ALiBi",
    "deepseek_v2": "no latent", "deepseek_v2_lite": "no latent", "deepseek_v3": "no latent",
    "deepseek_v3_plain": "no latent",
    "stablelm": ROTARY, "stablelm_parallel": ROTARY, "gpt_neox": ROTARY, "phi": ROTARY, "gptj": ROTARY, "glm": ROTARY,
}  # fmt: skip
"""Cases that GroupQueryAttention does not have, and what the refusal says."""
BATCH, LENGTH = 2, 18
SPLITS = (10, 1, 1, 1, 1, 1, 1, 1, 1)


@pytest.fixture(scope="module", params=sorted(hf.CASES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("case") / request.param
    return folder, hf.make(request.param, folder)


def inputs(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask; the second row has three padded tokens. On the right, they are followed by real ones."""
    ids = np.random.default_rng(3).integers(3, 97, (BATCH, LENGTH))
    mask = np.ones((BATCH, LENGTH), np.int64)
    if side == "left":
        mask[1, :3] = 0
    elif side == "right":
        mask[1, SPLITS[0] - 3 : SPLITS[0]] = 0
    return ids, mask


@pytest.mark.parametrize(
    ("kind", "opset", "side"),
    [("none", 24, "left"), ("none", 19, "left"), ("concat", 24, "left"), ("concat", 24, "right"),
        ("concat", 19, "left"), ("concat", 20, "none"),
     ("scatter", 24, "left"), ("scatter", 24, "right"), ("gqa", 24, "none"), ("gqa", 19, "none")],
)  # fmt: skip
def test_logits_equal_transformers(
    checkpoint: tuple[Path, Any], tmp_path: Path, kind: str, opset: int, side: str
) -> None:
    folder, model = checkpoint
    options = ExportOptions(kv_cache=kind, opset=opset)  # type: ignore[arg-type]
    name = folder.name
    if kind == "gqa" and name in NOT_GROUPED:
        with pytest.raises(JobError, match=f"{NOT_GROUPED[name]}.*use --kv-cache concat"):
            export(folder, tmp_path / "m.onnx", options)
        return
    export(folder, tmp_path / "m.onnx", options)
    ids, mask = inputs(side)
    found, expected = decode(tmp_path / "m.onnx", kind, ids, mask, SPLITS), hf.logits(model, ids, mask)
    assert np.abs(found - expected)[mask.astype(bool)].max() <= 1e-4
