"""Run any onnx_ir pass as a pass, onnxscript's rewrite rules among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from onnxtools.base.errors import JobError, UsageError, one_line
from onnxtools.base.options import option
from onnxtools.base.registry import load_object
from onnxtools.ir.model import Model
from onnxtools.pipeline.passbase import Pass, PassResult


@dataclass(frozen=True)
class IrPass(Pass):
    """Apply an `onnx_ir.passes.PassBase` to the model.

    Rules:
      - `transform` is an instance; in a recipe and on the command line it is package.module:name, the name of a class
        without arguments or of an instance;
      - the preconditions and postconditions of `transform` are checked; the model that it returns is kept;
      - a rewrite rule of onnxscript is run as IrPass(onnxscript.rewriter.RewritePass([rule])).
    """

    name = "ir-pass"
    numerics = "lossy"
    runs_code = True
    example = "onnxtools ir-pass model.onnx out.onnx --transform onnx_ir.passes.common:IdentityEliminationPass"

    transform: str | ir.passes.PassBase = option("", "The pass, as package.module:name.")

    def options(self) -> dict[str, Any]:
        kind = type(self.transform)
        return {
            "transform": self.transform if isinstance(self.transform, str) else f"{kind.__module__}:{kind.__qualname__}"
        }

    def apply(self, model: Model) -> PassResult:
        transform, before = self._pass(), len(model.graph)
        try:
            result = transform(model.ir)
        except (ir.passes.InvariantError, ir.passes.PassError) as error:
            raise JobError(
                f"ir-pass: {self.options()['transform']} refuses the model ({one_line(error.__cause__ or error)}); see "
                "its documentation"
            ) from error
        model.ir = result.model
        note = f"{self.options()['transform']}: {before} -> {len(model.graph)} nodes"
        return PassResult(
            result.modified, int(result.modified), [note if result.modified else f"{note}, nothing matched"]
        )

    def _pass(self) -> ir.passes.PassBase:
        candidate = (
            load_object("ir-pass: transform", self.transform) if isinstance(self.transform, str) else self.transform
        )
        transform = candidate() if isinstance(candidate, type) else candidate
        if not isinstance(transform, ir.passes.PassBase):
            raise UsageError(
                f"ir-pass: {self.transform!r} is no onnx_ir.passes.PassBase; name a class or an instance of one"
            )
        return transform
