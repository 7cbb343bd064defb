"""Surgery: a pass that removes Dropout, which does nothing at inference, run by the manager and checked by ONNX
Runtime.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx import TensorProto, helper, save

import onnxtools


def is_removable(node: ir.Node, keep: str) -> bool:
    """Whether a Dropout only hands its input on: no mask is read, and no training mode can be set."""
    return (
        (node.domain, node.op_type) == ("", "Dropout")
        and node.name != keep
        and (len(node.inputs) < 3 or node.inputs[2] is None)
        and not any(mask.uses() or mask.is_graph_output() for mask in node.outputs[1:])
        and not node.outputs[0].is_graph_output()
    )


@dataclass(frozen=True)
class RemoveDropout(onnxtools.Pass):
    """Let the readers of a Dropout read its input; a Dropout that may drop, or whose mask is read, stays."""

    name = "remove-dropout"

    keep: str = onnxtools.option("", "Name of a Dropout that stays.")

    def apply(self, model: onnxtools.Model) -> onnxtools.PassResult:
        nodes = [node for node in model.nodes_everywhere() if is_removable(node, self.keep)]
        for node in nodes:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            node.graph.remove(node, safe=True)
        return onnxtools.PassResult(bool(nodes), len(nodes), [f"{len(nodes)} Dropout nodes removed"])


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
