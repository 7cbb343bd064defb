"""Remove Dropout, which does nothing at inference."""

from dataclasses import dataclass

import onnx_ir as ir

from onnxtools import Model, Pass, PassResult, option


@dataclass(frozen=True)
class RemoveDropout(Pass):
    """Let whoever reads a Dropout read its input instead.

    Rules:
      - a Dropout whose mask is read, or whose result is an output of the graph, stays.
    """

    name = "remove-dropout"
    example = "onnxtools remove-dropout model.onnx out.onnx"

    keep: str = option("", "Name of a Dropout that stays.")

    def apply(self, model: Model) -> PassResult:
        count = 0
        for node in list(model.graph):
            if node.op_type != "Dropout" or node.name == self.keep or any(mask.uses() for mask in node.outputs[1:]):
                continue
            if node.inputs[0] is not None and not node.outputs[0].is_graph_output():
                ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
                model.graph.remove(node, safe=True)
                count += 1
        return PassResult(count > 0, count, [f"{count} Dropout nodes removed"])
