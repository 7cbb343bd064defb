"""Compare two models on ONNX Runtime; a KV cache is decoded step by step."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from onnxtools.base.errors import JobError, UsageError
from onnxtools.cli.flags import PATH, TOLERANCE, common_options


@click.command(
    help="""Compare MODEL with REFERENCE on the same inputs.

    A model with a KV cache is run at once and in steps, at several split points: the results must be those of the full
    run of the reference. Exit code 1 when a difference exceeds the tolerance.

    An engine is checked against its manifest: whether plan, graph and weights are the files that were built.

    \b
    Examples:
      onnxtools validate te.onnx kv.onnx
      onnxtools validate gpt.engine
    """
)
@click.argument("reference", type=PATH)
@click.argument("model", type=PATH, required=False)
@click.option("--inputs", type=PATH, help="Full-sequence inputs: .npz or Polygraphy JSON. [default: random by rule]")
@click.option(
    "--tolerance",
    type=TOLERANCE,
    help="Largest accepted relative L2. [default: 1e-5 fp32, 1e-2 fp16, 0.1 bf16 and 16-bit FP8]",
)
@click.option("--batch", type=click.IntRange(1), default=2, show_default=True, help="Batch of random inputs.")
@click.option("--sequence", type=click.IntRange(1), default=16, show_default=True, help="Tokens of random inputs.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of random inputs.")
@click.option("--per-layer", is_flag=True, help="Find the first value, by name, that differs between the two graphs.")
@common_options
def command(
    reference: Path,
    model: Path | None,
    inputs: Path | None,
    tolerance: float | None,
    batch: int,
    sequence: int,
    seed: int,
    per_layer: bool,
    as_json: bool,
    debug: bool,
) -> None:
    from onnxtools.cli.render import console, print_json, verdict_table

    engines = [path for path in (reference, model) if path is not None and path.suffix != ".onnx"]
    if model is None or engines:
        others = [path for path in (reference, model) if path is not None and path not in engines]
        if len(engines) != 1:
            raise UsageError("compare two models, or an engine with its model; name MODEL too")
        _engine(engines[0], others[0] if others else None, as_json)
        return
    assert model is not None
    from onnxtools.check.feeds import random_feeds, read_feeds
    from onnxtools.check.validate import first_divergence, validate
    from onnxtools.ir.model import Model

    a, b = Model.load(reference), Model.load(model)
    feeds = read_feeds(inputs) if inputs else None
    verdict = validate(a, b, feeds, tolerance, batch, sequence, seed)
    found = (
        first_divergence(a, b, feeds or random_feeds(a, batch, sequence, seed), verdict.tolerance)
        if per_layer
        else None
    )
    result = verdict.as_json()
    if per_layer:
        result["first_divergence"] = None if found is None else vars(found) | {"difference": vars(found.difference)}
    if as_json:
        print_json(result)
    else:
        verdict_table(verdict, f"{reference} against {model} (tolerance {verdict.tolerance:g}, relative L2)")
        if per_layer:
            line = "no value that both graphs name differs" if found is None else (
                f"first difference: value {found.value!r} of node {found.node!r} ({found.op_type}), rel L2 "
                f"{found.difference.rel_l2:.1e}"
                f", max abs {found.difference.max_abs:.1e} ({found.compared} values compared)"
            )  # fmt: skip
            console().print(f"  {line}", markup=False)
    sys.exit(0 if verdict.passed else 1)


def _engine(engine: Path, graph: Path | None, as_json: bool) -> None:
    """Raises JobError where a file is not what the manifest says."""
    from onnxtools.cli.render import print_json, table
    from onnxtools.engines.build.manifest import check_files, read_manifest

    found = check_files(engine, read_manifest(engine), graph)
    if as_json:
        print_json(
            {
                "files": [{"file": file, "problem": problem or None} for file, problem in found],
                "passed": not any(problem for _, problem in found),
            }
        )
    else:
        table(
            f"{engine} and its manifest",
            ("file", ""),
            [(file, problem or "as it was built") for file, problem in found],
        )
    wrong = [(file, problem) for file, problem in found if problem]
    if wrong:
        raise JobError(f"{wrong[0][0]} {wrong[0][1]}; build the engine again, or bring the file back")
