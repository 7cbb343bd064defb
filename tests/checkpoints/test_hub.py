"""Names of the Hugging Face hub: the real huggingface_hub, against a server of this test and against its cache."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("huggingface_hub", reason="it fetches the files (make setup installs it)")
pytest.importorskip("transformers", reason="the checkpoints are written by transformers (make setup installs it)")

from huggingface_hub import constants

from tests.exporter import hf
from tests.exporter.driver import decode
from tests.support import refuse, succeed

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS, MASK = np.random.default_rng(3).integers(3, 97, (2, 12)), np.ones((2, 12), np.int64)


class Hub(http.server.BaseHTTPRequestHandler):
    """The parts of the hub's interface that a download uses: a model's list of files, and the files."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/me/tiny/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self._answer(json.dumps(entries).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/me/tiny"):
            siblings = [{"rfilename": name} for name in self.files]
            answer = {
                "id": "me/tiny",
                "sha": COMMIT,
                "siblings": siblings,
                "private": False,
                "downloads": 0,
                "tags": [],
            }
            self._answer(json.dumps(answer).encode(), Content_Type="application/json")
        elif path.startswith("/me/tiny/resolve/"):
            name = path.split("/", 5)[5]
            self.asked.append(name)
            data = self.files[name]
            self._answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)
        elif "gated" in path:
            self._answer(b"{}", 403, X_Error_Code="GatedRepo")
        else:
            self._answer(b"{}", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder / "hf", hf.make("qwen3", folder / "hf")


@pytest.fixture
def hub(tiny: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.files = {file.name: file.read_bytes() for file in tiny[0].iterdir()}
    Hub.files |= {"original/consolidated.safetensors": b"x", "consolidated.safetensors": b"x", "tf_model.h5": b"x"}
    Hub.asked = []
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_name_is_fetched_and_exported(hub: type[Hub], tiny: tuple[Path, Any], tmp_path: Path) -> None:
    said = succeed("export", "me/tiny", "-o", tmp_path / "m.onnx").out
    assert COMMIT in "".join(said.split())
    expected = hf.logits(tiny[1], IDS, MASK)
    assert np.abs(decode(tmp_path / "m.onnx", "concat", IDS, MASK, [12]) - expected).max() <= 1e-4
    assert not {"tf_model.h5", "consolidated.safetensors", "original/consolidated.safetensors"} & set(hub.asked)


def test_without_a_connection_the_cache_serves(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    succeed("export", "me/tiny", "-o", tmp_path / "a.onnx")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    succeed("export", "me/tiny", "-o", tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx.data").read_bytes() == (tmp_path / "b.onnx.data").read_bytes()
    shutil.rmtree(tmp_path / "cache")
    line = refuse("export", "me/tiny", "-o", tmp_path / "c.onnx")
    assert "me/tiny" in line and "not in the cache" in line


def test_random_weights_fetch_no_weights(hub: type[Hub], tmp_path: Path) -> None:
    succeed("export", "--random", "me/tiny", "-o", tmp_path / "m.onnx")
    assert "config.json" in hub.asked and "model.safetensors" not in hub.asked


@pytest.mark.parametrize("name", ["out/model.onnx", "out/SmolLM2.Q4_K_M.gguf", "out/gpt.NEMO", "out/gpt.ckpt"])
def test_a_file_that_is_missing_is_no_name_of_the_hub(hub: type[Hub], name: str, tmp_path: Path) -> None:
    line = refuse("export", name, "-o", tmp_path / "m.onnx")
    assert "no such file" in line and "hf download" not in line
    assert not hub.asked


@pytest.mark.parametrize(("name", "words"), [("me/absent", "neither a path nor a model"), ("me/gated", "is gated")])
def test_what_the_hub_refuses_is_one_line(hub: type[Hub], name: str, words: str, tmp_path: Path) -> None:
    assert words in refuse("export", name, "-o", tmp_path / "m.onnx")


def test_a_revision_is_of_the_hub(hub: type[Hub], tiny: tuple[Path, Any], tmp_path: Path) -> None:
    assert "--revision is of a name of the hub" in refuse(
        "export", tiny[0], "-o", tmp_path / "m.onnx", "--revision", "main", code=2
    )
    succeed("export", "me/tiny", "-o", tmp_path / "m.onnx", "--revision", COMMIT)
