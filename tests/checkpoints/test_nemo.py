"""NeMo archives: what is written beside a model, ranks that are claimed, archives that unpack to more than they are."""

from __future__ import annotations

import gzip
import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

from onnxtools.base.errors import ModelError
from onnxtools.checkpoints import nemo
from onnxtools.checkpoints.checkpoint import Region
from onnxtools.checkpoints.nemo import read_nemo

CONFIG = b"num_layers: 1\n"


def archive(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as out:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path


# --- side files
# -----------------------------------------------------------------------------------------------------------

HASH = "0123456789abcdef" * 2


def regions(folder: Path, *names: str) -> dict[str, Region]:
    found = {}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
        found[name] = Region.of(folder / name)
    return found


def test_only_the_tokenizers_files_are_taken(tmp_path: Path) -> None:
    names = (
        "requirements.txt", "package.json", "pyproject.toml", "..json", "config.json", "onnxtools.json", "notes.vocab",
        "x.model", "sub/tokenizer.json",
        "model_config.yaml", "model.onnx", "tokenizer.json", f"{HASH}_merges.txt", f"{HASH}_tokenizer.model",
    )  # fmt: skip
    found = nemo._tokenizer(regions(tmp_path, *names), {})
    assert found == {
        "tokenizer.json": b"tokenizer.json",
        "merges.txt": f"{HASH}_merges.txt".encode(),
        "tokenizer.model": f"{HASH}_tokenizer.model".encode(),
    }


def test_files_that_the_configuration_names_get_the_names_of_hugging_face(tmp_path: Path) -> None:
    """So that what a hostile archive calls package.json cannot be written under that name, and gpt2-vocab.json is
    found.
    """
    config = {
        "tokenizer": {
            "model": f"nemo:{HASH}_mixture_256k.model",
            "vocab_file": "nemo:package.json",
            "merge_file": "gpt2-merges.txt",
        }
    }
    members = regions(tmp_path, f"{HASH}_mixture_256k.model", "package.json", "gpt2-merges.txt", "setup.py")
    found = nemo._tokenizer(members, config)
    assert {name: bytes(content) for name, content in found.items()} == {  # type: ignore[arg-type]
        "tokenizer.model": f"{HASH}_mixture_256k.model".encode(), "vocab.json": b"package.json",
        "merges.txt": b"gpt2-merges.txt",
    }  # fmt: skip
    for odd in ({"tokenizer": []}, {"tokenizer": {"model": ["nemo:setup.py"], "vocab_file": "nemo:setup.py"}}):
        assert nemo._tokenizer(regions(tmp_path, "setup.py"), odd) == {}


# --- ranks
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mp_rank_999999999999", "tp_rank_00_pp_rank_888888888888", "tp_rank_777777777777_pp_rank_777777777777"]
)
def test_a_rank_that_is_claimed_is_missed_at_once(name: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "m.nemo", {"model_config.yaml": CONFIG, f"{name}/model_weights.ckpt": b"x"})
    start = time.monotonic()
    with pytest.raises(ModelError, match="the shard of pipeline rank 0, tensor rank 0 is missing"):
        read_nemo(path)
    assert time.monotonic() - start < 2


# --- archives
# ---------------------------------------------------------------------------------------------------------------


def bomb(path: Path, header: bytes, zeros: int) -> Path:
    with gzip.open(path, "wb", 9) as out:
        out.write(header)
        for _ in range(zeros >> 20):
            out.write(bytes(1 << 20))
    return path


def claimed(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def test_a_gzip_bomb_is_refused_before_it_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    path = bomb(tmp_path / "m.nemo", claimed("model_weights.ckpt", 512 << 20), 512 << 20)
    with pytest.raises(ModelError, match=r"its \d+ bytes unpack to more than"):
        read_nemo(path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("packed", [True, False])
def test_a_header_that_fills_the_memory_is_refused(kind: bytes, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.nemo"
    if packed:
        bomb(path, claimed("x", 256 << 20, kind), 256 << 20)
    else:
        path.write_bytes(claimed("x", 8 << 30, kind))
        os.truncate(path, 9 << 30)  # sparse
    with pytest.raises(ModelError, match="a header in it claims"):
        read_nemo(path)


def test_sparse_members_are_no_plain_files(tmp_path: Path) -> None:
    path = tmp_path / "m.nemo"
    path.write_bytes(claimed("model_config.yaml", 0, tarfile.GNUTYPE_SPARSE) + bytes(10240))
    with pytest.raises(ModelError, match="is a link, a device or sparse"):
        read_nemo(path)


def test_a_pipe_is_no_archive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.nemo")
    with pytest.raises(ModelError, match="is a pipe"):
        read_nemo(tmp_path / "m.nemo")


def test_what_a_killed_run_unpacked_is_removed_by_the_next(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.nemo", {"model_config.yaml": CONFIG, "model_weights.ckpt": b"x" * 1000}, "w:gz")
    (tmp_path / "tmp").mkdir()
    code = (
        "import sys, time; from pathlib import Path; from onnxtools.checkpoints import nemo; "
        "nemo._archive_members(Path(sys.argv[1])); print(1, flush=True)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}; time.sleep(60)", path], env=environment, stdout=subprocess.PIPE
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == b"1\n"
        assert len(list((tmp_path / "tmp").glob("onnxtools-nemo-*"))) == 1
        run.send_signal(signal.SIGKILL)
    assert len(list((tmp_path / "tmp").glob("onnxtools-nemo-*"))) == 1
    subprocess.run([sys.executable, "-c", code, path], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert not list((tmp_path / "tmp").iterdir())
