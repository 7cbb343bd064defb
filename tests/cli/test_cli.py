"""The command line: help, exit codes, one-line errors, JSON, nothing imported without need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from onnxtools import __version__
from onnxtools.base import registry
from onnxtools.cli.main import COMMANDS
from tests.conftest import Make
from tests.support import ROOT, Case, external, initializers, linear, normal, ops, refuse, succeed

PASSES = sorted(registry.names())
EVERY = [*PASSES, *COMMANDS]


@pytest.mark.parametrize("command", EVERY)
def test_help_of_every_command_has_an_example(command: str) -> None:
    shown = succeed(command, "--help").out
    assert "Example" in shown and f"onnxtools {command} " in shown.split("Example")[1]


def test_help_lists_every_command_with_a_line() -> None:
    lines = succeed("--help").out.splitlines()
    for command in EVERY:
        line = next(line for line in lines if line.strip().startswith(f"{command} "))
        assert len(line.split()) > 3, line


@pytest.mark.parametrize("args", [["--help"], ["--version"], []], ids=["help", "version", "nothing"])
def test_help_imports_no_heavy_package(args: list[str]) -> None:
    code = (
        "import sys\nfrom onnxtools.cli.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(sorted({'onnx', 'numpy', 'onnx_ir', 'onnxruntime', 'ml_dtypes', 'polygraphy', 'rich', 'yaml'} & "
        "set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_version() -> None:
    assert __version__ in succeed("--version").out


def test_python_m_and_the_script_are_the_same(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("onnxtools")
    if not script.exists():
        pytest.skip("the package is not installed beside this Python")
    commands = [[sys.executable, "-m", "onnxtools"], [str(script)]]
    a, b = (
        subprocess.run(
            [*c, "convert", "absent.onnx", "o.onnx"], cwd=tmp_path, check=False, capture_output=True, text=True
        )
        for c in commands
    )
    assert (
        a.returncode == b.returncode == 1
        and a.stderr == b.stderr == "error: absent.onnx: no such file; check the path\n"
    )


USAGE: dict[str, list[str]] = {
    "unknown command": ["convrt", "a.onnx", "b.onnx"],
    "unknown option": ["convert", "a.onnx", "b.onnx", "--colour"],
    "no arguments": ["convert"],
    "no output": ["convert", "a.onnx"],
    "too many": ["convert", "a.onnx", "b.onnx", "c.onnx"],
    "not a number": ["convert", "a.onnx", "b.onnx", "--opset", "high"],
    "a missing value": ["convert", "a.onnx", "b.onnx", "--opset"],
    "not a choice": ["add-kv-cache", "a.onnx", "b.onnx", "--layout", "zigzag"],
    "output not onnx": ["convert", "a.onnx", "b.pb"],
    "output a folder": ["convert", "a.onnx", "."],
    "output without a suffix": ["prune", "a.onnx", "b"],
    "global option": ["--colour"],
    "no recipe": ["pipeline"],
    "batch of 0": ["validate", "a.onnx", "a.onnx", "--batch", "0"],
    "tolerance text": ["validate", "a.onnx", "a.onnx", "--tolerance", "low"],
    "no function": ["graphsurgeon", "a.onnx", "b.onnx"],
    "output empty": ["convert", "a.onnx", ""],
}


@pytest.mark.parametrize("kind", USAGE)
def test_wrong_usage_is_exit_code_2(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    linear(tmp_path / "a.onnx")
    refuse(*USAGE[kind], code=2)
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_close_names_are_suggested() -> None:
    assert "did you mean convert" in refuse("convrt", "a", "b", code=2)


@pytest.mark.parametrize("command", ["convert", "prune", "cleanup"])
def test_json_is_all_there_is_on_stdout(command: str, tmp_path: Path) -> None:
    result = succeed(command, linear(tmp_path / "in.onnx"), tmp_path / "out.onnx", "--json")
    data = json.loads(result.out)
    assert data["output"] == str(tmp_path / "out.onnx") and data["steps"][-1]["name"] and result.err == ""


def test_a_pass_that_matched_nothing_says_so(tmp_path: Path) -> None:
    result = succeed("te-fp8-to-qdq", linear(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    assert "nothing matched" in result.out and "none" in result.out


def test_a_converted_model_reports_its_passes(tmp_path: Path) -> None:
    out = succeed("convert", Case("te_linear_fp8_ds").path, tmp_path / "out.onnx").out
    assert all(name in out for name in ("set-opset", "te-fp8-to-qdq", "cleanup", "rel L2", "1 weights stored as FP8"))


def test_the_check_runs_on_the_inputs_that_are_given(tmp_path: Path) -> None:
    case = Case("te_linear_fp8_ds")
    data = json.loads(
        succeed("convert", case.path, tmp_path / "a.onnx", "--inputs", case.path.with_suffix(".npz"), "--json").out
    )
    assert 0.0 in [step["measures"].get("rel_l2") for step in data["steps"]]
    unchecked = json.loads(succeed("convert", case.path, tmp_path / "b.onnx", "--no-check", "--json").out)
    assert not [step for step in unchecked["steps"] if "rel_l2" in step["measures"]]


def test_dump_writes_the_graph_after_each_change(tmp_path: Path) -> None:
    succeed("convert", Case("te_linear_fp8_ds").path, tmp_path / "out.onnx", "--dump", tmp_path / "dump")
    found = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert any(name.endswith("-te-fp8-to-qdq.onnx") for name in found)
    assert sorted(ops(tmp_path / "dump" / found[-1])) == sorted(ops(tmp_path / "out.onnx"))


# --- inspect and diff -------------------------------------------------------------------------------------------------


def test_inspect_counts_what_is_there(converted: Make) -> None:
    case = Case("te_linear_fp8_ds")
    raw = json.loads(succeed("inspect", case.path, "--json").out)
    assert (
        raw["opsets"] == {"": 18, "trt": 1}
        and raw["ops"]["trt::TRT_FP8QuantizeLinear"] == 2
        and raw["quantization"]["weight_fraction"] == 1
    )
    made = json.loads(succeed("inspect", converted(case.name), "--json").out)
    assert made["weights"]["by_dtype"]["FLOAT8E4M3FN"]["bytes"] == sum(
        a.nbytes for a in initializers(converted(case.name)).values() if a.dtype.itemsize == 1
    )
    assert made["provenance"][0]["passes"][0]["pass"] == "convert" and made["cache"] is None
    assert [io["name"] for io in made["io"]] == ["x", "y"] and made["io"][0]["shape"] == [32, 128]


def test_inspect_shows_the_cache_and_sparsity(cached: Make, tmp_path: Path) -> None:
    succeed("prune", cached("te_gpt_none_dyn"), tmp_path / "sparse.onnx")
    found = json.loads(succeed("inspect", tmp_path / "sparse.onnx", "--sparsity", "--json").out)
    assert found["cache"] == {"tensors": 4, "dtype": "FLOAT", "shape": "batch x 4 x past_sequence x 32"}
    assert sum(row["is_2_4"] for row in found["sparsity"]) == 8
    assert all(row["zeros"] >= 0.5 for row in found["sparsity"] if row["is_2_4"])
    text = succeed("inspect", tmp_path / "sparse.onnx", "--sparsity").out
    assert "cache: 4 tensors" in text and "2:4" in text and "made by" in text


def test_inspect_names_the_data_file(tmp_path: Path) -> None:
    assert "weights.bin" in succeed("inspect", external(linear(tmp_path / "in.onnx"))).out


def test_diff_shows_what_changed_and_nothing_else(converted: Make, tmp_path: Path) -> None:
    case = Case("te_linear_fp8_ds")
    found = json.loads(succeed("diff", case.path, converted(case.name), "--json").out)
    assert {"name": "", "before": 18, "after": 19} in found["opsets"] and {
        "name": "trt",
        "before": 1,
        "after": None,
    } in found["opsets"]
    assert {"name": "DequantizeLinear", "before": None, "after": 2} in found["ops"] and found["io"] == []
    assert "no difference" in succeed("diff", case.path, case.path).out
    assert "DequantizeLinear" in succeed("diff", case.path, converted(case.name)).out


def test_diff_sees_a_weight_of_another_shape(tmp_path: Path) -> None:
    a, b = linear(tmp_path / "a.onnx"), linear(tmp_path / "b.onnx", normal(64, 16))
    found = json.loads(succeed("diff", a, b, "--json").out)
    assert found["initializers"] == [{"name": "w", "before": "FLOAT 64x128", "after": "FLOAT 64x16"}]


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m onnxtools inspect {linear(tmp_path / 'in.onnx')} --json | head -c 1",
        shell=True,
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "{" and "Traceback" not in done.stderr


def test_sigterm_leaves_no_temporary_files(tmp_path: Path) -> None:
    code = (
        "import os, signal, tempfile\nfrom onnxtools.cli import main as m\ndef work(**_):\n    with "
        "tempfile.TemporaryDirectory(dir='.'):\n"
    )
    code += "        os.kill(os.getpid(), signal.SIGTERM)\n        os.read(0, 1)\nm.cli.main = work\nm.main([])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 143 and not list(tmp_path.iterdir()), done.stderr
