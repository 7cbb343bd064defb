"""Damaged and hostile checkpoints: one line that names the file and the next step, nothing written, nothing run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the checkpoints are written by transformers (make setup installs it)")
import torch

from tests.exporter import hf
from tests.support import refuse


def llama(folder: Path) -> Path:
    hf.make("llama", folder)
    return folder


def edit(folder: Path, **changes: object) -> Path:
    config = json.loads((llama(folder) / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def truncated(folder: Path) -> Path:
    file = llama(folder) / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    return folder


def huge_header(folder: Path) -> Path:
    file = llama(folder) / "model.safetensors"
    with open(file, "rb+") as out:
        out.write(struct.pack("<Q", 2**62))
    return folder


def huge_tensor(folder: Path) -> Path:
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (llama(folder) / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def missing_extra_misshaped(folder: Path) -> Path:
    state = hf.make("llama", folder).state_dict()
    (folder / "model.safetensors").unlink()
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    state["model.layers.0.adapter.weight"] = torch.zeros(3)
    del state["model.norm.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    return folder


class _Malice:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch pwned",)


def malicious(folder: Path) -> Path:
    llama(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": _Malice()}, folder / "pytorch_model.bin")
    return folder


def zip_bomb(folder: Path) -> Path:
    """A data.pkl that is small in the archive and large outside it."""
    llama(folder)
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(b"\0" * 10_000_000))
    return folder


def not_a_zip(folder: Path) -> Path:
    llama(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    return folder


def tar_with(name: str, kind: bytes = tarfile.REGTYPE) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        with tarfile.open(folder / "m.nemo", "w") as archive:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, data = kind, "/etc/passwd", b"a: 1"
            member.size = len(data) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(data))
        return folder / "m.nemo"

    return make


def shard_elsewhere(folder: Path) -> Path:
    (llama(folder) / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def gguf_header(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40))
    return folder / "m.gguf"


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "unknown architecture": (lambda f: edit(f, model_type="mamba"), "'mamba' is not supported; .*llama"),
    "hidden not divisible": (lambda f: edit(f, hidden_size=65, head_dim=None), "65 is not divisible by 4"),
    "heads not divisible": (lambda f: edit(f, num_key_value_heads=3), "4 heads do not divide into 3"),
    "rope type": (
        lambda f: edit(f, rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}),
        "rope type 'proportional' is not supported",
    ),
    "activation": (lambda f: edit(f, hidden_act="xielu"), "activation 'xielu' is not supported"),
    "no layers": (lambda f: edit(f, num_hidden_layers=-1), "num_hidden_layers is -1"),
    "too many layers": (
        lambda f: edit(f, num_hidden_layers=3),
        "9 weights missing: model.layers.2.input_layernorm.weight.*1 more",
    ),
    "truncated safetensors": (truncated, "truncated or damaged"),
    "header beyond the file": (huge_header, "its header claims 4611686018427387904 bytes"),
    "tensor beyond the file": (huge_tensor, "truncated or damaged"),
    "all problems at once": (
        missing_extra_misshaped,
        "1 weights missing: model.norm.weight; 1 weights of the wrong shape: .*up_proj.*unknown: .*adapter",
    ),
    "malicious pickle": (malicious, r"wants (posix|nt)\.system.*refused"),
    "zip bomb": (zip_bomb, "claims 100000.. bytes|compressed"),
    "no zip": (not_a_zip, "not a zip archive of torch.save"),
    "tar with ..": (tar_with("../../evil.yaml"), "leads out of the archive"),
    "tar with a link": (tar_with("model_config.yaml", tarfile.SYMTYPE), "is a link, a device or sparse"),
    "tar without weights": (tar_with("model_config.yaml"), "has no model_weights.ckpt"),
    "tar without configuration": (tar_with("x.yaml"), "has no model_config.yaml"),
    "shard elsewhere": (shard_elsewhere, "shards must lie beside the index"),
    "GGUF sizes": (gguf_header, "not a GGUF file, or a damaged one: it claims 1099511627776 tensors"),
    "no folder": (lambda f: f / "absent", "no such file or folder"),
    "wrong file": (lambda f: Path(__file__), "no reader for .py"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line_and_no_output(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = CASES[name]
    source = make(tmp_path / "checkpoint")
    (tmp_path / "out").mkdir()
    assert re.search(message, error := refuse("export", source, "-o", "out/model.onnx")), error
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "pwned").exists()
