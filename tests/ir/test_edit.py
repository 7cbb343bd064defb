"""Replacing values: the graph keeps the names of its inputs and outputs, whatever is replaced by what."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import helper

from onnxtools.ir.edit import rename_or_bypass
from onnxtools.ir.model import Model
from tests.support import Session, info, normal, write


@pytest.mark.parametrize(("old", "new"), [("y", "x"), ("y", "z"), ("y", "h"), ("h", "x")])
def test_inputs_and_outputs_keep_their_names(old: str, new: str, tmp_path: Path) -> None:
    """x -> h -> y and x -> z: an output is replaced by the input, by another output, by an inner value."""
    nodes = [
        helper.make_node("Neg", ["x"], ["h"], name="h"),
        helper.make_node("Abs", ["h"], ["y"], name="y"),
        helper.make_node("Exp", ["x"], ["z"], name="z"),
    ]
    path = write(tmp_path / "m.onnx", nodes, [info("x", [2, 3])], [info("y", [2, 3]), info("z", [2, 3])])
    before = Session(path)({"x": normal(2, 3)})
    model = Model.load(path)
    values = {v.name: v for node in model.graph for v in node.outputs} | {v.name: v for v in model.graph.inputs}
    rename_or_bypass(model.graph, values[old], values[new])
    model.save(tmp_path / "o.onnx")
    session = Session(tmp_path / "o.onnx")
    after = session({"x": normal(2, 3)})
    assert list(session.inputs) == ["x"] and set(after) == {"y", "z"}
    inner = {"x": normal(2, 3), "h": -normal(2, 3), "z": before["z"]}
    expected = abs(inner[new]) if old == "h" else inner[new]
    assert after["y"] == pytest.approx(expected) and after["z"] == pytest.approx(before["z"])
