"""Links of a checkpoint's folder lead inside it, or from a snapshot of the Hugging Face cache to its own blobs; others
are refused by name.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the checkpoints are written by transformers (make setup installs it)")
import torch

from onnxtools.base.errors import ModelError
from onnxtools.checkpoints.open import open_checkpoint
from tests.exporter import hf

NAMES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf.make("llama", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


def moved(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(file, target)
    file.symlink_to(target)


@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_the_folder_is_refused_by_name(name: str, folder: Path) -> None:
    moved(folder / name, folder.parent / "secret" / name)
    with pytest.raises(ModelError, match=rf"{name}: leads out of the checkpoint, to .*secret"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_link_inside_the_folder_is_followed(name: str, folder: Path) -> None:
    moved(folder / name, folder / "parts" / name)
    assert open_checkpoint(folder).tensors


def cached(folder: Path, repository: Path) -> Path:
    snapshot = repository / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_snapshots_of_the_cache_are_followed_to_their_own_blobs_alone(folder: Path, tmp_path: Path) -> None:
    snapshot = cached(folder, tmp_path / "models--a--one")
    found = open_checkpoint(snapshot)
    assert found.files["tokenizer.json"] == (snapshot / "tokenizer.json").resolve()
    other = cached(folder, tmp_path / "models--a--two")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to((other / "tokenizer.json").resolve())
    with pytest.raises(ModelError, match=r"tokenizer\.json: leads out"):
        open_checkpoint(snapshot)


def test_the_folder_itself_may_be_a_link(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    assert open_checkpoint(folder.parent / "link").tensors


def test_a_link_to_nothing_and_a_circle(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("absent")
    with pytest.raises(ModelError, match=r"tokenizer\.json: is a link to nothing"):
        open_checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        open_checkpoint(folder)


def test_shards_and_nemo_folders_too(folder: Path, tmp_path: Path) -> None:
    state = hf.make("llama", folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "a.bin")
    index = {"weight_map": dict.fromkeys(state, "a.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert open_checkpoint(folder).tensors
    moved(folder / "a.bin", tmp_path / "secret" / "a.bin")
    with pytest.raises(ModelError, match=r"a\.bin: leads out"):
        open_checkpoint(folder)
    nemo = tmp_path / "nemo"
    nemo.mkdir()
    (nemo / "model_config.yaml").write_text("num_layers: 1")
    (nemo / "model_weights.ckpt").symlink_to(tmp_path / "secret" / "a.bin")
    with pytest.raises(ModelError, match=r"model_weights\.ckpt: leads out"):
        open_checkpoint(nemo)
