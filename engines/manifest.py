"""`gpt.engine.json`: what went into an engine and what came out, enough to check it later without the builder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxtools import __version__
from onnxtools.engines.builder import Builder, Built
from onnxtools.engines.preflight import Preflight
from onnxtools.engines.profiles import Profile
from onnxtools.engines.spec import EngineSpec
from onnxtools.manager import PROVENANCE_KEY
from onnxtools.memory import peak_mib
from onnxtools.model import Model
from onnxtools.tensors import external_path

FORMAT = "onnxtools.engine/1"
_PIECE = 8 << 20


def manifest_path(engine_path: Path) -> Path:
    return engine_path.with_name(f"{engine_path.name}.json")


def hash_file(path: Path) -> dict[str, Any]:
    """Name, size in bytes and sha256 of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            size += len(piece)
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def hash_weights(model: Model) -> list[dict[str, Any]]:
    """`hash_file` of every data file that the graph refers to."""
    return [hash_file(path) for path in sorted({external_path(tensor) for tensor in model.external_tensors()})]


def make_manifest(
    model: Model, spec: EngineSpec, builder: Builder, profiles: Sequence[Profile], checked: Preflight, built: Built,
    *, engine: str, weights: list[dict[str, Any]], notes: Sequence[str], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """The manifest as plain data.

    Args:
        engine: file name of the plan.
        weights: `hash_weights(model)`.
        seconds: wall time of parsing, building and writing.
    """
    graph = {"file": model.path.name if model.path else None, "sha256": model.sha256}
    return {
        "format": FORMAT,
        "onnxtools": __version__,
        "backend": {"name": builder.name, "version": builder.version()},
        "engine": {"file": engine, "bytes": built.size, "sha256": built.sha256},
        "graph": {**graph, "opset": model.opset, "ir_version": model.ir.ir_version},
        "weights": weights,
        "provenance": json.loads(model.ir.metadata_props.get(PROVENANCE_KEY, "[]")),
        "spec": spec.as_json(),
        "compute_capabilities": list(spec.compute_capability),
        "profiles": [profile.as_json() for profile in profiles],
        "io_source": built.io_source,
        "inputs": [info.as_json() for info in built.inputs],
        "outputs": [info.as_json() for info in built.outputs],
        "layers": {"source": "parsed network", "types": built.layers, "output_dtypes": built.precisions},
        "sparsity": checked.sparsity.as_json() if checked.sparsity is not None else None,
        "mends": built.mends,
        "notes": [*model.notes, *checked.notes, *notes],
        "warnings": built.warnings,
        "build_seconds": round(seconds, 3),
        "peak_rss_mib": round(peak_mib(), 1),
    }
