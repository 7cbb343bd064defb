"""Replace calls of model-local functions by their nodes."""

from __future__ import annotations

from dataclasses import dataclass

from onnxtools.model import Model
from onnxtools.passbase import Pass, PassResult


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Every other pass looks at nodes, so functions go first; onnx_ir's inliner does the work."""

    name = "inline-functions"
    example = "onnxtools inline-functions model.onnx flat.onnx"

    def apply(self, model: Model) -> PassResult:
        count = len(model.ir.functions)
        if not count:
            return PassResult(False, 0, ["no model-local function"])
        from onnx_ir.passes.common import InlinePass

        InlinePass()(model.ir)
        return PassResult(True, count, [f"{count} functions inlined"])
