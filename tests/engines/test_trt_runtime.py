"""What of the runtime `trt` can be known without a GPU: ports, profiles, errors.

The engine is built by TensorRT-RTX.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds the engine (make setup installs it)")
pytest.importorskip("transformers", reason="the model is written by transformers (make setup installs it)")

from onnxtools.base.errors import JobError
from onnxtools.engines.build.manifest import manifest_path
from onnxtools.engines.runtimes.trt import TrtRuntime, choose_profile, engine_io, read_manifest
from onnxtools.generation.runtime import RuntimeOptions
from tests.generation.models import exported
from tests.support import refuse, succeed


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama with a concat cache; profiles for the context and for generation."""
    folder = tmp_path_factory.mktemp("engine")
    succeed("build", exported("llama", "concat"), folder / "m.engine", "--max-batch-size", "4", "--max-seq-len", "32")
    return folder / "m.engine"


def test_ports_of_the_manifest_are_those_of_the_graph(engine: Path) -> None:
    io = engine_io(engine, read_manifest(engine))
    assert io.kind == "concat" and io.logits.name == "logits" and io.vocab_size == 97 and io.logits_all
    assert [(c.past.name, c.present.name, c.axis, c.shape(3, 7)) for c in io.caches[:2]] == [
        ("past_key_values.0.key", "present.0.key", 2, [3, 2, 7, 16]),
        ("past_key_values.0.value", "present.0.value", 2, [3, 2, 7, 16]),
    ]  # fmt: skip


def shapes(rows: int, tokens: int, past: int) -> dict[str, list[int]]:
    cache = [rows, 2, past, 16]
    return {
        "input_ids": [rows, tokens],
        "attention_mask": [rows, past + tokens],
        "position_ids": [rows, tokens],
        "past_key_values.0.key": cache,
    }


def test_the_context_and_each_step_find_their_profile(engine: Path) -> None:
    profiles = read_manifest(engine)["profiles"]
    names = [profile["name"] for profile in profiles]
    assert names[choose_profile(profiles, shapes(2, 10, 0), engine)] == "context"
    assert {names[choose_profile(profiles, shapes(2, 1, past), engine)] for past in (1, 10, 31)} == {"generation"}


@pytest.mark.parametrize(("rows", "tokens", "past"), [(5, 10, 0), (2, 40, 0), (2, 1, 40), (2, 3, 4)])
def test_shapes_beyond_every_profile_are_refused_by_the_input(engine: Path, rows: int, tokens: int, past: int) -> None:
    with pytest.raises(JobError, match=r"no profile takes this run: \w+"):
        choose_profile(read_manifest(engine)["profiles"], shapes(rows, tokens, past), engine)


def test_without_a_manifest_a_cuda_library_or_a_device_it_says_so(engine: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.engine"
    alone.write_bytes(b"plan")
    with pytest.raises(JobError, match="no such manifest"):
        TrtRuntime(alone, RuntimeOptions())
    manifest_path(alone).write_text("[]")
    with pytest.raises(JobError, match="no manifest of this onnxtools build"):
        TrtRuntime(alone, RuntimeOptions())
    with pytest.raises(JobError, match=r"cuda-python|no CUDA device"):
        TrtRuntime(engine, RuntimeOptions())
    with pytest.raises(JobError, match="runs on a GPU alone"):
        TrtRuntime(engine, RuntimeOptions(device="cpu"))


def test_an_engine_of_an_unknown_backend_is_refused(engine: Path, tmp_path: Path) -> None:
    other = tmp_path / "m.engine"
    other.write_bytes(engine.read_bytes())
    manifest = read_manifest(engine)
    manifest_path(other).write_text(json.dumps({**manifest, "backend": {"name": "other", "version": "1"}}))
    with pytest.raises(JobError, match="engine of other"):
        TrtRuntime(other, RuntimeOptions())


def test_run_on_an_engine_without_a_gpu_is_one_line(engine: Path) -> None:
    assert "runtime" in refuse("run", engine, "--prompt", "hello")
