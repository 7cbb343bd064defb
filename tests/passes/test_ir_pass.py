"""Any onnx_ir pass runs as one of ours: with checks, provenance and a command of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from onnx import helper
from onnx_ir.passes.common import IdentityEliminationPass

import onnxtools
from onnxtools.base.errors import JobError, UsageError
from onnxtools.passes.ir_pass import IrPass
from onnxtools.pipeline.instruments import NumericCheck
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


def test_a_rewrite_rule_of_onnxscript(tmp_path: Path) -> None:
    """x * sigmoid(x) becomes Swish-24 by a rule that is written as onnxscript's documentation writes it."""
    rewriter = pytest.importorskip("onnxscript.rewriter", reason="the rule is onnxscript's (make setup installs it)")

    class Swish(rewriter.RewriteRuleClassBase):  # type: ignore[misc,name-defined]
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Mul(x, op.Sigmoid(x))

        def rewrite(self, op: Any, x: Any) -> Any:
            return op.Swish(x)

    nodes = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, [info("x", ["n", 4], FLOAT)], [info("y", ["n", 4], FLOAT)], opset=24)
    loaded, reference = onnxtools.load(path), onnxtools.load(path)
    chain = [IrPass(rewriter.RewritePass([Swish.rule()]))]
    onnxtools.PassManager(chain, [NumericCheck()]).run(loaded)
    assert [node.op_type for node in loaded.graph] == ["Swish"]
    loaded.save(tmp_path / "o.onnx")
    assert onnxtools.validate(reference, onnxtools.load(tmp_path / "o.onnx")).passed
