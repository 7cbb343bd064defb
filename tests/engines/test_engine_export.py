"""What `export` writes builds with the real TensorRT-RTX, in every type and cache form that TensorRT has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import succeed

SIZES = [
    "--n-layer",
    "2",
    "--n-embd",
    "64",
    "--n-head",
    "4",
    "--n-inner",
    "96",
    "--vocab-size",
    "97",
    "--n-positions",
    "64",
]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("kind", "opset"), [("none", "24"), ("concat", "24"), ("concat", "19"), ("scatter", "24")])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_exported_models_build(family: str, kind: str, opset: str, dtype: str, tmp_path: Path) -> None:
    form = ["--kv-cache", kind, "--opset", opset, "--dtype", dtype, "--logits", "last"]
    succeed("export", "--random", "--family", family, *SIZES, *form, "-o", tmp_path / "m.onnx")
    succeed("build", tmp_path / "m.onnx", tmp_path / "m.engine", "--compute-capability", "8.9", "--max-seq-len", "32")
    manifest = json.loads((tmp_path / "m.engine.json").read_text())
    assert [value["name"] for value in manifest["inputs"]][:2] == ["input_ids", "attention_mask"]
    assert manifest["outputs"][0]["name"] == "logits" and manifest["outputs"][0]["dtype"] == "float32"
    said = " ".join(manifest["mends"])
    assert ("softmax_precision of 2 Attention nodes dropped" in said) == (opset == "24" and dtype != "fp32")
