"""fp16 graphs far from the first token: rotations and biases of positions beyond 4000 against transformers in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the references are transformers' own models (make setup installs it)")

import onnxruntime
import torch

from tests.exporter import hf
from tests.exporter.driver import decode
from tests.support import rel_l2, succeed

FIRST, LENGTH = 4100, 18
ROTATED = (
    "llama", "llama_llama3", "llama_longrope", "phi3_longrope", "phi3_partial", "qwen3", "gemma2", "gemma3", "gpt_neox",
    "gptj", "cohere", "glm4", "smollm3", "mixtral", "gpt_oss", "deepseek_v2_lite", "deepseek_v3",
)  # fmt: skip


def far(name: str, folder: Path) -> Any:
    longest = "max_seq_len" if hf.CASES[name][0] == "Mpt" else "max_position_embeddings"
    return hf.make(name, folder, {longest: 8192})


@pytest.mark.parametrize("opset", ["19", "24"])
@pytest.mark.parametrize("name", ROTATED)
def test_rotations_of_far_positions_in_fp16(name: str, opset: str, tmp_path: Path) -> None:
    model = far(name, tmp_path / "hf")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--kv-cache", "none", "--opset", opset)
    succeed("precision", tmp_path / "m.onnx", tmp_path / "h.onnx", "--to", "fp16", "--tolerance", "0.1")
    ids, places = np.random.default_rng(3).integers(3, 97, (2, LENGTH)), np.arange(FIRST, FIRST + LENGTH)[None]
    places = np.repeat(places, 2, axis=0)
    session = onnxruntime.InferenceSession(str(tmp_path / "h.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": places})
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids), position_ids=torch.tensor(places), use_cache=False).logits.numpy()
    assert rel_l2(found, expected) <= 2e-2


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("bloom", 2e-2), ("mpt", 2e-2), ("falcon_alibi", 0.1)],  # Falcon rounds its biases to steps of up to 16 x slope
)
def test_biases_of_far_positions_in_fp16(name: str, tolerance: float, tmp_path: Path) -> None:
    model = far(name, tmp_path / "hf")
    settings = tmp_path / "hf/config.json"
    settings.write_text(settings.read_text().replace("{", '{"seq_length": 8192,', 1))  # BLOOM's length
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--dtype", "fp16")
    ids = np.random.default_rng(3).integers(3, 97, (1, FIRST + 2))
    mask = np.ones_like(ids)
    found = decode(tmp_path / "m.onnx", "concat", ids, mask, [*[500] * 8, 100, 1, 1])
    assert rel_l2(found[:, -300:], hf.logits(model, ids, mask)[:, -300:]) <= tolerance
