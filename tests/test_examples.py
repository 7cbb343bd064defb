"""The programs in `examples/` run as they stand, and say what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper, save

from tests.support import ROOT, ops

EXAMPLES = ROOT / "examples"
SAYS = {
    "01_own_pass.py": ["1 Dropout nodes removed", "the same outputs"],
    "02_checkpoint_to_engine.py": ["wrote full.onnx", "step-by-step decoding agree",
        "built model.engine with profiles context, generation"],
    "03_quantize_and_score.py": ["14 of 15 places quantized", "largest difference of the logits: 0.",
        "8 tokens after the prompt: ["],
    "05_own_runtime.py": ["[[8, 9, 10, 11, 12], [98, 99, 0, 1, 2]]"],
}  # fmt: skip


def test_every_example_is_listed_and_tried() -> None:
    found = {path.name for path in EXAMPLES.iterdir() if path.name[0].isdigit()}
    assert found == {*SAYS, "04_plug_in_package"}
    assert all(f"({name})" in (EXAMPLES / "README.md").read_text() for name in found)


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    if name.startswith("02"):
        pytest.importorskip("tensorrt_rtx", reason="builds an engine (pip install '.[rtx]')")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(line in done.stdout for line in SAYS[name]), done.stdout


def test_the_plug_in_package_is_a_command(tmp_path: Path) -> None:
    """Installed into a folder of its own, as pip would; nothing of onnxtools is touched."""
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(tmp_path / "site"),
    ]
    copied = tmp_path / "package"
    copied.mkdir()
    for file in (EXAMPLES / "04_plug_in_package").glob("*.*"):
        if file.is_file():
            (copied / file.name).write_bytes(file.read_bytes())
    subprocess.run([*install, str(copied)], check=True, capture_output=True)
    nodes = [helper.make_node("Dropout", ["x"], ["d"]), helper.make_node("Relu", ["d"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    save(
        helper.make_model(
            helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 19)], ir_version=9
        ),
        tmp_path / "in.onnx",
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), str(ROOT)))}
    command = [
        sys.executable,
        "-m",
        "onnxtools",
        "remove-dropout",
        str(tmp_path / "in.onnx"),
        str(tmp_path / "out.onnx"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ops(tmp_path / "out.onnx") == ["Relu"]


def test_the_pass_of_the_examples_leaves_what_may_drop(tmp_path: Path) -> None:
    """A mask that is read, a training mode, an output of the graph; and it counts what it removed alone."""
    import runpy

    import onnxtools

    nodes = [
        helper.make_node("Dropout", ["x"], ["a"], name="plain"),
        helper.make_node("Dropout", ["a", "", "on"], ["b"], name="training"),
        helper.make_node("Dropout", ["b"], ["c", "mask"], name="masked"),
        helper.make_node("Cast", ["mask"], ["m"], to=1),
        helper.make_node("Add", ["c", "m"], ["d"]),
        helper.make_node("Dropout", ["d"], ["y"], name="last"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    on = [helper.make_tensor("on", TensorProto.BOOL, [], [True])]
    graph = helper.make_graph(nodes, "g", [x], [y], on)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), tmp_path / "m.onnx")
    for program in ("01_own_pass.py", "04_plug_in_package/remove_dropout.py"):
        model = onnxtools.load(tmp_path / "m.onnx")
        result = runpy.run_path(str(EXAMPLES / program))["RemoveDropout"]().apply(model)
        assert result.matches == 1
        assert [node.name for node in model.graph if node.op_type == "Dropout"] == ["training", "masked", "last"]
