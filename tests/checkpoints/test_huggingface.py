"""Reading what transformers, safetensors and torch write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the checkpoints are written by transformers (make setup installs it)")
import safetensors.torch
import torch
import transformers

from onnxtools.base.errors import ModelError
from onnxtools.checkpoints.huggingface import read_folder
from onnxtools.storage.rows import read_rows
from tests.exporter import hf


def values(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(read_rows(t, 0, t.shape.numpy()[0]), np.float32) for name, t in tensors.items()}


def expected(model: Any) -> dict[str, np.ndarray]:
    return {name: t.float().numpy() for name, t in model.state_dict().items()}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], absent: str = "lm_head.weight") -> None:
    assert set(wanted) - {absent} <= set(found)
    for name in found:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors_of_every_float_type(tmp_path: Path, dtype: str) -> None:
    model = hf.make("llama", tmp_path).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    assert_same(values(read_folder(tmp_path).tensors), expected(model))


def test_sharded_safetensors(tmp_path: Path) -> None:
    model = hf.make("gpt2", tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(values(read_folder(tmp_path).tensors), expected(model))


def test_torch_bin_and_its_shards(tmp_path: Path) -> None:
    model = hf.make("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = model.state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(values(read_folder(tmp_path).tensors), expected(model))
    (tmp_path / "pytorch_model.bin").unlink()
    names = sorted(state)
    halves = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(values(read_folder(tmp_path).tensors), expected(model))


def test_views_that_share_a_storage(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    whole = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    torch.save(
        {"top": whole[:2], "bottom": whole[2:], "parameter": torch.nn.Parameter(whole)}, tmp_path / "pytorch_model.bin"
    )
    found = values(read_folder(tmp_path).tensors)
    np.testing.assert_array_equal(found["bottom"], whole[2:])
    np.testing.assert_array_equal(found["top"], whole[:2])
    np.testing.assert_array_equal(found["parameter"], whole)
    torch.save({"turned": whole.T}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"strides.*contiguous"):
        read_folder(tmp_path)


def test_a_linked_cache_folder(tmp_path: Path) -> None:
    """The hub's cache holds links to blobs; ONNX refuses weights behind a link, so the blob itself is named."""
    real, links = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    hf.make("llama", real)
    links.mkdir(parents=True)
    for file in real.iterdir():
        (links / file.name).symlink_to(file)
    assert all(Path(t.base_dir) == real.resolve() for t in read_folder(links).tensors.values())  # type: ignore[union-attr]


# --- which of several files
# ---------------------------------------------------------------------------------------------------


def in_every_form(folder: Path) -> dict[str, Any]:
    """Another model in each of the four forms; the file that says so to the model."""
    made: dict[str, Any] = {}
    for number, name in enumerate(
        ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    ):
        model = hf.make("llama", folder / "made")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * number)
        made[name] = model
        if name == "model.safetensors":
            model.save_pretrained(folder)
        elif name == "pytorch_model.bin":
            torch.save(model.state_dict(), folder / name)
        else:
            suffix = "safetensors" if "safetensors" in name else "bin"
            state = {key: value.contiguous() for key, value in model.state_dict().items()}
            (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(state, folder / f"part.{suffix}")
            (folder / name).write_text(
                json.dumps({"metadata": {"format": "pt"}, "weight_map": dict.fromkeys(state, f"part.{suffix}")})
            )
    shutil.rmtree(folder / "made")
    return made


def test_the_files_are_taken_in_transformers_order(tmp_path: Path) -> None:
    made = in_every_form(tmp_path)
    for name in made:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        np.testing.assert_array_equal(theirs.model.norm.weight.detach(), made[name].model.norm.weight.detach())
        assert_same(values(read_folder(tmp_path).tensors), expected(made[name]))
        (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor pytorch_model"):
        read_folder(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_shard_that_lacks_what_the_index_places_there_is_refused(suffix: str, tmp_path: Path) -> None:
    in_every_form(tmp_path)
    index = tmp_path / ("model.safetensors.index.json" if suffix == "safetensors" else "pytorch_model.bin.index.json")
    for path in tmp_path.glob("*model*"):
        if path != index:
            path.unlink()
    places = json.loads(index.read_text())
    places["weight_map"]["model.layers.9.absent"] = f"part.{suffix}"
    index.write_text(json.dumps(places))
    with pytest.raises(ModelError, match=rf"part\.{suffix}: has no tensor 'model\.layers\.9\.absent'"):
        read_folder(tmp_path)
