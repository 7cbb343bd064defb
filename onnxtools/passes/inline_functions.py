"""Replace calls of model-local functions by their nodes."""

from __future__ import annotations

from dataclasses import dataclass

from onnxtools.base.errors import JobError, one_line
from onnxtools.ir.model import Model
from onnxtools.pipeline.passbase import Pass, PassResult


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Every other pass looks at nodes, so functions are inlined first; onnx_ir's inliner does the work."""

    name = "inline-functions"
    example = "onnxtools inline-functions model.onnx flat.onnx"

    def apply(self, model: Model) -> PassResult:
        count = len(model.ir.functions)
        if not count:
            return PassResult(False, 0, ["no model-local function"])
        from onnx_ir.passes.common import InlinePass

        try:
            InlinePass()(model.ir)
        except ValueError as error:  # functions of another opset, or recursive functions
            raise JobError(
                f"{model.path}: its functions cannot be inlined ({one_line(error, 200)}); export the model at one opset"
            ) from None
        return PassResult(True, count, [f"{count} functions inlined"])
