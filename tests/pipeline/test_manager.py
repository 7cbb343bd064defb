"""`PassManager` and what hangs on it: order, provenance, measures, dumps, checks, the reproducer."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import yaml

from onnxtools import __version__
from onnxtools.base.errors import JobError
from onnxtools.base.options import option
from onnxtools.ir.model import Model
from onnxtools.ir.provenance import PROVENANCE_KEY
from onnxtools.passes.cleanup import Cleanup
from onnxtools.passes.convert import Convert
from onnxtools.pipeline.instruments import Checker, Dump, NodeCount, NumericCheck, PeakMemory, Reproducer, Timing
from onnxtools.pipeline.manager import Instrument, PassManager, Step
from onnxtools.pipeline.passbase import Numerics, Pass, PassResult
from tests.support import Case, linear, normal, run, succeed

W = normal(64, 128)


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the weight."""

    name = "scale"
    numerics: Numerics = "exact"  # type: ignore[misc]
    factor: float = option(1.0, "The factor.")

    def apply(self, model: Model) -> PassResult:
        value = model.graph.initializers["w"]
        value.const_value = ir.tensor(W * np.float32(self.factor), name="w")
        return PassResult(True, 1, [f"times {self.factor}"])


@dataclass(frozen=True)
class Crash(Pass):
    """Fails the way a defect does."""

    name = "crash"

    def apply(self, model: Model) -> PassResult:
        raise ZeroDivisionError("a defect")


@dataclass(frozen=True)
class Refuse(Pass):
    """Fails the way bad input does."""

    name = "refuse"

    def apply(self, model: Model) -> PassResult:
        raise JobError("the model has a flaw; mend it")


@dataclass(frozen=True)
class Break(Pass):
    """Makes a graph that breaks ONNX's rules."""

    name = "break"

    def apply(self, model: Model) -> PassResult:
        model.graph.node(0).op_type = "NoSuchOperator"
        return PassResult(True, 1)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model.load(linear(tmp_path / "in.onnx"))


class Diary(Instrument):
    def __init__(self, name: str, lines: list[str]) -> None:
        self.name, self.lines = name, lines

    def before(self, pass_: Pass, model: Model) -> None:
        self.lines.append(f"{self.name} before {pass_.name}")

    def after(self, pass_: Pass, model: Model, step: Step) -> None:
        self.lines.append(f"{self.name} after {pass_.name}")

    def failed(self, pass_: Pass, model: Model, error: BaseException) -> None:
        self.lines.append(f"{self.name} failed {type(error).__name__}")


def test_instruments_nest_around_each_pass(model: Model) -> None:
    lines: list[str] = []
    PassManager([Cleanup(), Scale()], [Diary("a", lines), Diary("b", lines)]).run(model)
    assert lines == [
        f"{who} {when} {which}"
        for which in ("cleanup", "scale")
        for who, when in (("a", "before"), ("b", "before"), ("b", "after"), ("a", "after"))
    ]


def test_a_failing_pass_is_told_to_every_instrument_and_raised(model: Model) -> None:
    lines: list[str] = []
    with pytest.raises(ZeroDivisionError):
        PassManager([Crash(), Scale()], [Diary("a", lines), Diary("b", lines)]).run(model)
    assert lines == ["a before crash", "b before crash", "a failed ZeroDivisionError", "b failed ZeroDivisionError"]


def test_composites_are_expanded_and_provenance_keeps_what_was_asked(model: Model) -> None:
    report = PassManager([Convert(opset=21)]).run(model)
    assert [step.name for step in report.steps][-1] == "cleanup" and len(report.steps) > 4
    entry = json.loads(model.ir.metadata_props[PROVENANCE_KEY])[0]
    assert entry["passes"] == [{"pass": "convert", "opset": 21, "fold_weights": True, "keep_mx": False}]


def test_provenance_survives_in_the_file_and_accumulates(tmp_path: Path) -> None:
    case = Case("rms_swiglu_gqa_rope")
    first, second = tmp_path / "q.onnx", tmp_path / "kv.onnx"
    succeed("convert", case.path, first)
    succeed("add-kv-cache", first, second, "--layout", "sbnh")
    history = json.loads({p.key: p.value for p in onnx.load(second).metadata_props}[PROVENANCE_KEY])
    assert [entry["input_sha256"] for entry in history] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (case.path, first)
    ]
    assert [entry["input"] for entry in history] == [case.path.name, "q.onnx"]
    assert history[1]["passes"][0]["layout"] == "sbnh"
    assert history[1]["versions"]["onnxtools"] == __version__ and history[1]["versions"]["onnx"] == onnx.__version__


def test_measures(model: Model) -> None:
    step = PassManager([Scale()], [PeakMemory(), NodeCount(), Timing()]).run(model).steps[0]
    assert step.measures["nodes_before"] == step.measures["nodes_after"] == 1
    assert step.measures["seconds"] >= 0 and step.measures["peak_mib"] > 10
    assert step.options == {"numerics": "exact", "factor": 1.0}


def test_dump_writes_each_change(model: Model, tmp_path: Path) -> None:
    PassManager([Scale(factor=2.0), Cleanup(), Scale(factor=3.0)], [Dump(tmp_path / "dump")]).run(model)
    assert sorted(p.name for p in (tmp_path / "dump").glob("*.onnx")) == ["01-scale.onnx", "03-scale.onnx"]
    assert np.array_equal(
        onnx.numpy_helper.to_array(onnx.load(tmp_path / "dump" / "01-scale.onnx").graph.initializer[0]), 2 * W
    )


def test_the_checker_names_the_pass(model: Model) -> None:
    with pytest.raises(JobError, match="'break' made an invalid graph"):
        PassManager([Break()], [Checker()]).run(model)


@pytest.mark.parametrize(
    ("factor", "numerics", "passes"),
    [(1.0, "exact", True), (1.001, "exact", False), (1.001, "rounding", False), (1.001, "lossy", True)],
)
def test_the_numeric_check_judges_by_what_a_pass_claims(
    factor: float, numerics: Numerics, passes: bool, model: Model
) -> None:
    manager = PassManager([Scale(factor=factor, numerics=numerics)], [NumericCheck()])
    if passes:
        assert manager.run(model).steps[0].measures["rel_l2"] == pytest.approx(factor - 1, abs=1e-6)
    else:
        with pytest.raises(JobError, match=r"'scale' changed the outputs by 1\.00e-03"):
            manager.run(model)


def test_a_lossy_result_is_the_reference_of_the_next_pass(model: Model) -> None:
    report = PassManager([Scale(factor=2.0, numerics="lossy"), Scale(factor=2.0)], [NumericCheck()]).run(model)
    assert [step.measures["rel_l2"] for step in report.steps] == [pytest.approx(1), 0]


def test_the_check_says_why_it_was_not_done(tmp_path: Path) -> None:
    proto = onnx.load(linear(tmp_path / "in.onnx"))
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, tmp_path / "in.onnx")
    step = PassManager([Scale()], [NumericCheck()]).run(Model.load(tmp_path / "in.onnx")).steps[0]
    assert "x" in step.measures["numeric_skipped"]


def test_a_crash_leaves_a_recipe_that_repeats_it(model: Model, tmp_path: Path) -> None:
    passes = [Convert(opset=21), Crash()]
    with pytest.raises(ZeroDivisionError) as caught:
        PassManager(passes, [Reproducer(tmp_path / "crash", passes)]).run(model)
    recipe = yaml.safe_load((tmp_path / "crash" / "recipe.yaml").read_text())
    assert recipe["input"] == str(tmp_path / "in.onnx")
    assert recipe["passes"] == [{"convert": {"opset": 21}}, {"crash": {}}]
    assert any("recipe.yaml" in note for note in caught.value.__notes__)


def test_the_reproducer_of_built_in_passes_runs(model: Model, tmp_path: Path) -> None:
    """The recipe that a crash leaves is a recipe: `pipeline` takes it."""
    passes = [Convert(opset=21)]
    Reproducer(tmp_path / "crash", passes).failed(passes[0], model, ZeroDivisionError())
    succeed("pipeline", tmp_path / "crash" / "recipe.yaml")
    assert (tmp_path / "crash" / "after.onnx").exists()


def test_a_refusal_leaves_nothing(model: Model, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="flaw"):
        PassManager([Refuse()], [Reproducer(tmp_path / "crash", [Refuse()])]).run(model)
    assert not (tmp_path / "crash").exists()


def test_a_crash_on_the_command_line_is_one_line_with_the_way_to_repeat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_crash.py").write_text("def surgery(graph):\n    raise KeyError('gone wrong')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_crash", raising=False)
    result = run("graphsurgeon", linear(tmp_path / "in.onnx"), tmp_path / "out.onnx", "--function", "my_crash:surgery")
    assert result.code == 1 and result.err.count("\n") == 1 and result.err.startswith("error: ")
    assert "KeyError" in result.err and "recipe.yaml" in result.err
    assert not (tmp_path / "out.onnx").exists()


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError):
        from onnxtools.cli.main import main

        main(["convert", str(tmp_path / "absent.onnx"), str(tmp_path / "o.onnx"), "--debug"])
