"""What is known of a model: transformers' own reading of the same configurations is the reference."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from onnxtools.base.errors import JobError
from onnxtools.checkpoints.model_info import ModelInfo
from onnxtools.ir.description import MODEL_KEY
from tests.generation import vocabularies as v

CONFIG = {
    "model_type": "llama",
    "vocab_size": 99,
    "bos_token_id": 11,
    "eos_token_id": 12,
    "pad_token_id": 13,
    "max_position_embeddings": 321,
}


def written(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / "model.onnx"


@pytest.mark.parametrize(
    "generation",
    [
        {},
        {"eos_token_id": 7},
        {"eos_token_id": [7, 12, 3], "pad_token_id": 5},
        {"bos_token_id": 1, "eos_token_id": None},
    ],
)
def test_ids_are_those_that_transformers_generates_with(generation: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the reference (make setup installs it)")
    path = written(tmp_path, config=CONFIG, **({"generation_config": generation} if generation else {}))
    found = ModelInfo.read(path, {})
    theirs = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(tmp_path))
    theirs.update(**{key: value for key, value in generation.items() if value is not None})
    ends = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert (found.eos_token_ids, found.bos_token_id, found.pad_token_id) == (
        tuple(ends),
        theirs.bos_token_id,
        theirs.pad_token_id,
    )
    assert found.max_positions == 321


def test_a_nested_text_config(tmp_path: Path) -> None:
    found = ModelInfo.read(
        written(tmp_path, config={"model_type": "vision", "eos_token_id": 5, "text_config": CONFIG}), {}
    )
    assert found.eos_token_ids == (5,) and found.bos_token_id == 11 and found.max_positions == 321


def test_genai_config_of_onnx_runtime(tmp_path: Path) -> None:
    model = {
        "bos_token_id": 4,
        "eos_token_id": [6, 8],
        "pad_token_id": 9,
        "context_length": 4096,
        "decoder": {"head_size": 64},
    }
    found = ModelInfo.read(written(tmp_path, genai_config={"model": model, "search": {}}), {})
    assert (found.eos_token_ids, found.bos_token_id, found.pad_token_id, found.max_positions) == ((6, 8), 4, 9, 4096)


@pytest.mark.parametrize("as_file", ["tokenizer_config", "special_tokens_map"])
def test_tokens_that_are_named_by_their_text(as_file: str, tmp_path: Path) -> None:
    native = v.sentencepiece()
    path = written(tmp_path, **{as_file: {"eos_token": {"content": "</s>"}, "bos_token": "<s>"}})
    native.save(str(tmp_path / "tokenizer.json"))
    found = ModelInfo.read(path, {})
    assert found.eos_token_ids == (native.token_to_id("</s>"),) and found.bos_token_id == native.token_to_id("<s>")


def test_the_folder_called_onnx_belongs_to_the_one_above(tmp_path: Path) -> None:
    written(tmp_path, config=CONFIG)
    (tmp_path / "onnx").mkdir()
    found = ModelInfo.read(tmp_path / "onnx" / "model.onnx", {})
    assert found.eos_token_ids == (12,) and found.folder == tmp_path


def test_nothing_beside(tmp_path: Path) -> None:
    assert ModelInfo.read(tmp_path / "model.onnx", {}) == ModelInfo(tmp_path)


ODD = (
    "{", "5", "[]", "null", "[" * 100_000, '{"model": 3}', '{"tokens": [], "model": {}}',
        '{"tokens": {}, "model": {"max_position_embeddings": "x"}}',
    '{"tokens": {"eos_token_ids": {"a": 1}}, "model": {"max_position_embeddings": 4}}',
    '{"tokens": {"pad_token_id": 1e400}, "model": {"max_position_embeddings": 4}}',
    '{"tokens": {"bos_token_id": true}, "model": {"max_position_embeddings": 4}}',
    '{"tokens": {}, "model": {"max_position_embeddings": -4}}', "1" * 5000,
    '{"tokens": {"_generation": 5, "eos_token_ids": [-7]}, "model": {"max_position_embeddings": 4}}', "\ud800",
)  # fmt: skip


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize(
    "place", [MODEL_KEY, "onnxtools.json", "config.json", "generation_config.json", "tokenizer_config.json"]
)
def test_metadata_of_any_shape_is_one_error_or_none(text: str, place: str, tmp_path: Path) -> None:
    if place != MODEL_KEY:
        (tmp_path / place).write_bytes(text.encode(errors="surrogatepass"))
    try:
        ModelInfo.read(tmp_path / "model.onnx", {MODEL_KEY: text} if place == MODEL_KEY else {})
    except JobError as error:
        assert len(str(error)) < 600 and "\n" not in str(error)
    else:
        assert not place.startswith("onnxtools")


@pytest.mark.parametrize("name", ["onnxtools.json", "config.json", "tokenizer_config.json"])
def test_a_pipe_is_no_configuration(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(JobError, match="is a pipe"):
        ModelInfo.read(tmp_path / "model.onnx", {})
