"""Several builds at once, builds that need not be done again, and what can be asked about an engine afterwards: real
builds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxtools.base.errors import JobError
from onnxtools.engines.build.engine import build
from onnxtools.engines.build.manifest import check_plan, read_manifest
from onnxtools.engines.build.many import visible_devices
from onnxtools.engines.build.spec import EngineSpec
from tests.engines.graphs import helper, linear, tensor, write
from tests.support import refuse, run, succeed

SMALL = ("--max-batch-size", "2", "--max-seq-len", "16", "--backend", "tensorrt-rtx")


def said(*args: str | Path) -> Any:
    return json.loads(succeed(*args, "--json").out)


def listen() -> None:
    """A shell's background jobs ignore SIGINT, and so would what they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def four_builds(folder: Path) -> subprocess.Popen[str]:
    """Of models that take seconds, two at a time, in a process group of their own."""
    sizes = (
        "--family llama --n-layer 12 --n-embd 256 --n-head 4 --n-inner 512 --vocab-size 997 --n-positions 64 --dtype "
        "fp16"
    )
    for name in "abcd":
        succeed("export", "--random", *sizes.split(), "-o", folder / f"{name}.onnx")
    command = [
        sys.executable,
        "-m",
        "onnxtools",
        "build",
        *(str(folder / f"{name}.onnx") for name in "abcd"),
        "--workers",
        "2",
        *SMALL,
    ]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True, preexec_fn=listen
    )


def bad(path: Path) -> Path:
    """A graph that preflight refuses: an operator that the parser lacks."""
    node = helper.make_node("StringNormalizer", ["x"], ["y"], name="odd")
    return write(
        path,
        [node],
        [tensor("x", ["batch"], onnx.TensorProto.STRING)],
        [tensor("y", ["batch"], onnx.TensorProto.STRING)],
        [],
    )


def test_several_models_are_built_and_one_that_fails_stops_none(tmp_path: Path) -> None:
    models = [linear(tmp_path / "a.onnx"), bad(tmp_path / "b.onnx"), linear(tmp_path / "c.onnx")]
    result = run("build", *models, "--workers", "2", *SMALL, "--json")
    assert result.code == 1 and "b.onnx" in result.err + result.out and "'odd'" in result.err
    found = json.loads(result.out)
    assert [bool(row["error"]) for row in found] == [False, True, False]
    assert sorted(path.name for path in tmp_path.iterdir() if "engine" in path.name) == [
        "a.engine",
        "a.engine.json",
        "c.engine",
        "c.engine.json",
    ]


def test_engines_go_into_a_folder(tmp_path: Path) -> None:
    models = [linear(tmp_path / f"{name}.onnx") for name in "ab"]
    told = succeed("build", *models, "--output-folder", tmp_path / "engines", *SMALL).out
    assert "2 of 2 engines" in told and (tmp_path / "engines/b.engine").is_file()
    succeed("build", models[0], "--output-folder", tmp_path / "one", *SMALL)
    assert (tmp_path / "one/a.engine.json").is_file()


def test_ctrl_c_ends_the_processes_and_leaves_no_half_engine(tmp_path: Path) -> None:
    process = four_builds(tmp_path)
    time.sleep(6)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 or not err, err
    assert "Traceback" not in err
    left = [
        path.name
        for path in tmp_path.iterdir()
        if not path.name.startswith(tuple(f"{name}." for name in "abcd")) and "onnxtools.json" not in path.name
    ]
    assert [name for name in left if "tmp" in name or name.startswith(".")] == []
    for engine in tmp_path.glob("*.engine"):
        succeed("validate", engine)


def test_what_was_built_is_not_built_again(tmp_path: Path) -> None:
    source, engine = linear(tmp_path / "m.onnx"), tmp_path / "e.engine"
    assert not said("build", source, engine, *SMALL)["reused"]
    stamp = engine.stat().st_mtime_ns
    assert said("build", source, engine, *SMALL)["reused"] and engine.stat().st_mtime_ns == stamp
    assert "was there already" in succeed("build", source, engine, *SMALL).out
    assert not said("build", source, engine, *SMALL, "--force")["reused"]
    assert not said("build", source, engine, *SMALL, "--no-tf32")["reused"], "another option"
    engine.write_bytes(engine.read_bytes()[:-1])
    assert not said("build", source, engine, *SMALL, "--no-tf32")["reused"], "a damaged plan"
    linear(source, weight=np.ones((64, 128), np.float16))
    assert not said("build", source, engine, *SMALL, "--no-tf32")["reused"], "other weights"
    engine.with_name("e.engine.json").write_text("{")
    assert not said("build", source, engine, *SMALL, "--no-tf32")["reused"], "a damaged manifest"


def test_sparsity_force_prunes_before_it_builds(tmp_path: Path) -> None:
    source = linear(tmp_path / "m.onnx")
    before = source.read_bytes()
    assert "prune them" in refuse("build", source, tmp_path / "e.engine", *SMALL, "--sparsity")
    made = said("build", source, tmp_path / "e.engine", *SMALL, "--sparsity", "force")
    assert made["sparsity"]["sparse"] == made["sparsity"]["total"] == 1 and source.read_bytes() == before
    assert [step["pass"] for step in made["provenance"][-1]["passes"]] == ["prune"] and any(
        "accuracy is lost" in note for note in made["notes"]
    )
    succeed("validate", tmp_path / "e.engine")
    assert said("build", source, tmp_path / "e.engine", *SMALL, "--sparsity", "force")["reused"]
    assert not said("build", source, tmp_path / "e.engine", *SMALL)["reused"]
    assert (
        "--sparsity=force"
        in succeed("build", source, tmp_path / "e.engine", "--print-trtexec", "--sparsity", "force").out
    )


@pytest.mark.parametrize("target", [".", "pipe"])
def test_an_engine_path_that_is_no_file_is_left_alone(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    source = linear(tmp_path / "m.onnx")
    assert ("is a device or a pipe" if target == "pipe" else "is a folder") in refuse("build", source, target, *SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "pipe"] and Path("pipe").is_fifo()


@pytest.mark.parametrize(("flag", "says"), [
    ("--int8", "quantize --int8"), ("--bf16", "precision --to bf16"), ("--int4", "quantize --int4-awq"),
    ("--fp8", "no QuantizeLinear"),
])  # fmt: skip
def test_a_precision_that_the_graph_lacks_is_refused(flag: str, says: str, tmp_path: Path) -> None:
    assert says in refuse("build", linear(tmp_path / "m.onnx"), tmp_path / "e.engine", *SMALL, flag)


def test_the_audit_finds_what_was_asked_for(tmp_path: Path) -> None:
    made = said("build", linear(tmp_path / "m.onnx"), tmp_path / "e.engine", *SMALL, "--fp16")
    assert made["audit"]["source"] == "parsed network" and made["audit"]["outputs"]["float16"] > 0


def test_an_engine_is_inspected_compared_and_checked(tmp_path: Path) -> None:
    source, engine = linear(tmp_path / "m.onnx"), tmp_path / "e.engine"
    succeed("build", source, engine, *SMALL)
    succeed("build", source, tmp_path / "f.engine", *SMALL, "--compute-capability", "12.0")
    told = succeed("inspect", engine).out
    assert "MATRIX_MULTIPLY" in told and "tensorrt-rtx" in told and said("inspect", engine) == read_manifest(engine)
    changes = said("diff", engine, tmp_path / "f.engine")
    assert (
        changes["options"] == [{"name": "compute_capability", "before": ["8.9"], "after": ["12.0"]}]
        and not changes["io"]
    )
    assert said("validate", engine)["passed"] and said("validate", source, engine)["passed"]
    linear(source, weight=np.ones((64, 128), np.float16))
    assert "has changed since the engine was built" in refuse("validate", engine)
    source.unlink()
    assert run("validate", engine).code == 1


def test_a_plan_is_refused_before_it_is_read(tmp_path: Path) -> None:
    engine = build(
        linear(tmp_path / "m.onnx"), tmp_path / "e.engine", EngineSpec(backend="tensorrt-rtx", max_seq_len=16)
    )
    version = engine.manifest["backend"]["version"]
    check_plan(engine.path, engine.manifest, version=version, capability="8.9")
    for options, says in (({"version": "1.0"}, "build it again"), ({"capability": "9.0"}, "--compute-capability 9.0")):
        with pytest.raises(JobError, match=says):
            check_plan(engine.path, engine.manifest, **{"version": version, "capability": "8.9", **options})
    data = bytearray(engine.path.read_bytes())
    data[len(data) // 2] ^= 1
    engine.path.write_bytes(data)
    with pytest.raises(JobError, match="is not the file that its manifest describes"):
        check_plan(engine.path, engine.manifest, version=version, capability="8.9")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["m.txt", "e.engine"], "no .onnx file"),
        (["a.onnx", "b.onnx", "c.engine"], "no .onnx file"),
        (["e.engine"], "no .onnx"),
    ],
)
def test_arguments_that_name_no_model(arguments: list[str], says: str) -> None:
    assert says in refuse("build", *arguments, code=2)


def test_devices_are_those_that_cuda_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert visible_devices() == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_parent(number: signal.Signals, tmp_path: Path) -> None:
    process = four_builds(tmp_path)
    time.sleep(4)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)  # the pipe closes when the last process that has it is gone
    assert "Traceback" not in err and (number == signal.SIGKILL or err.strip().startswith("error: ")), err
    written = sorted(path.name for path in tmp_path.iterdir())
    time.sleep(2)
    assert written == sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in written if name.endswith(".tmp")] == []


@pytest.mark.parametrize(("key", "value"), [
    ("engine", 7), ("graph", []), ("spec", "x"), ("format", "onnxtools.engine/99"), ("audit", None), ("weights", [5]),
    ("peak_rss_mib", "many"),
])  # fmt: skip
def test_a_manifest_that_somebody_changed_is_refused_or_built_anew(key: str, value: Any, tmp_path: Path) -> None:
    source, engine = linear(tmp_path / "m.onnx"), tmp_path / "e.engine"
    made = said("build", source, engine, *SMALL)
    path = tmp_path / "e.engine.json"
    for changed in ({**made, key: value}, {k: v for k, v in made.items() if k != key}):
        path.write_text(json.dumps(changed))
        for command in (("inspect", engine), ("validate", engine), ("diff", engine, engine)):
            assert "is no manifest of this onnxtools build" in refuse(*command)
    assert not said("build", source, engine, *SMALL)["reused"]


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"precious": 1}')
    assert "is no manifest of an engine" in refuse(
        "build", linear(tmp_path / "m.onnx"), tmp_path / "config", *SMALL, code=2
    )
    assert (tmp_path / "config.json").read_text() == '{"precious": 1}'


def test_what_does_not_go_together_is_said(tmp_path: Path) -> None:
    source, engine = linear(tmp_path / "m.onnx"), tmp_path / "e.engine"
    succeed("build", source, engine, *SMALL)
    assert "two models, or two engines" in refuse("diff", engine, source, code=2)
    assert "there is no such manifest" in refuse("inspect", engine.rename(tmp_path / "r.engine"))
    assert "no such file" in refuse("inspect", tmp_path / "absent.engine")
    assert "named twice" in refuse("build", source, source, code=2)
    assert "no such file" in refuse("build", source, tmp_path / "x.engine", *SMALL, "--plugins", "absent.so")
    assert "POOL:SIZE" in refuse(
        "build", source, tmp_path / "x.engine", *SMALL, "--mem-pool-size", "workspace:0", code=2
    )
