"""What every command says and how it ends: the table of exit codes, help, logs, lines without a terminal, prompts from
stdin, what to install.
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import onnx
import pytest
from onnx import TensorProto, helper, parser

from onnxtools.base.errors import ModelError
from onnxtools.base.extras import install_line
from onnxtools.base.progress import Heartbeat, counted, progress
from onnxtools.cli import main as entry
from onnxtools.ir.model import Model
from onnxtools.pipeline.manager import PassManager
from onnxtools.pipeline.passbase import Pass, PassResult
from tests.support import ROOT, linear, refuse, run, succeed

ABSENT = {
    "a model": ["convert", "no.onnx", "o.onnx"], "a model to run": ["run", "no.onnx", "--prompt", "x"],
    "a model to build": ["build", "no.onnx", "o.engine"],
    "a checkpoint": ["export", "no", "-o", "o.onnx"], "a recipe": ["pipeline", "no.yaml"], 
    "calibration data": ["quantize", "a.onnx", "o.onnx", "--fp8", "--calib", "no.jsonl"],
    "prompts": ["run", "a.onnx", "--prompts-file", "no.txt"],
    "a data set": ["accuracy", "a.onnx", "--dataset", "no.jsonl"], 
    "inputs": ["validate", "a.onnx", "a.onnx", "--inputs", "no.npz"],
    "profiles": ["build", "a.onnx", "o.engine", "--profiles", "no.yaml"], "an engine": ["inspect", "no.engine"],
}  # fmt: skip


@pytest.mark.parametrize("what", ABSENT)
def test_a_file_that_is_missing_is_exit_code_1_everywhere(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    linear(tmp_path / "a.onnx")
    assert "no" in refuse(*ABSENT[what], code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_the_name_alone_is_a_question_for_help() -> None:
    assert succeed().out == succeed("--help").out and "Main job" in succeed().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_is_128_and_its_number(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Before a file of a name that the run writes to appears, and while it waits for its prompt."""
    code_line = (
        f"import signal; signal.signal({int(number)}, signal.default_int_handler if {int(number)} == 2 else "
        "signal.SIG_DFL)"
    )
    started = (
        f"{code_line}\nimport sys, onnxtools.cli.main as m, time\nm.cli.main = lambda **k: (print('on', flush=True), "
        "time.sleep(60))\nm.main([])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", started], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "on\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and err.startswith("error: ") and "half written" in err and err.count("\n") == 1


def test_whoever_stops_reading_is_no_failure(tmp_path: Path) -> None:
    """`onnxtools ... | head`: exit code 0 and nothing on stderr, however early the pipe closes."""
    linear(tmp_path / "a.onnx")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "onnxtools", "inspect", str(tmp_path / "a.onnx")],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


class _Broken(Pass):
    name = "broken"

    def apply(self, model: Model) -> PassResult:
        raise KeyError("x")


def test_an_unexpected_exception_on_a_damaged_file_is_the_files(tmp_path: Path) -> None:
    """Add of a text and a number passes our own look at the file; onnx's shape inference refuses it."""
    nodes = [helper.make_node("Concat", ["x", "y"], ["z"], axis=7)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xyz"]
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "g", ports[:2], ports[2:]), opset_imports=[helper.make_opsetid("", 21)]
        ),
        tmp_path / "bad.onnx",
    )
    with pytest.raises(ModelError, match="is no valid ONNX model"):
        PassManager([_Broken()]).run(Model.load(tmp_path / "bad.onnx"))
    with pytest.raises(KeyError):  # ours, where the file is whole
        PassManager([_Broken()]).run(Model.load(linear(tmp_path / "good.onnx")))


def test_errors_have_an_end(tmp_path: Path) -> None:
    assert (
        len(refuse("convert", tmp_path / ("x" * 200) / ("y" * 4000 + ".onnx"), tmp_path / "o.onnx"))
        < entry.MAX_LINE + 20
    )


# --- logs -------------------------------------------------------------------------------------------------------------


def test_v_says_what_is_begun_and_nothing_stays(tmp_path: Path) -> None:
    source = linear(tmp_path / "a.onnx")
    handlers = list(logging.getLogger("onnxtools").handlers)
    told = run("prune", source, tmp_path / "o.onnx", "--no-check", "-v").err
    assert [re.sub(r"^\d+ ms ", "", line) for line in told.splitlines()] == [
        f"reading {source}",
        f"prune: {source}",
        f"writing {tmp_path / 'o.onnx'}",
    ]
    assert (
        "places"
        in run(
            "quantize", linear(tmp_path / "b.onnx", opset=21), tmp_path / "p.onnx", "--int4-rtn", "--no-check", "-vv"
        ).err
    )
    assert (
        logging.getLogger("onnxtools").handlers == handlers
        and run("prune", source, tmp_path / "q.onnx", "--no-check").err == ""
    )


def test_a_log_file_grows_and_takes_no_other_file(tmp_path: Path) -> None:
    source, log = linear(tmp_path / "a.onnx"), tmp_path / "logs" / "x.log"
    for name in ("o", "p"):
        succeed("prune", source, tmp_path / f"{name}.onnx", "--no-check", "--log-file", log)
    assert refuse("prune", tmp_path / "no.onnx", tmp_path / "q.onnx", "--log-file", log)
    text = log.read_text()
    assert (
        text.startswith("# log of onnxtools\n")
        and text.count("INFO writing") == 2
        and "ended with: " in text
        and text.count("# log") == 1
    )
    kept = source.read_bytes()
    for place, says in ((source, "no log of onnxtools"), (tmp_path, "is a folder")):
        assert says in refuse("prune", source, tmp_path / "r.onnx", "--log-file", place)
    assert source.read_bytes() == kept and not (tmp_path / "r.onnx").exists()


def test_a_line_comes_while_nothing_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    heart = Heartbeat(0.05)
    log = logging.getLogger("onnxtools.test")
    log.setLevel(logging.INFO)
    log.addHandler(heart)
    with heart.beating():
        log.info("reading a.onnx")
        time.sleep(0.12)
        with progress("writing weights", 4_000_000_000) as advance:
            advance(1_000_000_000)
            time.sleep(0.12)
        with counted("calibration", 8) as tick:
            tick(3)
            time.sleep(0.12)
    log.removeHandler(heart)
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\[\d+ s\] ", line) for line in lines)
    said = {line.partition("] ")[2] for line in lines}
    assert {"reading a.onnx", "writing weights: 25% of 4.0 GB", "calibration: 3 of 8"} <= said


# --- what is missing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["rtx", "gpu", "tensorrt", "torch", "scores"])
def test_the_line_to_type_names_what_the_extra_names(extra: str) -> None:
    wanted = [
        re.split(r"[<>=;! ]", text)[0]
        for text in metadata.requires("onnxtools") or []
        if re.search(rf"extra == ['\"]{extra}['\"]", text)
    ]
    line = install_line(extra)
    assert wanted and all(f"'{name}" in line for name in wanted)
    assert line.startswith("pip uninstall -y onnxruntime ") == (extra == "gpu"), (
        "both have the same files, so one goes first"
    )


def test_advice_leads_somewhere(tmp_path: Path) -> None:
    """`--runtime trt` on a graph; FP8 asked for at an opset without it, by the very command that is advised."""
    source = linear(tmp_path / "a.onnx")
    assert "onnxtools build" in refuse("run", source, "--prompt", "x", "--runtime", "trt", code=2)
    assert "--runtime onnxrt runs" in refuse("run", tmp_path, "--prompt", "x", "--runtime", "onnxrt", code=2)
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[2, 64] x) => (float[2, 64] y) { y = com.microsoft.QuickGelu (x) }"""
    onnx.save(parser.parse_model(text), tmp_path / "ms.onnx")
    told = refuse("build", tmp_path / "ms.onnx", tmp_path / "e.engine")
    assert "ONNX Runtime's own" in told and "onnxtools convert" not in told, "convert does not replace it"


@pytest.mark.parametrize("command", [["prune"], ["quantize", "--int4-rtn"]])
def test_a_graph_without_weights_to_work_on_is_refused(command: list[str], tmp_path: Path) -> None:
    onnx.save(
        parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 21]> g (float[2, 64] x) => (float[2, 64] y) { y = Relu (x) }'
        ),
        tmp_path / "r.onnx",
    )
    assert "so there is nothing to" in refuse(command[0], tmp_path / "r.onnx", tmp_path / "o.onnx", *command[1:])
    assert not (tmp_path / "o.onnx").exists()


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["--prompts-file", "-"]])
def test_prompts_come_from_stdin(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxtools.cli.run import _prompts

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffone\n\ntwo é\n".encode())))
    assert _prompts((), Path(args[1]) if args else None) == ["one", "two é"]


def test_options_are_there_once() -> None:
    from onnxtools.cli.logs import add_options

    command: Any = click.Command("x")
    assert [p.name for p in add_options(add_options(command)).params].count("log_file") == 1
