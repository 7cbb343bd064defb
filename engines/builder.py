"""What every builder offers. TensorRT 8.6 to 11 and trtexec plug in here by implementing `Builder`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from onnxtools import registry
from onnxtools.engines.profiles import Profile
from onnxtools.engines.spec import EngineSpec
from onnxtools.errors import JobError
from onnxtools.model import Model


@dataclass(frozen=True)
class Limits:
    """What a builder can read and build for.

    Attributes:
        opset: newest default operator set.
        ir_version: newest ONNX IR version.
        capabilities: compute capabilities, as '8.9'.
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
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass
class Built:
    """What a builder knows about the plan it wrote.

    Attributes:
        io_source: where `inputs` and `outputs` were read: the plan, or the network it was made from.
        layers: layer type -> count, of the parsed network.
        precisions: dtype -> number of layer outputs, of the parsed network.
        mends: what was changed on the network so that it means what the graph means.
        warnings: the builder's own, each once.
        size, sha256: of the plan file, in bytes and hexadecimal.
    """

    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    io_source: str
    layers: dict[str, int] = field(default_factory=dict)
    precisions: dict[str, int] = field(default_factory=dict)
    mends: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    size: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Engine:
    """A plan file and its manifest, the dictionary that lies beside it as JSON."""

    path: Path
    manifest: dict[str, Any]


class Builder(Protocol):
    """A backend, registered by its name in the entry-point group `onnxtools.builders`."""

    name: str

    def version(self) -> str:
        """Version of the library that builds."""
        ...

    def limits(self) -> Limits:
        """What the library reads and builds for."""
        ...

    def supports(self, op_type: str) -> bool:
        """Whether the parser knows an operator of this type."""
        ...

    def build(self, model: Model, source: Path, plan: Path, profiles: Sequence[Profile], spec: EngineSpec) -> Built:
        """Build the graph in the file `source` (which `model` was loaded from) and write the plan to `plan`.

        Raises:
            JobError: the parser or the builder refuses the graph; the message names the node and the reason.
            OSError: `plan` cannot be written.
        """
        ...


def get_builder(name: str) -> Builder:
    """The builder registered as `name`.

    Raises:
        UsageError: nobody registered that name.
        JobError: its library is not installed.
    """
    try:
        builder: Builder = registry.load(name, registry.BUILDERS)()
    except ImportError as error:
        raise JobError(f"builder {name!r} needs a library that cannot be imported ({error}); install it") from error
    return builder
