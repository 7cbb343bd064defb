"""The interface of builders. TensorRT 8.6 to 11, TensorRT-RTX and trtexec implement `Builder`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from onnxtools.base import registry
from onnxtools.base.errors import JobError
from onnxtools.base.extras import install_line
from onnxtools.engines.build.audit import EngineLayer
from onnxtools.engines.build.profiles import Profile
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.ir.model import Model


@dataclass(frozen=True)
class Limits:
    """The models that a builder reads, and the GPUs that it builds for.

    Attributes:
        opset: newest default operator set.
        ir_version: newest ONNX IR version.
        capabilities: compute capabilities, as '8.9'; empty if it builds for the GPU of this machine alone.
    """

    opset: int
    ir_version: int
    capabilities: tuple[str, ...]


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of an engine; -1 in `shape` is a dynamic dimension, `dtype` is numpy's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """The entry of the manifest."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass
class Built:
    """What a builder knows about the plan that it wrote.

    Attributes:
        inputs: inputs of the engine, in order.
        outputs: outputs of the engine, in order.
        io_source: where `inputs` and `outputs` were read: the plan, or the network it was built from.
        layers: layer type -> count, of the parsed network.
        precisions: dtype -> number of layer outputs, of the parsed network.
        mends: changes of the network that give it the meaning of the graph.
        notes: further notes for people.
        warnings: the builder's own warnings, each once.
        size: size of the plan file in bytes.
        sha256: hash of the plan file, hexadecimal.
        engine_layers: layers of the engine's inspector; None if the engine cannot be read back.
    """

    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    io_source: str
    layers: dict[str, int] = field(default_factory=dict)
    precisions: dict[str, int] = field(default_factory=dict)
    mends: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    size: int = 0
    sha256: str = ""
    engine_layers: list[EngineLayer] | None = None


@dataclass(frozen=True)
class Engine:
    """A plan file and its manifest.

    Attributes:
        path: the plan file.
        manifest: the content of the JSON file beside the plan.
        reused: whether the engine existed already, and building it again would have given the same.
        last: note for people on the GPU that the plan is for; "" if they named it themselves.
    """

    path: Path
    manifest: dict[str, Any]
    reused: bool = False
    last: str = ""


class Reader(Protocol):
    """What a version of TensorRT can read."""

    name: str

    def limits(self) -> Limits:
        """The models that the library reads, and the GPUs that it builds for."""
        ...

    def supports(self, op_type: str) -> bool:
        """Whether the parser knows an operator of this type."""
        ...


class Builder(Reader, Protocol):
    """A backend, registered by its name in the entry-point group `onnxtools.builders`."""

    def version(self) -> str:
        """Version of the library that builds."""
        ...

    def build(self, model: Model, source: Path, plan: Path, profiles: Sequence[Profile], spec: EngineSpec) -> Built:
        """Build the graph in the file `source` (which `model` was loaded from) and write the plan to `plan`.

        Raises:
            JobError: the parser or the builder refuses the graph; the message names the node and the reason.
            OSError: `plan` cannot be written.
        """
        ...


def get_builder(name: str) -> Builder:
    """The builder registered as `name`; `auto` takes the first that is installed: tensorrt, tensorrt-rtx, trtexec.

    Raises:
        UsageError: no builder is registered as `name`.
        JobError: its library is not installed.
    """
    if name == "auto":
        for candidate in ("tensorrt", "tensorrt-rtx", "trtexec"):
            with contextlib.suppress(JobError):
                return get_builder(candidate)
        raise JobError(
            f"no builder is installed; {install_line('rtx')} (builds without a GPU), or {install_line('tensorrt')}, or "
            "put trtexec on PATH"
        )
    builder: Builder = registry.load(name, registry.BUILDERS)()
    return builder
