"""Compare two models on ONNX Runtime; a KV cache is decoded step by step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.options import option
from onnxtools.check.polygraphy_data import check_place
from onnxtools.cli.flags import PATH, from_parameters, make_command

if TYPE_CHECKING:
    from onnxtools.check.feeds import Feeds
    from onnxtools.check.validate import Divergence, Verdict
    from onnxtools.ir.model import Model


_HELP = """Compare MODEL with REFERENCE on the same inputs.

A model with a KV cache is run at once and in steps, at several split points: the results must be those of the full
run of the reference. Exit code 1 when a difference exceeds the tolerance.

An engine is checked against its manifest: whether plan, graph and weights are the files that were built.

\b
Examples:
  onnxtools validate te.onnx kv.onnx
  onnxtools validate gpt.engine
"""


@dataclass(frozen=True)
class ValidateOptions:
    """The flags of `validate`."""

    inputs: Path | None = option(
        None, "Full-sequence inputs: .npz or Polygraphy JSON. [default: random by rule]", path=True
    )
    tolerance: float | None = option(
        None, "Largest accepted relative L2. [default: 1e-5 fp32, 1e-2 fp16, 0.1 bf16 and 16-bit FP8]", minimum=0
    )
    batch: int = option(2, "Batch of random inputs.", minimum=1)
    sequence: int = option(16, "Tokens of random inputs.", minimum=1)
    seed: int = option(0, "Seed of random inputs.", minimum=0)
    save_inputs: Path | None = option(
        None, "Write the inputs as Polygraphy's JSON, for `polygraphy run --load-inputs`.", path=True
    )
    save_outputs: Path | None = option(
        None, "Write what REFERENCE computes from them, for `polygraphy run --load-outputs`.", path=True
    )
    per_layer: bool = option(False, "Find the first value, by name, that differs between the two graphs.", switch=True)

    def __post_init__(self) -> None:
        for name in ("batch", "sequence", "seed"):
            if self.inputs is not None and getattr(self, name) != getattr(type(self), name):
                raise UsageError(f"--{name} is of random inputs and --inputs names a file; leave one out")


def _callback(reference: Path, model: Path | None, as_json: bool, **values: Any) -> None:
    options: ValidateOptions = from_parameters(ValidateOptions, values)
    for path in (reference, model):
        if path is not None and path.is_dir():
            raise JobError(f"{path}: is a folder; name a model or an engine")
    engines = [path for path in (reference, model) if path is not None and path.suffix != ".onnx"]
    if model is None or engines:
        others = [path for path in (reference, model) if path is not None and path not in engines]
        if len(engines) != 1:
            raise UsageError("compare two models, or an engine with its model; name MODEL too")
        if options != ValidateOptions():
            raise UsageError("an engine is compared with its manifest and computes nothing here; leave the options out")
        _engine(engines[0], others[0] if others else None, as_json)
        return
    assert model is not None
    check_place(options.save_inputs, reference, model)
    check_place(options.save_outputs, reference, model, options.save_inputs)
    _models(reference, model, options, as_json)


def _models(reference: Path, model: Path, options: ValidateOptions, as_json: bool) -> None:
    from onnxtools.check.feeds import random_feeds, read_feeds
    from onnxtools.check.validate import RandomInputs, first_divergence, validate
    from onnxtools.cli.render import print_json, verdict_table
    from onnxtools.ir.model import Model

    o = options
    a, b = Model.load(reference), Model.load(model)
    feeds = read_feeds(o.inputs) if o.inputs else None
    if o.save_inputs is not None or o.save_outputs is not None:
        _save(o, a, feeds or random_feeds(a, o.batch, o.sequence, o.seed))
    verdict = validate(a, b, feeds, o.tolerance, RandomInputs(o.batch, o.sequence, o.seed))
    result = verdict.as_json()
    if o.per_layer:
        feeds = feeds or random_feeds(a, o.batch, o.sequence, o.seed)
        divergence = first_divergence(a, b, feeds, verdict.tolerance)
        result["first_divergence"] = divergence and vars(divergence) | {"difference": vars(divergence.difference)}
    if as_json:
        print_json(result)
    else:
        verdict_table(verdict, f"{reference} against {model} (tolerance {verdict.tolerance:g}, relative L2)")
        if o.per_layer:
            _show_divergence(divergence)
    if not verdict.passed:
        raise JobError(failure(verdict, model))


def _save(options: ValidateOptions, reference: Model, feeds: Feeds) -> None:
    from onnxtools.check.polygraphy_data import save_inputs, save_outputs
    from onnxtools.check.validate import run_once

    if options.save_inputs is not None:
        save_inputs(options.save_inputs, feeds)
    if options.save_outputs is not None:
        save_outputs(options.save_outputs, run_once(reference, feeds))


def failure(verdict: Verdict, model: Path) -> str:
    """The line of a comparison that failed."""
    failed = [row for row in verdict.rows if not row.passed]
    worst = max(failed, key=lambda row: row.difference.rel_l2, default=None)
    if worst is None:
        return f"{model}: nothing was compared; see the notes"
    difference, limit = worst.difference.rel_l2, verdict.tolerance
    return (
        f"{model}: {len(failed)} of {len(verdict.rows)} comparisons failed, the worst {worst.check!r} of "
        f"{worst.output!r} (rel L2 {difference:.1e}, tolerance {limit:g}); find the first value with --per-layer"
    )


def _show_divergence(divergence: Divergence | None) -> None:
    from onnxtools.cli.render import console

    line = "no value that both graphs name differs"
    if divergence is not None:
        d, difference = divergence, divergence.difference
        line = (
            f"first difference: value {d.value!r} of node {d.node!r} ({d.op_type}), rel L2 {difference.rel_l2:.1e}, "
            f"max abs {difference.max_abs:.1e} ({d.compared} values compared)"
        )
    console().print(f"  {line}", markup=False)


def _engine(engine: Path, graph: Path | None, as_json: bool) -> None:
    """Raises JobError where a file is not what the manifest says."""
    from onnxtools.cli.render import print_json, table
    from onnxtools.engines.build.manifest import check_files, read_manifest

    files = check_files(engine, read_manifest(engine), graph)
    if as_json:
        print_json(
            {
                "files": [{"file": file, "problem": problem or None} for file, problem in files],
                "passed": not any(problem for _, problem in files),
            }
        )
    else:
        table(
            f"{engine} and its manifest",
            ("file", ""),
            [(file, problem or "as it was built") for file, problem in files],
        )
    wrong = [(file, problem) for file, problem in files if problem]
    if wrong:
        raise JobError(f"{wrong[0][0]} {wrong[0][1]}; build the engine again, or bring the file back")


command = make_command(
    "validate",
    _HELP,
    _callback,
    [
        click.Argument(["reference"], type=PATH),
        click.Argument(["model"], metavar="[MODEL]", type=PATH, required=False),
    ],
    [ValidateOptions],
)
