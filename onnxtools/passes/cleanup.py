"""Merge equal nodes and drop what nothing uses."""

from __future__ import annotations

from dataclasses import dataclass

from onnxtools.ir.edit import remove_unused
from onnxtools.ir.model import Model
from onnxtools.pipeline.passbase import Pass, PassResult


@dataclass(frozen=True)
class Cleanup(Pass):
    """Common sub-expressions are computed once; unused nodes, initializers and opset imports go.

    onnx_ir's own passes do the work; weights are compared by name only, never read.
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
        gone = sorted(set(opsets) - set(model.ir.opset_imports))
        merged = before - merged_from
        matches = merged + removed + len(gone)
        notes = (
            [f"{merged} equal nodes merged, {removed} unused nodes and initializers dropped"]
            if matches
            else ["nothing to clean"]
        )
        notes += [f"unused operator set {domain!r} no longer imported" for domain in gone]
        return PassResult(bool(matches), matches, notes)
