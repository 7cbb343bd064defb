"""Any onnx_ir pass runs as one of ours: with checks, provenance and a command of its own."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from onnx import helper
from onnx_ir.passes.common import IdentityEliminationPass

import onnxtools
from onnxtools.base.errors import JobError, UsageError
from onnxtools.passes.ir_pass import IrPass
from tests.support import FLOAT, info, ops, refuse, succeed, write


class Refuses(ir.passes.InPlacePass):
    def requires(self, model: ir.Model) -> None:
        raise ir.passes.PreconditionError("wants more")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        raise AssertionError


def model(path: Path) -> Path:
    nodes = [helper.make_node("Identity", ["x"], ["i"]), helper.make_node("Relu", ["i"], ["y"])]
    return write(path, nodes, [info("x", ["n", 4], FLOAT)], [info("y", ["n", 4], FLOAT)])


def test_an_instance_in_a_chain(tmp_path: Path) -> None:
    loaded = onnxtools.load(model(tmp_path / "m.onnx"))
    report = onnxtools.PassManager([IrPass(IdentityEliminationPass())]).run(loaded)
    assert [node.op_type for node in loaded.graph] == ["Relu"] and report.changed
    entry = json.loads(loaded.ir.metadata_props["onnxtools.provenance"])[0]
    assert entry["passes"][0]["transform"].endswith(":IdentityEliminationPass")
    again = onnxtools.PassManager([IrPass(IdentityEliminationPass())]).run(loaded)
    assert not again.changed and "nothing matched" in again.steps[0].result.notes[0]


def test_on_the_command_line(tmp_path: Path) -> None:
    succeed(
        "ir-pass",
        model(tmp_path / "m.onnx"),
        tmp_path / "o.onnx",
        "--transform",
        "onnx_ir.passes.common:IdentityEliminationPass",
    )
    assert ops(tmp_path / "o.onnx") == ["Relu"]


@pytest.mark.parametrize(("place", "says"), [
    ("nothing", "package.module:name"), ("onnx_ir.passes.common:Nothing", "cannot be imported"),
    ("pathlib:Path", "no onnx_ir.passes.PassBase"),
])  # fmt: skip
def test_what_is_no_pass_is_one_line(place: str, says: str, tmp_path: Path) -> None:
    assert says in refuse("ir-pass", model(tmp_path / "m.onnx"), tmp_path / "o.onnx", "--transform", place, code=2)


def test_a_refusal_of_the_pass_is_an_error_of_ours(tmp_path: Path) -> None:
    loaded = onnxtools.load(model(tmp_path / "m.onnx"))
    with pytest.raises(JobError, match="Refuses refuses the model"):
        IrPass(Refuses()).apply(loaded)
    with pytest.raises(UsageError, match="no onnx_ir"):
        IrPass("pathlib:Path").apply(loaded)
