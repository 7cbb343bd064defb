"""`onnxtools PASS INPUT OUTPUT`: one command for each registered pass."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from onnxtools.base.errors import UsageError
from onnxtools.base.options import option
from onnxtools.checkpoints.beside import check_folder, files_beside
from onnxtools.cli.budget import BudgetOptions, search
from onnxtools.cli.flags import OUTPUT_OPTION, PATH, check_output, from_parameters, make_command, one_output
from onnxtools.cli.logs import LOG
from onnxtools.ir.model import Model
from onnxtools.pipeline.manager import Instrument, PassManager, Report
from onnxtools.pipeline.passbase import Pass, load_pass
from onnxtools.storage.save import SaveReport


@dataclass(frozen=True)
class RunOptions:
    """The flags of every pass, and of `pipeline`: how its output is written and checked."""

    copy_weights: bool | None = option(
        None,
        "Make the output self-contained instead of referring to the input's data file. [default: where most weights "
        "are new]",
    )
    force: bool = option(False, "Let the output replace the input.", switch=True)
    check: bool | None = option(
        None,
        "Compare with the input on ONNX Runtime after each pass; without this option a part of a large model. "
        "[default: on]",
    )
    inputs: Path | None = option(
        None, "Inputs for the check: .npz or Polygraphy JSON. [default: random by rule]", path=True
    )
    tolerance: float | None = option(
        None, "Largest accepted relative L2 of the check. [default: by element type]", minimum=0
    )
    dump: Path | None = option(None, "Write the graph after each pass into this folder.", path=True)


def pass_command(name: str) -> click.Command:
    """The click command of a pass; its options are the pass's fields."""
    pass_type = load_pass(name)
    module = sys.modules[pass_type.__module__]
    summary = (module.__doc__ or "").strip().split("\n", 1)[0]
    rules = (pass_type.__doc__ or "").strip()
    paragraphs = _unindent(rules).replace("\n\n", "\n\n\b\n")  # \b keeps the lines of one paragraph
    help_text = f"{summary}\n\n\b\n{paragraphs}\n\n\b\nExample:\n  {pass_type.example}"

    searched = any(field.name == "exclude_worst" for field in dataclasses.fields(pass_type))

    def callback(
        input_path: Path, output_path: Path | None, output_option: Path | None, as_json: bool, **values: Any
    ) -> None:
        from onnxtools.cli.render import print_json

        output_path = one_output(output_path, output_option, f"{name} INPUT OUTPUT")
        pass_ = from_parameters(pass_type, values)
        extra: dict[str, Any] = {}
        if searched:
            budget: BudgetOptions = from_parameters(BudgetOptions, values)
            pass_, extra = search(pass_, input_path, output_path, budget, as_json)
        result, show = transform([pass_], input_path, output_path, from_parameters(RunOptions, values))
        if as_json:
            print_json({**result, **extra})
        else:
            show(name)

    arguments = [
        click.Argument(["input_path"], metavar="INPUT", type=PATH),
        click.Argument(["output_path"], metavar="[OUTPUT]", type=PATH, required=False),
        OUTPUT_OPTION,
    ]
    options = [pass_type, *([BudgetOptions] if searched else []), RunOptions]
    return make_command(name, help_text, callback, arguments, options)


def _unindent(text: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in text.splitlines())


def instruments(passes: list[Pass], model: Model, options: RunOptions, output: Path) -> list[Instrument]:
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
    if options.dump is not None:
        chosen.append(Dump(options.dump))
    if options.check is False and options.inputs is not None:
        raise UsageError("--inputs are for the check that --no-check leaves out; leave one of them out")
    if options.check is not False:
        from onnxtools.check.feeds import read_feeds

        # The checker takes seconds on a large graph.
        each = bool(options.check) or model.weight_bytes() < CHECK_LIMIT
        chosen += [
            NumericCheck(
                read_feeds(options.inputs) if options.inputs else _calibration_feeds(passes, model),
                options.tolerance,
                full=bool(options.check),
                decodes=any(pass_.adds_cache for pass_ in passes),
            ),
            Checker(each=each),
        ]
    return [*chosen, PeakMemory(), NodeCount(), Timing()]


def _calibration_feeds(passes: Sequence[Pass], model: Model) -> dict[str, Any] | None:
    """The first inputs that a pass calibrates with, where they are arrays and the graph takes no tokens.

    Images and sounds have ranges that random numbers have not.
    """
    from onnxtools.analysis.facts import token_input
    from onnxtools.calibration.calibration_options import Calibrated
    from onnxtools.calibration.data import read_samples

    with_arrays = [p for p in passes if isinstance(p, Calibrated) and (p.calib or "").endswith(".npz")]
    if not with_arrays or token_input(model) is not None:
        return None
    return dict(read_samples(model, with_arrays[0])[0])


def write_model(model: Model, output: Path, passes: Sequence[Pass], copy_weights: bool | None) -> SaveReport:
    """Save with what lies beside the input; weights are copied where it is said, or where most of them are new."""
    files = files_beside(model)
    check_folder(output, files)
    LOG.info("writing %s", output)
    copy = copy_weights if copy_weights is not None else any(pass_.rewrites_weights for pass_ in passes)
    return model.save(output, copy_weights=copy, beside=files)


def transform(
    passes: list[Pass], input_path: Path, output_path: Path, options: RunOptions
) -> tuple[dict[str, Any], Callable[[str], None]]:
    """Load, run and save; returns the result for `--json`, and what prints it under a title."""
    check_output(output_path, input_path, force=options.force or options.check is False)
    model = Model.load(input_path)
    check_folder(output_path, files_beside(model))
    report = PassManager(passes, instruments(passes, model, options, output_path)).run(model)
    saved = write_model(model, output_path, passes, options.copy_weights)
    notes = [*model.notes, *saved.lines()]
    result = {"input": str(input_path), "output": str(saved.path), "steps": report.as_json(), "notes": notes}
    return result, lambda title: _show(report, f"{title}: {input_path} -> {saved.path}", notes)


def _show(report: Report, title: str, notes: Sequence[str]) -> None:
    from onnxtools.cli.render import console, report_table

    report_table(report, title)
    for line in notes:
        console().print(f"  {line}", markup=False)
    if not report.changed:
        console().print("  nothing matched: the output is the input", style="yellow", markup=False)
