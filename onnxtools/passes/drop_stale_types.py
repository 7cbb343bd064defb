"""Drop recorded types and shapes that contradict what the operators give."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxtools.analysis.facts import analyse
from onnxtools.analysis.operators import Fact
from onnxtools.ir.model import Model
from onnxtools.pipeline.passbase import Pass, PassResult


@dataclass(frozen=True)
class DropStaleTypes(Pass):
    """Exporters record some values wrongly, and a checker or runtime that believes them refuses the graph.

    TransformerEngine records the rank-0 scale of current scaling as [1], and FP8 data as uint8. Later passes infer the
    dropped types and shapes again. Graph inputs stay as declared; an output of a wrong rank gets the right one.
    """

    name = "drop-stale-types"
    example = "onnxtools drop-stale-types model.onnx out.onnx"

    def apply(self, model: Model) -> PassResult:
        facts = analyse(model)
        stale = [
            o for node in model.graph for o in node.outputs if not o.is_graph_output() and not _agrees(o, facts[o])
        ]
        for value in stale:
            value.shape = value.type = None
        for value in model.graph.outputs:
            shape = facts[value].shape
            if shape is not None and value.shape is not None and len(shape) != len(value.shape):
                value.shape = ir.Shape([None if facts.dims else size for size in shape])
                stale.append(value)
        if not stale:
            return PassResult(False, 0, ["every recorded type and shape agrees with the graph"])
        return PassResult(
            True,
            len(stale),
            [f"{len(stale)} recorded types or shapes contradicted the graph ({stale[0].name!r} first)"],
        )


def _agrees(value: ir.Value, fact: Fact) -> bool:
    if fact.dtype is not None and value.dtype not in (None, fact.dtype):
        return False
    if value.shape is None or fact.shape is None:
        return True
    return len(value.shape) == len(fact.shape) and all(
        not isinstance(d, int) or d == size for d, size in zip(value.shape, fact.shape, strict=True)
    )
