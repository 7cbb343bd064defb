"""Which TensorRT versions have which option, what replaces a missing option, and what is refused.

Sources: trtexec's help texts and release notes of 8.6, 9.3, 10.13 and 11.4, NVIDIA's migration guides 8.x to 10.x and
10.x to 11.x, the bindings of 10.13 and 11.4 (their names are compared with this table in the tests).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from onnxtools.base.errors import UsageError
from onnxtools.engines.build.spec import EngineSpec, version_of
from onnxtools.ir.model import Model
from onnxtools.ir.query import is_op

Version = tuple[int, ...]


@dataclass(frozen=True)
class Feature:
    """An option that not every TensorRT has.

    Attributes:
        option: the field of `EngineSpec`.
        since: first version of TensorRT with the option.
        until: first version without it; None if all later versions have it.
        rtx: whether TensorRT-RTX has the option.
        instead: what to do where the option is missing.
    """

    option: str
    since: Version = (8, 6)
    until: Version | None = None
    rtx: bool = True
    instead: str = "leave it out"


FEATURES = (
    Feature("strongly_typed", since=(9,)),
    Feature("error_on_cache_miss", since=(9,), rtx=False),
    Feature("tiling_optimization_level", since=(10, 8)),
    Feature(
        "hardware_compatibility_level",
        rtx=False,
        instead="leave it out and name every capability with --compute-capability",
    ),
    Feature("version_compatible", rtx=False),
    Feature("mem_pool_size"),
    Feature("refit"),
    Feature("strip_weights", since=(10,)),
    Feature("allow_weight_streaming", since=(10,)),
    Feature("tactic_sources", rtx=False),
    Feature("plugins"),
    Feature("device", rtx=False, instead="leave it out: it builds on the CPU"),
    Feature("bf16", since=(9,)),
    Feature("int4", since=(10,)),
)


def release(text: str) -> Version:
    """The first three numbers of a library's version: (1, 7, 1) of '1.7.1.116+cu13'; (0,) of any other text."""
    match = re.match(r"\d+(\.\d+){0,2}", text)
    return version_of(match[0]) if match else (0,)


def check_options(spec: EngineSpec, backend: str, version: Version) -> None:
    """Refuse options that this version of TensorRT does not have.

    Raises:
        UsageError: names the option, the version and what to do.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(spec)}
    rtx = backend == "tensorrt-rtx"
    for feature in FEATURES:
        value = getattr(spec, feature.option)
        if value == defaults[feature.option] or not value:
            continue
        is_missing = (
            not feature.rtx
            if rtx
            else version < feature.since or (feature.until is not None and version >= feature.until)
        )
        if is_missing:
            where = (
                "TensorRT-RTX has none"
                if rtx
                else f"TensorRT {'.'.join(map(str, version))} has none ({_range(feature)})"
            )
            raise UsageError(f"--{feature.option.replace('_', '-')}: {where}; {feature.instead}")
    if not rtx:
        _check_values(spec, backend, version)
    if spec.strongly_typed is False and (rtx or version >= (11,)):
        raise UsageError(
            "--no-strongly-typed: networks are always strongly typed here; put types into the graph with `onnxtools "
            "precision` and `quantize`"
        )


def _check_values(spec: EngineSpec, backend: str, version: Version) -> None:
    """Refuse values that this version of TensorRT does not have."""
    number = ".".join(map(str, version))
    if spec.hardware_compatibility_level == "sameComputeCapability" and version < (10, 9):
        raise UsageError(
            f"--hardware-compatibility-level sameComputeCapability: came with TensorRT 10.9, not {number}; use ampere+ "
            "or none"
        )
    if any(text.startswith("tacticSharedMem") for text in spec.mem_pool_size) and version < (9,):
        raise UsageError(f"--mem-pool-size tacticSharedMem: TensorRT {number} has no such pool; leave it out")
    gone = re.search(r"CUBLAS(_LT)?|CUDNN", spec.tactic_sources or "", re.IGNORECASE)
    if gone and version >= (11,):
        raise UsageError(
            f"--tactic-sources {gone[0]}: TensorRT 11 has EDGE_MASK_CONVOLUTIONS and JIT_CONVOLUTIONS alone; leave it "
            "out"
        )
    if spec.fp8 and spec.int8 and version < (11,) and spec.strongly_typed is False:
        raise UsageError("--fp8 and --int8: weakly typed networks take one of them; drop --no-strongly-typed, or one")
    if spec.allow_weight_streaming and spec.strongly_typed is False:
        raise UsageError("--allow-weight-streaming: takes a strongly typed network; drop --no-strongly-typed")


_CEILINGS: tuple[tuple[Version, int, int], ...] = (
    ((8, 6), 17, 8),
    ((9,), 19, 9),
    ((10,), 20, 10),
    ((10, 9), 22, 10),
    ((11,), 24, 12),
)
"""(first TensorRT, newest opset, newest ONNX IR) of its parser (onnx-tensorrt's operators.md of that version)."""


def ceilings(version: Version) -> tuple[int, int]:
    """Newest opset and ONNX IR version that the parser of `version` reads."""
    reached = [(opset, ir) for first, opset, ir in _CEILINGS if version >= first]
    return reached[-1] if reached else (17, 8)


def is_mixed(model: Model) -> bool:
    """Whether the graph sets types itself: it has Q/DQ, or more than one floating-point type."""
    if any(is_op(node, "QuantizeLinear", "DequantizeLinear") for node in model.graph.all_nodes()):
        return True
    kinds = {
        value.dtype
        for node in model.graph.all_nodes()
        for value in node.outputs
        if value.dtype is not None and value.dtype.is_floating_point()
    }
    return len(kinds | {tensor.dtype for _, tensor in model.weights() if tensor.dtype.is_floating_point()}) > 1


def _range(feature: Feature) -> str:
    since, until = ".".join(map(str, feature.since)), feature.until
    return f"it came with {since}" + (f" and went with {'.'.join(map(str, until))}" if until else "")


def is_strongly_typed(spec: EngineSpec, backend: str, version: Version, mixed: bool) -> bool:
    """Whether the network is built with the graph's own types.

    Args:
        mixed: whether the graph has Q/DQ or more than one floating-point type.
    """
    if backend == "tensorrt-rtx" or version >= (11,):
        return True
    if version < (9,):
        return False
    return mixed if spec.strongly_typed is None else spec.strongly_typed
