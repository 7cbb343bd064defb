"""Compute capabilities of GPUs, and the capability that a plan is built for by default."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from onnxtools.base.errors import JobError
from onnxtools.engines.build.builder import Limits
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.engines.kernels.library import device_capability

GPUS = {
    "7.5": "T4, RTX 20 series", "8.0": "A100, A30", "8.6": "A10, A40, RTX 30 series", "8.7": "Jetson Orin",
    "8.9": "L4, L40S, RTX 40 series", "9.0": "H100, H200, GH200", "10.0": "B200, GB200", "10.3": "B300, GB300",
    "11.0": "Jetson Thor", "12.0": "RTX 50 series, RTX PRO Blackwell", "12.1": "DGX Spark",
}  # fmt: skip
"""NVIDIA's list of CUDA GPUs, by compute capability."""
FALLBACK = "8.9"
"""The capability to build for without a GPU: the first one with FP8 that TensorRT-RTX builds for."""


def named(capability: str) -> str:
    """The capability with its GPUs, as '8.9 (L4, L40S, RTX 40 series)'."""
    return f"{capability} ({GPUS[capability]})" if capability in GPUS else capability


def with_capability(spec: EngineSpec, limits: Limits) -> tuple[EngineSpec, str]:
    """`spec` with the compute capability of this machine's GPU, if it names none and the builder can choose.

    Returns:
        The specification, and a last line for people if there is no GPU, else "".

    Raises:
        JobError: the builder does not build for the GPU of this machine; the message says what does.
    """
    if spec.compute_capability or not limits.capabilities:
        return spec, ""
    number = device_capability()
    if not number:
        fallback = dataclasses.replace(spec, compute_capability=(FALLBACK,))
        return fallback, f"no GPU is here: the plan is for {named(FALLBACK)} alone; {ways_on(limits.capabilities)}"
    capability = f"{number // 10}.{number % 10}"
    if capability not in limits.capabilities:
        raise JobError(
            f"the GPU of this machine has compute capability {named(capability)}; {ways_on(limits.capabilities)}"
        )
    return dataclasses.replace(spec, compute_capability=(capability,)), ""


def ways_on(capabilities: Sequence[str]) -> str:
    """Advice for people: how to build for other GPUs than those of `capabilities`."""
    others = [f"{names} ({capability})" for capability, names in GPUS.items() if capability not in capabilities]
    return (
        f"--compute-capability names another of {', '.join(map(named, capabilities))}; for {', '.join(others)} take "
        "TensorRT itself: --print-trtexec prints the line to run where it is installed, or pip install tensorrt there "
        "and build with --backend tensorrt"
    )
