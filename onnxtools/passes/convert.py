"""`convert`: a TransformerEngine export to standard ONNX."""

from __future__ import annotations

from dataclasses import dataclass

from onnxtools.base.options import option
from onnxtools.passes.cleanup import Cleanup
from onnxtools.passes.drop_stale_types import DropStaleTypes
from onnxtools.passes.fold_constants import FoldConstants
from onnxtools.passes.inline_functions import InlineFunctions
from onnxtools.passes.legalize import Legalize
from onnxtools.passes.set_opset import SetOpset
from onnxtools.passes.te.te_fp8_to_qdq import TeFp8ToQdq
from onnxtools.passes.te.te_mxfp8_to_qdq import TeMxfp8ToQdq
from onnxtools.pipeline.passbase import Pass


@dataclass(frozen=True)
class Convert(Pass):
    """Make a TransformerEngine (or plain torch) export standard: ONNX Runtime runs it and TensorRT's parser takes it.

    A composite: raises the opset, rewrites `trt::` operators to Q/DQ, folds weights and constants, and replaces the
    operators that TensorRT refuses.
    """

    name = "convert"
    example = "onnxtools convert te.onnx qdq.onnx --opset19"

    opset: int = option(19, "Lowest opset of the result; a newer model keeps its own.", flags={"--opset19": 19})
    fold_weights: bool = option(True, "Store weights as FP8 instead of quantizing them in the graph.")
    keep_mx: bool = option(False, "Keep dynamic MXFP8 quantization of activations as TensorRT's custom operators.")

    def __post_init__(self) -> None:
        self.expand()  # a wrong opset is refused before any work

    def expand(self) -> list[Pass]:
        return [
            InlineFunctions(),
            DropStaleTypes(),
            SetOpset(self.opset),
            Legalize(),
            FoldConstants(),
            TeFp8ToQdq(self.fold_weights),
            TeMxfp8ToQdq(self.keep_mx),
            Cleanup(),
        ]
