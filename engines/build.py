"""`build`: a graph becomes a plan and its manifest, or nothing is written."""

from __future__ import annotations

import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from onnxtools.engines.builder import Engine, get_builder
from onnxtools.engines.manifest import hash_weights, make_manifest, manifest_path
from onnxtools.engines.preflight import preflight
from onnxtools.engines.profiles import profiles_for
from onnxtools.engines.spec import EngineSpec
from onnxtools.engines.timing_cache import check_timing_cache, rtx_note
from onnxtools.errors import JobError, UsageError
from onnxtools.model import Model
from onnxtools.storage import replacing, temporary, write_error
from onnxtools.tensors import external_path


def build(source: Path | Model, engine_path: Path, spec: EngineSpec) -> Engine:
    """Check, build, and write `engine_path` and `engine_path`.json.

    Args:
        source: an ONNX file, parsed as it lies on the disk; or a model in memory, which is saved to a temporary folder
            beside the engine first (its weights are copied).
    Raises:
        UsageError: the options do not fit each other or the graph.
        JobError: the graph is refused, the builder fails, or the engine cannot be written. No file is left behind, and an
            engine that was there before stays.
    """
    check_target(engine_path)
    if isinstance(source, Model):
        with tempfile.TemporaryDirectory(prefix=".onnxtools-build-", dir=engine_path.parent) as folder:
            copy = Path(folder) / (source.path.name if source.path else "model.onnx")
            source.save(copy)
            return build(copy, engine_path, spec)
    notes = []
    if spec.timing_cache is not None:
        check_timing_cache(Path(spec.timing_cache))
        notes.append(rtx_note(Path(spec.timing_cache)))
    model = Model.load(source)
    _refuse_overwriting(model, engine_path)
    builder = get_builder(spec.backend)
    profiles = profiles_for(model, spec)
    checked = preflight(model, spec, builder)
    # Both files are complete before either gets its name, and the plan gets it first. Hashing runs beside the build.
    with replacing(manifest_path(engine_path)) as manifest_tmp, replacing(engine_path) as plan_tmp, ThreadPoolExecutor(1) as pool:
        weights = pool.submit(hash_weights, model)
        started = time.monotonic()
        built = builder.build(model, source, plan_tmp, profiles, spec)
        seconds = time.monotonic() - started
        manifest = make_manifest(
            model, spec, builder, profiles, checked, built,
            engine=engine_path.name, weights=weights.result(), notes=notes, seconds=seconds,
        )  # fmt: skip
        manifest_tmp.write_text(json.dumps(manifest, indent=2) + "\n")
    return Engine(engine_path, manifest)


def check_target(engine_path: Path) -> None:
    """Refuse, before hours of building, a place that cannot be written.

    Raises:
        JobError: the folder is missing or not writable, or the name is taken by a folder.
    """
    if not engine_path.parent.is_dir():
        raise JobError(f"{engine_path}: the folder {str(engine_path.parent)!r} does not exist; create it first")
    for path in (engine_path, manifest_path(engine_path)):
        if path.is_dir():
            raise JobError(f"{path}: is a folder; name a file")
        probe = temporary(path)
        try:
            probe.touch()
        except OSError as error:
            raise write_error(path, error) from error
        finally:
            probe.unlink(missing_ok=True)


def _refuse_overwriting(model: Model, engine_path: Path) -> None:
    files = {external_path(tensor) for tensor in model.external_tensors()} | ({model.path} if model.path else set())
    for target in (engine_path, manifest_path(engine_path)):
        if target.resolve() in {file.resolve() for file in files}:
            raise UsageError(f"{target} is the model or its data file; name another file for the engine")
