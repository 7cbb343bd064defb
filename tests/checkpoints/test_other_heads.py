"""Folders that hold no causal language model are named as what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="it writes the checkpoints (make setup installs it)")

import transformers

from tests.exporter import hf
from tests.support import refuse


def test_a_classifier(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**hf.CASES["llama"][1])
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "hf")
    assert "is a LlamaForSequenceClassification" in refuse("export", tmp_path / "hf", "-o", tmp_path / "m.onnx")


@pytest.mark.parametrize("name", ["llama", "gpt_neox_serial", "qwen3_moe"])
def test_a_model_without_its_head(name: str, tmp_path: Path) -> None:
    model = hf.make(name, tmp_path / "whole")
    model.config.tie_word_embeddings = False
    model.base_model.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert "was saved without its head" in refuse("export", tmp_path / "hf", "-o", tmp_path / "m.onnx")


def test_a_peft_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"")
    assert "is a PEFT adapter" in refuse("export", tmp_path / "adapter", "-o", tmp_path / "m.onnx")
