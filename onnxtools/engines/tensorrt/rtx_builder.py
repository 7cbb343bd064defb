"""The TensorRT-RTX backend: builds on a CPU, for one or several compute capabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorrt_rtx as trt

from onnxtools.engines.build.builder import Limits
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.engines.tensorrt.python_api import ApiBuilder
from onnxtools.engines.tensorrt.rtx_lowering import lower_for_rtx, needs_lowering
from onnxtools.ir.model import Model


class TensorRTRTXBuilder(ApiBuilder):
    """See `onnxtools.engines.build.builder.Builder`."""

    name, title = "tensorrt-rtx", "TensorRT-RTX"

    def __init__(self) -> None:
        super().__init__(trt)

    def limits(self) -> Limits:
        capabilities = [
            f"{name[2:-1]}.{name[-1]}" for name in trt.ComputeCapability.__members__ if name.startswith("SM")
        ]
        return Limits(opset=25, ir_version=13, capabilities=tuple(sorted(capabilities, key=float)))

    def changes(self, model: Model) -> list[Callable[[Model], list[str]]]:
        return [lower_for_rtx] if needs_lowering(model) else []

    def configure(self, config: Any, spec: EngineSpec, *, strong: bool) -> None:
        config.num_compute_capabilities = len(spec.compute_capability)
        for index, text in enumerate(spec.compute_capability):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{text.replace('.', '')}"), index)
