"""Merge equal nodes and drop what nothing uses."""

from __future__ import annotations

from dataclasses import dataclass

from onnxtools.graph import remove_unused
from onnxtools.infer import analyse
from onnxtools.model import Model
from onnxtools.passbase import Pass, PassResult


@dataclass(frozen=True)
class Cleanup(Pass):
    """Common sub-expressions are computed once; unused nodes, initializers and opset imports go.

    onnx_ir's own passes do the work; weights are compared by name only, never read. Recorded types and shapes that
    contradict what the operators give (TransformerEngine records a rank-0 scale as [1]) are dropped.
    """

    name = "cleanup"
    example = "onnxtools cleanup model.onnx clean.onnx"

    def apply(self, model: Model) -> PassResult:
        from onnx_ir.passes.common import CommonSubexpressionEliminationPass

        before = len(model.graph)
        opsets = dict(model.ir.opset_imports)
        CommonSubexpressionEliminationPass()(model.ir)
        merged_from = len(model.graph)
        removed = remove_unused(model)
        stale = _drop_stale_shapes(model)
        gone = sorted(set(opsets) - set(model.ir.opset_imports))
        merged = before - merged_from
        matches = merged + removed + len(gone) + stale
        notes = [f"{merged} equal nodes merged, {removed} unused nodes and initializers dropped"] if matches else ["nothing to clean"]
        if stale:
            notes.append(f"{stale} recorded shapes contradicted the graph and were dropped")
        notes += [f"unused operator set {domain!r} no longer imported" for domain in gone]
        return PassResult(bool(matches), matches, notes)


def _drop_stale_shapes(model: Model) -> int:
    facts = analyse(model)
    dropped = 0
    for node in model.graph:
        for output in node.outputs:
            fact = facts[output]
            if output.shape is None or fact.shape is None:
                continue
            agrees = len(output.shape) == len(fact.shape) and all(not isinstance(d, int) or d == size for d, size in zip(output.shape, fact.shape, strict=True))
            if not agrees or (fact.dtype is not None and output.dtype not in (None, fact.dtype)):
                output.shape = output.type = None
                dropped += 1
    return dropped
