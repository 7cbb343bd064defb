"""Run a recipe: passes, validation and build declared in a YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.inputs import absent
from onnxtools.base.options import option
from onnxtools.cli.flags import PATH, from_parameters, make_command
from onnxtools.cli.passes import RunOptions, transform

_HELP = """Run the chain that RECIPE declares.

\b
input: te.onnx                 # paths are relative to the recipe
output: gpt.onnx
passes:
  - convert: {opset: 19}
  - add-kv-cache
validate: {against: te.onnx}   # optional
build: {engine: gpt.engine, fp8: true}   # optional

\b
Example:
  onnxtools pipeline recipe.yaml
"""


@dataclass(frozen=True)
class PipelineOptions:
    """Flags of `pipeline` beside those of a pass."""

    input: Path | None = option(None, "Use this input instead of the recipe's.", path=True)
    output: Path | None = option(None, "Use this output instead of the recipe's.", path=True, short="-o")
    allow_code: bool = option(
        False, "Run code that the recipe names (graphsurgeon); only for recipes that you trust.", switch=True
    )


def _callback(recipe: Path, as_json: bool, **values: Any) -> None:
    from onnxtools.cli.recipe import read_recipe
    from onnxtools.cli.render import console, print_json, verdict_table
    from onnxtools.ir.model import Model

    options: PipelineOptions = from_parameters(PipelineOptions, values)
    plan = read_recipe(recipe, options.input, options.output)
    if plan.against is not None and not plan.against.is_file() and plan.against.resolve() != plan.output.resolve():
        raise JobError(f"{recipe}: validate.against is {absent(plan.against)}: no such file; check the path")
    coding = next((pass_.name for pass_ in plan.passes if pass_.runs_code), None)
    if coding is not None and not options.allow_code:
        raise UsageError(
            f"{recipe}: its pass {coding!r} runs code that the recipe names; read the recipe, then say --allow-code"
        )
    result, show = transform(plan.passes, plan.input, plan.output, from_parameters(RunOptions, values))
    if not as_json:
        show(recipe.name)
    passed, problem = True, ""
    if plan.against is not None:
        from onnxtools.check.validate import validate
        from onnxtools.cli.validate import failure

        verdict = validate(Model.load(plan.against), Model.load(plan.output), tolerance=plan.tolerance)
        result["validate"], passed = verdict.as_json(), verdict.passed
        problem = "" if passed else failure(verdict, plan.output)
        if not as_json:
            verdict_table(
                verdict, f"{plan.against} against {plan.output} (tolerance {verdict.tolerance:g}, relative L2)"
            )
    if passed and plan.engine is not None and plan.spec is not None:
        from onnxtools.engines.build.engine import build

        engine = build(plan.output, plan.engine, plan.spec)
        result["build"] = engine.manifest
        if not as_json:
            from onnxtools.cli.build import show_manifest

            show_manifest(engine)
    elif plan.engine is not None:
        console().print("  not built: validation failed", style="yellow")
    if as_json:
        print_json(result)
    if not passed:
        raise JobError(problem)


command = make_command(
    "pipeline", _HELP, _callback, [click.Argument(["recipe"], type=PATH)], [PipelineOptions, RunOptions]
)
