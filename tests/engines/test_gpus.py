"""Whom a plan is for, what TensorRT would refuse, and builders that take their process down."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from onnxtools.base.errors import JobError
from onnxtools.engines.build import gpus, last_words
from onnxtools.engines.build.builder import Limits
from onnxtools.engines.build.many import Job, build_many
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.engines.kernels import library as kernel_library
from onnxtools.evaluate.limits import Rates, Work, raised
from onnxtools.evaluate.timing import Timing
from onnxtools.ir.model import Model
from tests.engines.graphs import linear, tensor
from tests.support import refuse, succeed

RTX = Limits(opset=25, ir_version=13, capabilities=("7.5", "8.9", "12.0"))
SMALL = ("--max-seq-len", "16")


@pytest.mark.parametrize(
    ("card", "named", "capability"),
    [(89, (), "8.9"), (120, (), "12.0"), (0, (), "8.9"), (0, ("7.5",), "7.5"), (90, ("12.0",), "12.0")],
)
def test_a_plan_is_for_the_card_that_is_here(
    card: int, named: tuple[str, ...], capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "device_capability", lambda: card)
    made, last = gpus.with_capability(EngineSpec(compute_capability=named), RTX)
    assert made.compute_capability == (capability,)
    assert bool(last) == (card == 0 and not named), "only where nobody said whom it is for"
    if last:
        assert (
            "8.9 (L4, L40S, RTX 40 series) alone" in last
            and "H100, H200, GH200 (9.0)" in last
            and "--backend tensorrt" in last
        )


def test_a_card_that_the_builder_does_not_know_has_a_way_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "device_capability", lambda: 90)
    with pytest.raises(JobError, match=r"9\.0 \(H100, H200, GH200\).*--print-trtexec.*--backend tensorrt"):
        gpus.with_capability(EngineSpec(), RTX)
    spec = EngineSpec()
    assert gpus.with_capability(spec, dataclasses.replace(RTX, capabilities=())) == (spec, ""), (
        "TensorRT builds for its own GPU"
    )


def test_the_last_line_of_build_says_whom_it_is_for(tmp_path: Path) -> None:
    if gpus.device_capability():
        pytest.skip("there is a GPU")
    source = linear(tmp_path / "m.onnx")
    assert "the plan is for 8.9 (L4" in succeed("build", source, "-o", tmp_path / "a.engine").out.splitlines()[-1]
    assert "the plan is for" not in succeed("build", source, tmp_path / "b.engine", "--compute-capability", "8.9").out


# --- zero points
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("zero", "says"), [
    (np.int8(3), "its zero point is 3"), (np.array([0, 0, -7], np.int8), "its zero point is -7"),
    (np.uint8(0), "quantizes to UINT8"), (np.uint8(128), "its zero point is 128"),
])  # fmt: skip
def test_zero_points_that_tensorrt_refuses_are_refused_before(zero: np.ndarray, says: str, tmp_path: Path) -> None:
    wide = zero.ndim == 1
    axis = {"axis": 1} if wide else {}
    scale = np.full(3, 0.1, np.float32) if wide else np.float32(0.1)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize", **axis),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **axis),
    ]
    stored = [numpy_helper.from_array(np.asarray(scale), "s"), numpy_helper.from_array(np.asarray(zero), "z")]
    graph = helper.make_graph(nodes, "g", [tensor("x", [2, 3], 1)], [tensor("y", [2, 3], 1)], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), tmp_path / "m.onnx")
    for more in ((), ("--print-trtexec",)):
        told = refuse("build", tmp_path / "m.onnx", tmp_path / "e.engine", *more)
        assert (
            "node 'quantize'" in told and says in told and "symmetrically" in told and "onnxtools convert" not in told
        )


# --- crashes
# ------------------------------------------------------------------------------------------------------------


def test_graphs_with_control_flow_or_rare_operators_are_built_apart(tmp_path: Path) -> None:
    texts = {
        "": "y = Relu (x)", "node 'Softsign_0' (Softsign)": "y = Softsign (x)",
        "node 'If_1' (If)": "c = IsNaN (k) y = If (c) <then_branch = a () => (float[2] t) { t = Abs (x) }, "
                            "else_branch = b () => (float[2] e) { e = Neg (x) }>",
    }  # fmt: skip
    for named, text in texts.items():
        onnx.save(
            parser.parse_model(
                f'<ir_version: 10, opset_import: ["" : 21]> g (float[2] x, float k) => (float[2] y) {{ {text} }}'
            ),
            tmp_path / "m.onnx",
        )
        assert last_words.unusual_node(Model.load(tmp_path / "m.onnx")) == named


def _crash(*args: object) -> None:
    last_words.say("Parsing node: conv_7 [Conv]")
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_builder_that_crashes_is_an_error_that_names_the_node(tmp_path: Path) -> None:
    source = linear(tmp_path / "m.onnx")
    words = "Parsing node: conv_7 [Conv]"
    assert "tensorrt-rtx crashed (SIGSEGV) at node conv_7 [Conv]" in last_words.epitaph(
        Model.load(source), "tensorrt-rtx", -signal.SIGSEGV, words
    )
    assert "crashed (SIGABRT) before it said anything" in last_words.epitaph(
        Model.load(source), "tensorrt-rtx", -signal.SIGABRT, ""
    )
    assert "(exit code 3) after it said 'x'" in last_words.epitaph(Model.load(source), "tensorrt-rtx", 3, "x")


def test_a_process_that_dies_leaves_nothing_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that the system ends (here: no memory for its address space) is what a crash of the library looks
    like.
    """
    source = linear(tmp_path / "m.onnx")
    monkeypatch.setattr("onnxtools.engines.build.many._work", _crash)
    (outcome,) = build_many(
        [Job(source, tmp_path / "e.engine")], EngineSpec(max_seq_len=16), workers=1, force=False, done=lambda _: None
    )
    assert "SIGSEGV" in outcome.error and sorted(
        path.name for path in tmp_path.iterdir() if path.name != "m.onnx.data"
    ) == ["m.onnx"]


# --- what lies beside an engine, and what is loaded
# --------------------------------------------------------------------


def test_an_engine_knows_its_own_model(tmp_path: Path) -> None:
    """Another model's onnxtools.json in the folder is not taken for its own."""
    from onnxtools.checkpoints.model_info import ModelInfo
    from onnxtools.ir.description import MODEL_KEY

    for name, length in (("a", 32), ("b", 64)):
        (tmp_path / name).mkdir()
        succeed(
            "export",
            "--random",
            "--n-layer",
            1,
            "--n-embd",
            64,
            "--n-head",
            4,
            "--vocab-size",
            100,
            "--n-positions",
            length,
            "-o",
            tmp_path / name / "m.onnx",
        )
    succeed("build", tmp_path / "a" / "m.onnx", tmp_path / "b" / "a.engine", *SMALL)
    manifest = json.loads((tmp_path / "b" / "a.engine.json").read_text())
    assert ModelInfo.read(tmp_path / "b" / "a.engine", {MODEL_KEY: manifest["graph"]["info"]}).max_positions == 32
    assert "onnxtools.json" in manifest["graph"]["beside"]


@pytest.mark.parametrize(("what", "mode"), [("onnxtools", 0o777), ("onnxtools", 0o770), ("library", 0o622)])
def test_kernels_that_others_could_have_written_are_not_loaded(
    what: str, mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 13 && exit 0\nfor last; do :; done\necho made > "$last"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = kernel_library.kernel_library(str(nvcc), 90)
    assert library.parent.stat().st_mode & 0o777 == 0o700 and library.stat().st_mode & 0o777 == 0o600
    (library.parent if what == "onnxtools" else library).chmod(mode)
    with pytest.raises(JobError, match="only where you alone can write"):
        kernel_library.kernel_library(str(nvcc), 90)


# --- shares of the limit
# -------------------------------------------------------------------------------------------------


def test_no_share_of_the_limit_is_above_one() -> None:
    """Whatever a model reaches counts as what the machine can do: a copy also writes."""
    work, steps = Work(step_bytes=10**9, prefill_flops=10**12, dtype="float"), 3
    timing = Timing(total=[1.0, 1.2], first=[0.4, 0.5], steps=[0.1, 0.2, 0.3, 0.2, 0.2, 0.3])
    rates = raised(Rates(1e9, 1e15), work, [timing], steps)
    assert (
        rates.bytes_per_s == pytest.approx(10**9 / 0.2)
        and rates.flops_per_s == 1e15
        and rates.by == "the model's steps and a matrix product"
    )
    floor = work.prefill_flops / rates.flops_per_s + steps * work.step_bytes / rates.bytes_per_s
    assert all(
        floor <= first + sum(group)
        for first, group in zip(timing.first, ([0.1, 0.2, 0.3], [0.2, 0.2, 0.3]), strict=True)
    )
