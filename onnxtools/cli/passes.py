"""`onnxtools PASS INPUT OUTPUT`: one command for each registered pass."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from onnxtools.base.errors import UsageError
from onnxtools.checkpoints.beside import check_folder, files_beside
from onnxtools.cli.flags import (
    OUTPUT_OPTION,
    PATH,
    TOLERANCE,
    check_output,
    dataclass_options,
    from_parameters,
    one_output,
)
from onnxtools.cli.logs import LOG
from onnxtools.ir.model import Model
from onnxtools.pipeline.manager import Instrument, PassManager, Report
from onnxtools.pipeline.passbase import Pass, load_pass
from onnxtools.storage.save import SaveReport

WRITE_OPTIONS: tuple[click.Parameter, ...] = (
    click.Option(
        ["--copy-weights/--no-copy-weights"], default=None,
        help="Make the output self-contained instead of referring to the input's data file. [default: where most "
             "weights are new]",
    ),
    click.Option(["--force"], is_flag=True, help="Let OUTPUT replace INPUT."),
)  # fmt: skip
RUN_OPTIONS: tuple[click.Parameter, ...] = (
    *WRITE_OPTIONS,
    click.Option(
        ["--check/--no-check"], default=None,
        help="Compare with the input on ONNX Runtime after each pass: in full, or a part of a large model without it "
             "being said. [default: on]",
    ),
    click.Option(["--inputs"], type=PATH,
        help="Inputs for the check: .npz or Polygraphy JSON. [default: random by rule]"),
    click.Option(["--tolerance"], type=TOLERANCE,
        help="Largest accepted relative L2 of the check. [default: by element type]"),
    click.Option(["--dump"], type=PATH, help="Write the graph after each pass into this folder."),
    click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON on stdout."),
    click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
)  # fmt: skip

BUDGET_OPTIONS: tuple[click.Parameter, ...] = (
    click.Option(["--budget"],
        help="Search the least --exclude-worst that loses no more: 0.5pt of LAMBADA's accuracy, or 2% of its "
        "perplexity."),
    click.Option(["--budget-data"], type=PATH, help="LAMBADA's JSONL for --budget."),
    click.Option(["--budget-rows"], type=click.IntRange(1), default=500, show_default=True,
        help="Passages that --budget scores."),
)  # fmt: skip
"""Of a pass that can leave out its worst layers."""


def pass_command(name: str) -> click.Command:
    """The click command of a pass; its options are the pass's fields."""
    pass_type = load_pass(name)
    module = sys.modules[pass_type.__module__]
    summary = (module.__doc__ or "").strip().split("\n", 1)[0]
    rules = (pass_type.__doc__ or "").strip()
    kept = _unindent(rules).replace("\n\n", "\n\n\b\n")  # \b keeps the lines of one paragraph
    help_text = f"{summary}\n\n\b\n{kept}\n\n\b\nExample:\n  {pass_type.example}"

    searched = any(field.name == "exclude_worst" for field in dataclasses.fields(pass_type))

    def callback(input_path: Path, output_path: Path | None, output_option: Path | None, **values: Any) -> None:
        output_path = one_output(output_path, output_option, f"{name} INPUT OUTPUT")
        pass_ = from_parameters(pass_type, values)
        extra: dict[str, Any] = {}
        if searched:
            from onnxtools.cli.budget import search

            pass_, extra = search(
                pass_,
                input_path,
                output_path,
                **{key: values.pop(key) for key in ("budget", "budget_data", "budget_rows")},
                as_json=values["as_json"],
            )
        run_passes([pass_], input_path, output_path, title=name, extra=extra, **values)

    arguments: list[click.Parameter] = [
        click.Argument(["input_path"], metavar="INPUT", type=PATH),
        click.Argument(["output_path"], metavar="OUTPUT", type=PATH, required=False),
        OUTPUT_OPTION,
    ]
    options = [*dataclass_options(pass_type), *(BUDGET_OPTIONS if searched else ()), *RUN_OPTIONS]
    return click.Command(name, params=[*arguments, *options], callback=callback, help=help_text)


def _unindent(text: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in text.splitlines())


def instruments(
    passes: list[Pass],
    model: Model,
    check: bool | None,
    inputs: Path | None,
    tolerance: float | None,
    dump: Path | None,
    output: Path,
) -> list[Instrument]:
    """The usual set: reproducer, dumps, numeric check, checker, memory, node counts, and time innermost."""
    from onnxtools.pipeline.instruments import (
        CHECK_LIMIT,
        Checker,
        Dump,
        NodeCount,
        NumericCheck,
        PeakMemory,
        Reproducer,
        Timing,
    )

    chosen: list[Instrument] = [Reproducer(output.parent / f"{output.name}.crash", passes)]
    if dump is not None:
        chosen.append(Dump(dump))
    if check is False and inputs is not None:
        raise UsageError("--inputs are for the check that --no-check leaves out; leave one of them out")
    if check is not False:
        from onnxtools.check.feeds import read_feeds

        each = bool(check) or model.weight_bytes() < CHECK_LIMIT  # a check of the form takes seconds on a large graph
        chosen += [
            NumericCheck(read_feeds(inputs) if inputs else None, tolerance, full=bool(check)),
            Checker(each=each),
        ]
    return [*chosen, PeakMemory(), NodeCount(), Timing()]


def write_model(model: Model, output: Path, passes: Sequence[Pass], copy_weights: bool | None) -> SaveReport:
    """Save with what lies beside the input; weights are copied where it is said, or where most of them are new."""
    files = files_beside(model)
    check_folder(output, files)
    LOG.info("writing %s", output)
    copy = copy_weights if copy_weights is not None else any(pass_.rewrites_weights for pass_ in passes)
    return model.save(output, copy_weights=copy, beside=files)


def run_passes(
    passes: list[Pass],
    input_path: Path,
    output_path: Path,
    *,
    title: str,
    copy_weights: bool | None,
    force: bool,
    check: bool | None,
    inputs: Path | None,
    tolerance: float | None,
    dump: Path | None,
    as_json: bool,
    debug: bool,
    extra: Mapping[str, Any] | None = None,
) -> Model:
    """Load, run, save, report; `extra` goes into the JSON."""
    check_output(output_path, input_path, force=force or check is False)
    model = Model.load(input_path)
    check_folder(output_path, files_beside(model))
    used = instruments(passes, model, check, inputs, tolerance, dump, output_path)
    report = PassManager(passes, used).run(model)
    saved = write_model(model, output_path, passes, copy_weights)
    show(report, saved, model, input_path, title, as_json, extra)
    return model


def show(
    report: Report,
    saved: SaveReport,
    model: Model,
    input_path: Path,
    title: str,
    as_json: bool,
    extra: Mapping[str, Any] | None = None,
) -> None:
    from onnxtools.cli.render import console, print_json, report_table

    if as_json:
        print_json(
            {
                "input": str(input_path),
                "output": str(saved.path),
                "steps": report.as_json(),
                "notes": [*model.notes, *saved.lines()],
                **(extra or {}),
            }
        )
        return
    report_table(report, f"{title}: {input_path} -> {saved.path}")
    for line in (*model.notes, *saved.lines()):
        console().print(f"  {line}", markup=False)
    if not report.changed:
        console().print("  nothing matched: the output is the input", style="yellow", markup=False)
