"""`gpt.engine.json`: the inputs and the result of a build, enough to check an engine later without the builder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnxtools.base.errors import JobError
from onnxtools.base.inputs import check_regular, shown
from onnxtools.base.memory import peak_mib
from onnxtools.base.version import __version__
from onnxtools.engines.build.builder import Builder, Built
from onnxtools.engines.build.preflight import Preflight
from onnxtools.engines.build.profiles import Profile
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.ir import description
from onnxtools.ir.model import Model
from onnxtools.ir.provenance import provenance
from onnxtools.ir.rank import Rank
from onnxtools.storage.records import recorded
from onnxtools.storage.rows import external_path

FORMAT = "onnxtools.engine/1"
_PIECE = 8 << 20


def manifest_path(engine_path: Path) -> Path:
    """The path of the manifest: that of the plan with `.json` appended."""
    return engine_path.with_name(f"{engine_path.name}.json")


def hash_file(path: Path) -> dict[str, Any]:
    """`file` (name), `bytes` (size) and `sha256` (hexadecimal) of a file, which is read in pieces."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            size += len(piece)
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def hash_weights(model: Model) -> list[dict[str, Any]]:
    """`hash_file` of every data file that the graph refers to."""
    return [hash_file(path) for path in sorted({external_path(tensor) for tensor in model.external_tensors()})]


@dataclass(frozen=True)
class BuildRecord:
    """One build, of which a manifest is record.

    Attributes:
        model: the model that was built.
        origin: the user's model, which differs from `model` if it was pruned for the build.
        checked: the result of the checks before the build.
        built: what the builder reported.
        engine: file name of the plan.
        path: path of the model, relative to the plan's folder; None if it was in memory.
        weights: `hash_weights(origin)`.
        audit: `audit.summary` of the engine.
        notes: further notes for people.
        seconds: wall time of parsing, building and writing.
    """

    model: Model
    origin: Model
    spec: EngineSpec
    builder: Builder
    profiles: Sequence[Profile]
    checked: Preflight
    built: Built
    engine: str
    path: str | None
    weights: list[dict[str, Any]]
    audit: dict[str, Any]
    notes: Sequence[str]
    seconds: float


def make_manifest(record: BuildRecord) -> dict[str, Any]:
    """The manifest of a build as plain data."""
    model, origin, spec, built = record.model, record.origin, record.spec, record.built
    props = origin.ir.metadata_props
    graph = {
        "file": origin.path.name if origin.path else None,
        "sha256": origin.sha256,
        "path": record.path,
        "info": description.text(origin),
        "beside": recorded(props)["beside"],
    }
    rank, sparsity = Rank.read(origin), record.checked.sparsity
    return {
        "format": FORMAT,
        "onnxtools": __version__,
        "backend": {"name": record.builder.name, "version": record.builder.version()},
        "engine": {"file": record.engine, "bytes": built.size, "sha256": built.sha256},
        "graph": {**graph, "opset": model.opset, "ir_version": model.ir.ir_version},
        **({"rank": asdict(rank)} if rank is not None else {}),
        "weights": record.weights,
        "weight_bytes": origin.weight_bytes(),
        "provenance": provenance(model),
        "spec": spec.as_json(),
        "compute_capabilities": list(spec.compute_capability),
        "profiles": [profile.as_json() for profile in record.profiles],
        "io_source": built.io_source,
        "inputs": [info.as_json() for info in built.inputs],
        "outputs": [info.as_json() for info in built.outputs],
        "layers": {"source": "parsed network", "types": built.layers, "output_dtypes": built.precisions},
        "audit": record.audit,
        "sparsity": sparsity.built(built.engine_layers).as_json() if sparsity is not None else None,
        "mends": built.mends,
        "notes": [*model.notes, *record.checked.notes, *built.notes, *record.notes],
        "warnings": built.warnings,
        "build_seconds": round(record.seconds, 3),
        "peak_rss_mib": round(peak_mib(), 1),
    }


def read_manifest(engine: Path) -> dict[str, Any]:
    """The manifest beside a plan.

    Raises:
        JobError: there is none, or it was not written by this version of `onnxtools build`.
    """
    path = manifest_path(engine)
    try:
        check_regular(path, JobError)
        manifest = json.loads(path.read_bytes())
        _check_shape(manifest)
    except OSError:
        where = (
            f"{path}: there is no such manifest, so {engine.name} is no engine of onnxtools"
            if engine.is_file()
            else f"{engine}: no such file"
        )
        raise JobError(f"{where}; build one with onnxtools build") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise JobError(f"{path}: is no manifest of this onnxtools build ({error}); build the engine again") from None
    return manifest  # type: ignore[no-any-return]


_SHAPE: dict[str, Any] = {
    "format": str, "onnxtools": str, "backend": {"name": str, "version": str},
    "engine": {"file": str, "bytes": int, "sha256": str}, "graph": {"sha256": str},
    "weights": [{"file": str, "bytes": int, "sha256": str}], "provenance": list, "spec": dict,
    "compute_capabilities": [str],
    "profiles": [{"name": str, "inputs": {"*": {"min": [int], "opt": [int], "max": [int]}}}], "io_source": str,
    "inputs": [{"name": str, "dtype": str, "shape": [int]}], "outputs": [{"name": str, "dtype": str, "shape": [int]}],
    "layers": {"types": dict, "output_dtypes": dict}, "audit": {"source": str, "outputs": dict}, "mends": [str],
    "notes": [str], "warnings": [str], "build_seconds": (int, float), "peak_rss_mib": (int, float),
}  # fmt: skip
"""Keys of a manifest and the types of their values; `*` stands for any key."""


def _check_shape(content: Any, shape: Any = _SHAPE, where: str = "it") -> None:
    """Raise ValueError or KeyError if `content` does not have the keys and types of `shape`."""
    kind = type(shape) if isinstance(shape, (dict, list)) else shape
    if not isinstance(content, kind) or isinstance(content, bool):
        raise ValueError(f"{where} is {type(content).__name__}")
    value: Any = content
    if isinstance(shape, dict):
        named = dict.fromkeys(value, shape["*"]) if "*" in shape else shape
        for key, inner in named.items():
            if key not in value:
                raise ValueError(f"it has no {key!r}")
            _check_shape(value[key], inner, shown(key))
        if shape is _SHAPE and value["format"] != FORMAT:
            raise ValueError(f"its format is {shown(value['format'])}, not {FORMAT}")
    elif isinstance(shape, list):
        for entry in value:
            _check_shape(entry, shape[0], where)


def check_plan(engine: Path, manifest: Mapping[str, Any], *, version: str, capability: str) -> None:
    """Refuse a plan that cannot run here or is not the one that was built, before TensorRT reads it.

    Args:
        version: version of the library that would run the plan.
        capability: compute capability of the GPU, as '8.9'.

    Raises:
        JobError: says which, and what to do.
    """
    backend, spec = manifest["backend"], manifest["spec"]
    if backend["version"] != version and not spec.get("version_compatible"):
        raise JobError(
            f"{engine}: was built by {backend['name']} {backend['version']} and {version} is installed; build it "
            "again, or install that one"
        )
    capabilities = manifest["compute_capabilities"]
    if backend["name"] == "tensorrt-rtx" and capability not in capabilities:
        names = ", ".join(capabilities)
        raise JobError(
            f"{engine}: was built for compute capability {names}, and this GPU has {capability}; build it with "
            f"--compute-capability {capability}"
        )
    check_unchanged(engine, manifest)


def check_unchanged(engine: Path, manifest: Mapping[str, Any]) -> None:
    """Check that the plan is the one that the manifest describes.

    Raises:
        JobError: the plan is missing, or its hash differs.
    """
    if not engine.is_file():
        raise JobError(f"{engine}: is not there, only its manifest; build it again, or bring it back")
    if _changed(engine, manifest["engine"]):
        raise JobError(f"{engine}: is not the file that its manifest describes (changed, or damaged); build it again")


def check_files(engine: Path, manifest: Mapping[str, Any], graph: Path | None = None) -> list[tuple[str, str]]:
    """(file, problem) for each file that a manifest names; the problem is "" if the file is unchanged.

    Args:
        graph: path of the model; by default where it was when the engine was built.
    """
    model_path = manifest["graph"].get("path")
    model = graph or (engine.parent / model_path if model_path else None)
    files = [(str(engine), _changed(engine, manifest["engine"]))]
    if model is None:
        return [*files, ("graph", "was made in memory: name the model to compare with")]
    files.append((str(model), _changed(model, {"sha256": manifest["graph"]["sha256"]})))
    return files + [
        (str(model.parent / entry["file"]), _changed(model.parent / entry["file"], entry))
        for entry in manifest["weights"]
    ]


def _changed(path: Path, entry: Mapping[str, Any]) -> str:
    if not path.is_file():
        return "is not there"
    return "" if hash_file(path)["sha256"] == entry["sha256"] else "has changed since the engine was built"
