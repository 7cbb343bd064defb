"""Remove Dropout, which does nothing at inference."""

from dataclasses import dataclass

import onnx_ir as ir

from onnxtools import Model, Pass, PassResult, option


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
class RemoveDropout(Pass):
    """Let the readers of a Dropout read its input.

    Rules:
      - a Dropout with a training_mode input, whose mask is read, or whose result is an output of the graph, stays.
    """

    name = "remove-dropout"
    example = "onnxtools remove-dropout model.onnx out.onnx"

    keep: str = option("", "Name of a Dropout that stays.")

    def apply(self, model: Model) -> PassResult:
        nodes = [node for node in model.nodes_everywhere() if is_removable(node, self.keep)]
        for node in nodes:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            node.graph.remove(node, safe=True)
        return PassResult(bool(nodes), len(nodes), [f"{len(nodes)} Dropout nodes removed"])
