"""Build a TensorRT engine and its manifest; TensorRT-RTX builds on a machine without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.options import option
from onnxtools.cli.flags import PATH, from_parameters, make_command
from onnxtools.engines.build.spec import EngineSpec

if TYPE_CHECKING:
    from onnxtools.engines.build.builder import Engine
    from onnxtools.engines.build.many import Job, Outcome

_HELP = """Build ENGINE from MODEL and write ENGINE.json beside it; or build several models, each to MODEL's name with
.engine.

The graph is checked before the build (operators, types, 2:4 weights, shapes, TensorRT's silent traps) and the
manifest says what the engine has: inputs and outputs, profiles, layers, hashes, versions. Without shapes, profiles
are derived from the graph: for a model with a KV cache one for the context and one for generation. What was built
before from the same graph, weights and options is not built again. A folder is that of a partitioned model:
rank0.onnx, rank1.onnx ... become an engine each.

\b
Examples:
  onnxtools build sparse.onnx gpt.engine --fp8 --sparsity --compute-capability 8.9
  onnxtools build ranks --workers 2 --output-folder plans
"""


@dataclass(frozen=True)
class BuildOptions:
    """Flags of `build` beside those of the engine."""

    output: Path | None = option(
        None, "Where the engine goes, instead of the second argument.", path=True, short="-o", metavar="ENGINE"
    )
    workers: int = option(1, "Processes that build several models, a device each.", minimum=1)
    output_folder: Path | None = option(
        None, "Where the engines of several models go. [default: beside each model]", path=True
    )
    force: bool = option(
        False, "Build although the engine that lies there is of the same graph, weights and options.", switch=True
    )
    print_trtexec: bool = option(False, "Print the equivalent trtexec line and build nothing.", switch=True)


def _callback(paths: tuple[Path, ...], as_json: bool, **values: Any) -> None:
    options: BuildOptions = from_parameters(BuildOptions, values)
    spec = from_parameters(EngineSpec, values)
    if spec.tensorrt_version is not None and not options.print_trtexec:
        raise UsageError("--tensorrt-version is for --print-trtexec; a build uses the version that is installed")
    if options.print_trtexec and spec.backend not in ("auto", "trtexec"):
        raise UsageError(f"--print-trtexec prints a line for trtexec, not for --backend {spec.backend}; leave one out")
    folder = options.output_folder
    if options.output is not None:
        _check_output(paths, options.output, folder)
    jobs = _jobs((*paths, options.output) if options.output is not None else paths, folder)
    if options.print_trtexec:
        _lines(jobs, spec, as_json)
        return
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    if len(jobs) == 1:
        _one(jobs[0], spec, options.force, as_json)
    else:
        _several(jobs, spec, options, as_json)


def _check_output(paths: tuple[Path, ...], output: Path, folder: Path | None) -> None:
    """Raise UsageError where -o cannot be the one engine's place."""
    engines = [path for path in paths if path.suffix != ".onnx" and not path.is_dir()]
    if engines:
        raise UsageError(f"ENGINE is {engines[0]} and -o is {output}; name one")
    if output.suffix == ".onnx":
        raise UsageError(f"-o {output} is where the engine goes, and .onnx is a model's; name it .engine")
    if len(paths) > 1 or folder is not None:
        raise UsageError(f"-o {output} is of one model without --output-folder; leave it out")


def _jobs(paths: tuple[Path, ...], folder: Path | None) -> list[Job]:
    from onnxtools.engines.build.many import Job, engine_paths

    if len(paths) == 1 and paths[0].is_dir():
        from onnxtools.ir.rank import load_ranks

        return engine_paths([model.path for model in load_ranks(paths[0]) if model.path is not None], folder)
    models = [path for path in paths if path.suffix == ".onnx"]
    others = [path for path in paths if path.suffix != ".onnx"]
    if len(models) == 1 and len(others) == 1 and folder is None and paths[1] == others[0]:
        return [Job(models[0], others[0])]
    if not models or others:
        what = f"{others[0]} is no .onnx file" if others else "no model"
        raise UsageError(
            f"{what}; write `build MODEL.onnx ENGINE`, or several models and, where they go, --output-folder"
        )
    if folder is not None and folder.exists() and not folder.is_dir():
        raise JobError(f"--output-folder {folder} is a file; name a folder")
    return engine_paths(models, folder)


def _lines(jobs: list[Job], spec: EngineSpec, as_json: bool) -> None:
    from onnxtools.cli.render import print_json

    lines = [_line(job, spec) for job in jobs]
    if as_json:
        print_json(
            [
                {"model": str(job.model), "engine": str(job.engine), "line": line}
                for job, line in zip(jobs, lines, strict=True)
            ]
        )
    else:
        for line in lines:
            click.echo(line)


def _line(job: Job, spec: EngineSpec) -> str:
    """Checked as a build would be, as far as that goes without the builder."""
    from onnxtools.engines.build.preflight import preflight
    from onnxtools.engines.build.profiles import profiles_for
    from onnxtools.engines.build.spec import version_of
    from onnxtools.engines.build.timing_cache import with_cache_file
    from onnxtools.engines.build.versions import is_mixed, is_strongly_typed
    from onnxtools.engines.trtexec.command_line import NEWEST, trtexec_line
    from onnxtools.engines.trtexec.trtexec_builder import OnPaper
    from onnxtools.ir.model import Model

    model = Model.load(job.model)
    version = NEWEST if spec.tensorrt_version is None else version_of(spec.tensorrt_version)
    if not (8, 6) <= version < (12,):
        raise UsageError(
            f"--tensorrt-version {spec.tensorrt_version}: the lines of 8.6 to 11 are known; name one of them"
        )
    spec, mixed = with_cache_file(spec, "trtexec", version), is_mixed(model)
    line = trtexec_line(job.model, job.engine, spec, profiles_for(model, spec), version, mixed=mixed)
    preflight(model, spec, OnPaper(version), strong=is_strongly_typed(spec, "trtexec", version, mixed))
    return line


def _one(job: Job, spec: EngineSpec, force: bool, as_json: bool) -> None:
    from onnxtools.cli.render import print_json
    from onnxtools.engines.build.engine import build
    from onnxtools.engines.build.last_words import unusual_node
    from onnxtools.ir.model import Model

    model = Model.load(job.model)
    engine = _apart(job, spec, force) if unusual_node(model) else build(job.model, job.engine, spec, force=force)
    if as_json:
        print_json({**engine.manifest, "reused": engine.reused})
        if engine.last:
            click.echo(f"note: {engine.last}", err=True)
    else:
        show_manifest(engine)


def _apart(job: Job, spec: EngineSpec, force: bool) -> Engine:
    """In a process of its own, which a builder can take down."""
    from onnxtools.engines.build.builder import Engine
    from onnxtools.engines.build.many import build_many

    (outcome,) = build_many([job], spec, workers=1, force=force, done=lambda _: None)
    if outcome.manifest is None:
        raise UsageError(outcome.error) if outcome.exit_code == UsageError.exit_code else JobError(outcome.error)
    return Engine(job.engine, outcome.manifest, outcome.reused, outcome.last)


def _several(jobs: list[Job], spec: EngineSpec, options: BuildOptions, as_json: bool) -> None:
    from onnxtools.base.progress import counted
    from onnxtools.cli.render import print_json, size, table
    from onnxtools.engines.build.many import build_many

    with counted(f"build, {options.workers} at a time", len(jobs)) as tick:
        outcomes = build_many(jobs, spec, workers=options.workers, force=options.force, done=lambda _: tick())
    if as_json:
        print_json([_row(outcome) for outcome in outcomes])
    else:
        rows = [
            (
                r["model"],
                r["engine"],
                size(r["bytes"]) if r["bytes"] else "-",
                r["seconds"],
                r["error"] or ("was there" if r["reused"] else "built"),
            )
            for r in map(_row, outcomes)
        ]
        table(
            f"{sum(not o.error for o in outcomes)} of {len(outcomes)} engines",
            ("model", "engine", "size", "s", ""),
            rows,
            right=("size", "s"),
        )
    for line in {o.last for o in outcomes if o.last}:
        click.echo(line, err=True)
    failed = [o for o in outcomes if o.error]
    if failed:
        more = f" (and {len(failed) - 1} more failed)" if len(failed) > 1 else ""
        raise JobError(f"{failed[0].error}{more}")


def _row(outcome: Outcome) -> dict[str, Any]:
    return {
        "model": str(outcome.job.model), "engine": str(outcome.job.engine),
        "bytes": outcome.manifest["engine"]["bytes"] if outcome.manifest else None,
        "seconds": round(outcome.seconds, 1), "reused": outcome.reused, "error": outcome.error or None,
    }  # fmt: skip


command = make_command(
    "build",
    _HELP,
    _callback,
    [click.Argument(["paths"], metavar="MODEL ENGINE | MODEL...", type=PATH, nargs=-1, required=True)],
    [BuildOptions, EngineSpec],
)


def show_manifest(engine: Engine) -> None:
    """The manifest as people read it."""
    from onnxtools.cli.render import collapse, console, size, table

    m, out = engine.manifest, console()
    backend, capabilities = m["backend"], ", ".join(m["compute_capabilities"])
    rows = [("input", i["name"], i["dtype"], _dims(i["shape"])) for i in m["inputs"]]
    rows += [("output", i["name"], i["dtype"], _dims(i["shape"])) for i in m["outputs"]]
    title = (
        f"{engine.path}: {size(m['engine']['bytes'])}, {backend['name']} {backend['version']}, compute capability "
        f"{capabilities}"
    )
    table(f"{title} (from the {m['io_source']})", ("", "name", "type", "shape"), collapse(rows, 1))
    for index, profile in enumerate(m["profiles"]):
        spans = [
            (name, *(_dims(span[which]) for which in ("min", "opt", "max"))) for name, span in profile["inputs"].items()
        ]
        table(f"profile {index}: {profile['name']}", ("input", "min", "opt", "max"), collapse(spans, 0))
    _show_sparsity(m["sparsity"], m["audit"]["source"])
    types = ", ".join(f"{count} {name}" for name, count in m["audit"]["outputs"].items())
    out.print(f"  layer outputs ({m['audit']['source']}): {types or 'unknown'}", markup=False)
    for line in (*m["mends"], *m["notes"]):
        out.print(f"  {line}", markup=False)
    for line in m["warnings"]:
        out.print(f"  warning: {line}", style="yellow", markup=False)
    if engine.reused:
        out.print(
            "  was there already: same graph, weights, options and builder (--force builds it again)",
            style="yellow",
            markup=False,
        )
    when = "it was built in" if engine.reused else "built in"
    out.print(
        f"  {when} {m['build_seconds']:.1f} s, peak {m['peak_rss_mib']:.0f} MiB; manifest in {engine.path}.json",
        markup=False,
    )
    if engine.last:
        out.print(f"  {engine.last}", style="yellow", markup=False, soft_wrap=True)


def _show_sparsity(sparsity: dict[str, Any] | None, source: str) -> None:
    """Products alike as one row; the reason is what is known before the build, the kernel what the engine's inspector
    says.
    """
    from collections import Counter

    from onnxtools.cli.render import table

    if sparsity is None:
        return
    keys = ("op", "dtype", "k", "n", "is_2_4", "kernel", "reason")
    rows = [
        (count, op, dtype, k, n, "yes" if sparse else "no", kernel or "unknown", reason)
        for (op, dtype, k, n, sparse, kernel, reason), count in Counter(
            tuple(layer[key] for key in keys) for layer in sparsity["layers"]
        ).most_common()
    ]
    read = "of the engine" if source == "engine inspector" else "not known: the engine is read back on a GPU only"
    table(
        f"2:4 sparsity (kernels {read})",
        ("count", "op", "weight", "K", "N", "2:4", "kernel", "but"),
        rows,
        right=("count", "K", "N"),
    )


def show_layers(engine: Engine) -> None:
    """The layers of the audit, equal ones as one row; where there was no GPU to read the engine on, the network's."""
    from collections import Counter

    from onnxtools.cli.render import size, table

    m = engine.manifest
    weights = m["weight_bytes"] if "weight_bytes" in m else sum(entry["bytes"] for entry in m["weights"])
    if m["audit"]["layers"] is None:
        table("layers of the parsed network", ("type", "count"), m["layers"]["types"].items(), right=("count",))
    else:
        kinds = Counter((one["kind"], *(", ".join(dict.fromkeys(one[k])) for k in ("inputs", "outputs")),
            one["weights"], one["tactic"], one["sparse"])
                        for one in m["audit"]["layers"])  # fmt: skip
        rows = [
            (kind, count, *types, tactic, "yes" if sparse else "")
            for (kind, *types, tactic, sparse), count in kinds.most_common()
        ]
        table(
            "layers of the engine",
            ("type", "count", "inputs", "outputs", "weights", "tactic", "2:4"),
            rows,
            right=("count",),
        )
    if weights:
        console_line = (
            f"  {size(m['engine']['bytes'])} of plan for {size(weights)} of weights "
            f"({m['engine']['bytes'] / weights:.0%})"
        )
        click.echo(console_line)


def _dims(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
