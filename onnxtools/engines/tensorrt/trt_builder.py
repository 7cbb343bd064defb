"""The TensorRT backend, 8.6 to 11, for the GPU of this machine.

NOT YET RUN: no machine of this project has the library.

The build itself is in `python_api`, which TensorRT-RTX runs in every test; this module holds only the parts that are
specific to TensorRT. The tests compare the names that it uses with the bindings of 10.13 and 11.4.
"""

from __future__ import annotations

from typing import Any

import tensorrt as trt

from onnxtools.base.errors import JobError
from onnxtools.engines.build.builder import Limits
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.engines.build.versions import Version, ceilings, is_mixed, is_strongly_typed, release
from onnxtools.engines.tensorrt.python_api import ApiBuilder
from onnxtools.ir.model import Model


class TensorRTBuilder(ApiBuilder):
    """See `onnxtools.engines.build.builder.Builder`."""

    name, title = "tensorrt", "TensorRT"

    def __init__(self) -> None:
        if not hasattr(trt, "Builder"):  # stubs without the library make an empty package
            raise JobError(
                "builder 'tensorrt' needs the library of TensorRT, of which only stubs are installed; install it"
            )
        super().__init__(trt)

    def limits(self) -> Limits:
        opset, ir_version = ceilings(self._number)
        return Limits(opset=opset, ir_version=ir_version, capabilities=())

    @property
    def _number(self) -> Version:
        return release(self.version())

    def strong(self, model: Model, spec: EngineSpec) -> bool:
        return is_strongly_typed(spec, self.name, self._number, is_mixed(model))

    def network_flags(self, *, strong: bool) -> int:
        explicit = 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH) if self._number < (10,) else 0
        return super().network_flags(strong=strong) | explicit

    def configure(self, config: Any, spec: EngineSpec, *, strong: bool) -> None:
        _choose_device(spec.device)
        for name in () if strong else spec.demanded:
            config.set_flag(getattr(trt.BuilderFlag, name.upper()))
        if spec.hardware_compatibility_level != "none":
            level = {"ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"}[
                spec.hardware_compatibility_level
            ]
            config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
        if spec.tactic_sources is not None:
            config.set_tactic_sources(_sources(config.get_tactic_sources(), spec.tactic_sources))


def _choose_device(device: int) -> None:
    if device == 0:
        return  # device 0 is the current device
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise JobError(
            f"--device {device} needs cuda-python ({error}); pip install cuda-python, or set "
            f"CUDA_VISIBLE_DEVICES={device}"
        ) from None
    (status,) = runtime.cudaSetDevice(device)
    if int(status):
        raise JobError(f"--device {device}: {runtime.cudaGetErrorString(status)[1].decode()}; see nvidia-smi")


def _sources(mask: int, text: str) -> int:
    """trtexec's '-CUDNN,+CUBLAS' applied to a mask of TacticSource."""
    for word in text.split(","):
        bit = 1 << int(getattr(trt.TacticSource, word[1:]))
        mask = mask | bit if word[0] == "+" else mask & ~bit
    return mask
