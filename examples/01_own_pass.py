"""Surgery: a pass that removes Dropout, which does nothing at inference, run by the manager and checked by ONNX
Runtime.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx import TensorProto, helper, save

import onnxtools


@dataclass(frozen=True)
class RemoveDropout(onnxtools.Pass):
    """Let whoever reads a Dropout read its input instead; one whose mask is read stays."""

    name = "remove-dropout"

    keep: str = onnxtools.option("", "Name of a Dropout that stays.")

    def apply(self, model: onnxtools.Model) -> onnxtools.PassResult:
        nodes = [node for node in model.graph if node.op_type == "Dropout" and node.name != self.keep]
        removable = [node for node in nodes if not any(mask.uses() for mask in node.outputs[1:])]
        for node in removable:
            source, result = node.inputs[0], node.outputs[0]
            if source is None or result.is_graph_output():
                continue
            ir.convenience.replace_all_uses_with(result, source)
            model.graph.remove(node, safe=True)
        return onnxtools.PassResult(bool(removable), len(removable), [f"{len(removable)} Dropout nodes removed"])


def make(path: Path) -> None:
    """relu(dropout(x)), as a trainer leaves it."""
    nodes = [
        helper.make_node("Dropout", ["x"], ["d"], name="drop"),
        helper.make_node("Relu", ["d"], ["y"], name="relu"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in "xy")
    save(
        helper.make_model(
            helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 19)], ir_version=9
        ),
        path,
    )


def main(folder: Path) -> None:
    make(folder / "in.onnx")
    model = onnxtools.load(folder / "in.onnx")
    report = onnxtools.PassManager([RemoveDropout()]).run(model)
    model.save(folder / "out.onnx")
    print(report.steps[0].result.notes[0])
    verdict = onnxtools.validate(onnxtools.load(folder / "in.onnx"), onnxtools.load(folder / "out.onnx"))
    print("the same outputs" if verdict.passed else "the outputs differ")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
