"""`build`: a graph becomes a plan and its manifest, or nothing is written."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.version import __version__
from onnxtools.engines.build.audit import holds, summary
from onnxtools.engines.build.builder import Builder, Engine, get_builder
from onnxtools.engines.build.gpus import with_capability
from onnxtools.engines.build.manifest import (
    FORMAT,
    BuildRecord,
    hash_file,
    hash_weights,
    make_manifest,
    manifest_path,
    read_manifest,
)
from onnxtools.engines.build.preflight import preflight
from onnxtools.engines.build.profiles import profiles_for
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.engines.build.timing_cache import check_timing_cache, rtx_note, with_cache_file
from onnxtools.engines.build.versions import check_options, is_mixed, is_strongly_typed, release
from onnxtools.ir.model import Model
from onnxtools.pipeline.manager import PassManager
from onnxtools.storage.files import OwnFolder, make_parent, probe, remove_dead, replacing
from onnxtools.storage.rows import external_path


def build(
    source: str | os.PathLike[str] | Model,
    engine_path: str | os.PathLike[str],
    spec: EngineSpec,
    *,
    force: bool = False,
) -> Engine:
    """Check, build, and write `engine_path` and `engine_path`.json.

    Args:
        source: an ONNX file, which is parsed from the disk; or a model in memory, which is first saved to a temporary
            folder beside the engine (its weights are copied).
        engine_path: where the plan is written.
        spec: the options of the build.
        force: build even if the existing engine is of the same graph, weights, options and builder.

    Raises:
        UsageError: the options do not fit each other, the graph or the version of the builder.
        JobError: the graph is refused, the builder fails, the engine lacks a demanded precision, or it cannot be
            written. No file is left behind, and an engine that existed before stays.
    """
    engine_path = Path(engine_path)
    check_target(engine_path)
    builder = get_builder(spec.backend)
    version = release(builder.version())
    check_options(spec, builder.name, version)
    spec, last = with_capability(with_cache_file(spec, builder.name, version), builder.limits())
    job = _Build(engine_path, spec, builder, force, last)
    prunes = spec.sparsity == "force" and builder.name != "trtexec"
    if isinstance(source, Model):
        return job.copied(source, None, prunes)
    source = Path(source)
    origin = Model.load(source)
    if existing := job.reusable(origin):
        return existing
    return job.copied(Model.load(source), origin, prunes) if prunes else job.run(origin, source, origin)


_FOLDER = ".onnxtools-build-"
"""Prefix of the folders beside the engine that hold a changed copy of the model."""


@dataclass(frozen=True)
class _Build:
    """One build of any model; `last` is a line for people that is shown last."""

    engine_path: Path
    spec: EngineSpec
    builder: Builder
    force: bool
    last: str = ""

    def reusable(self, model: Model) -> Engine | None:
        """The existing engine, if building this model would give the same; else None."""
        _refuse_overwriting(model, self.engine_path, self.spec)
        manifest = None if self.force else _matching_manifest(model, self.engine_path, self.spec, self.builder)
        return Engine(self.engine_path, manifest, reused=True, last=self.last) if manifest else None

    def copied(self, model: Model, origin: Model | None, prune: bool) -> Engine:
        """Save a copy of the model, pruned with `prune`, and build the copy."""
        notes = []
        if prune:
            from onnxtools.passes.prune.prune_pass import Prune

            PassManager([Prune()]).run(model)
            notes.append("pruned to 2:4 by magnitude (--sparsity force): without fine-tuning accuracy is lost")
        with OwnFolder(_FOLDER, self.engine_path.parent) as folder:
            copy = folder / (model.path.name if model.path else "model.onnx")
            model.save(copy)
            saved = Model.load(copy)
            if origin is None and (existing := self.reusable(saved)):
                return existing
            return self.run(saved, copy, origin, notes)

    def run(self, model: Model, source: Path, origin: Model | None, notes: Sequence[str] = ()) -> Engine:
        """Build the graph in the file `source`, which `model` was loaded from.

        Args:
            origin: the user's file, which the manifest describes; without one the manifest describes `model`.
        """
        spec, builder = self.spec, self.builder
        notes = [*notes, *_timing_cache_notes(spec, builder)]
        profiles = profiles_for(model, spec)
        checked = preflight(
            model,
            spec,
            builder,
            strong=is_strongly_typed(spec, builder.name, release(builder.version()), is_mixed(model)),
        )
        path = (
            os.path.relpath(origin.path, self.engine_path.parent)
            if origin is not None and origin.path is not None
            else None
        )
        described = origin or model
        # Both files are complete before they get their names; the plan gets its name first. The weights are hashed
        # during the build.
        with (
            replacing(manifest_path(self.engine_path)) as manifest_tmp,
            replacing(self.engine_path) as plan_tmp,
            ThreadPoolExecutor(1) as pool,
        ):
            weights = pool.submit(hash_weights, described)
            started = time.monotonic()
            built = builder.build(model, source, plan_tmp, profiles, spec)
            seconds = time.monotonic() - started
            audit = summary(built.engine_layers, built.precisions)
            _check_audit(model, spec, audit)
            record = BuildRecord(
                model=model, origin=described, spec=spec, builder=builder, profiles=profiles, checked=checked,
                built=built, engine=self.engine_path.name, path=path, weights=weights.result(), audit=audit,
                notes=notes, seconds=seconds,
            )  # fmt: skip
            manifest = make_manifest(record)
            manifest_tmp.write_text(json.dumps(manifest, indent=2) + "\n")
        return Engine(self.engine_path, manifest, last=self.last)


def _timing_cache_notes(spec: EngineSpec, builder: Builder) -> list[str]:
    if spec.timing_cache is None:
        return []
    check_timing_cache(Path(spec.timing_cache))
    return [rtx_note(Path(spec.timing_cache))] if builder.name == "tensorrt-rtx" else []


def _matching_manifest(model: Model, engine_path: Path, spec: EngineSpec, builder: Builder) -> dict[str, Any] | None:
    """The manifest of the existing engine, if building it again would give the same; else None."""
    try:
        manifest = read_manifest(engine_path)
        same = (
            manifest["onnxtools"] == __version__
            and manifest["spec"] == spec.as_json()
            and manifest["profiles"] == [profile.as_json() for profile in profiles_for(model, spec)]
            and manifest["backend"] == {"name": builder.name, "version": builder.version()}
            and manifest["graph"]["sha256"] == model.sha256
            and manifest["engine"] == hash_file(engine_path)
        )
    except (OSError, JobError):
        return None
    return manifest if same and manifest["weights"] == hash_weights(model) else None


def _check_audit(model: Model, spec: EngineSpec, audit: dict[str, Any]) -> None:
    """Refuse an engine without a demanded precision, even if the builder reports success."""
    for name in spec.demanded if audit["outputs"] else ():
        if not holds(audit, name):
            raise JobError(
                f"{model.path}: --{name}, but the audit ({audit['source']}) finds no {name.upper()} in what was built; "
                "see its layers with --json"
            )


def check_target(engine_path: Path) -> None:
    """Create the folder of the engine, and refuse a path that cannot be written before hours of building.

    Raises:
        JobError: the folder cannot be created or written, or a folder has the name.
    """
    if engine_path.is_dir():
        raise JobError(f"{engine_path}: is a folder; name a file")
    make_parent(engine_path)
    remove_dead(_FOLDER, engine_path.parent)  # also if the existing engine is reused
    for path in (engine_path, manifest_path(engine_path)):
        if path.is_dir():
            raise JobError(f"{path}: is a folder; name another file for the engine")
        probe(path)


def _refuse_overwriting(model: Model, engine_path: Path, spec: EngineSpec) -> None:
    """Refuse to overwrite the model, a foreign JSON file or, with the timing cache, the model or the engine."""
    manifest = manifest_path(engine_path)
    with contextlib.suppress(OSError, ValueError):
        kind = json.loads(manifest.read_text())
        ours = isinstance(kind, dict) and (
            str(kind.get("format", "")).startswith(FORMAT.split("/")[0]) or {"engine", "graph", "backend"} <= set(kind)
        )
        if not ours:
            raise UsageError(f"{manifest} exists and is no manifest of an engine; name another file for the engine")
    files = {
        file.resolve()
        for file in (*map(external_path, model.external_tensors()), *([model.path] if model.path else []))
    }
    for target in (engine_path, manifest):
        if target.resolve() in files:
            raise UsageError(f"{target} is the model or its data file; name another file for the engine")
    if spec.timing_cache is not None and Path(spec.timing_cache).resolve() in {
        *files,
        engine_path.resolve(),
        manifest.resolve(),
    }:
        raise UsageError(f"--timing-cache {spec.timing_cache} is the model or the engine; name another file")
