"""Run a recipe: passes, validation and build declared in a YAML file."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from onnxtools.base.errors import UsageError
from onnxtools.cli.flags import PATH, common_options


@click.command(
    help="""Run the chain that RECIPE declares.

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
)
@click.argument("recipe", type=PATH)
@click.option("--input", "input_path", type=PATH, help="Use this input instead of the recipe's.")
@click.option("-o", "--output", "output_path", type=PATH, help="Use this output instead of the recipe's.")
@click.option(
    "--copy-weights/--no-copy-weights",
    default=None,
    help="Make the output self-contained instead of referring to the input's data file. [default: where most weights "
    "are new]",
)
@click.option("--force", is_flag=True, help="Let the output replace the input.")
@click.option(
    "--allow-code", is_flag=True, help="Run code that the recipe names (graphsurgeon); only for recipes that you trust."
)
@click.option(
    "--check/--no-check",
    default=None,
    help="Compare with the input on ONNX Runtime after each pass, of large models a part. [default: on]",
)
@click.option("--dump", type=PATH, help="Write the graph after each pass into this folder.")
@common_options
def command(
    recipe: Path,
    input_path: Path | None,
    output_path: Path | None,
    copy_weights: bool | None,
    force: bool,
    allow_code: bool,
    check: bool | None,
    dump: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    from onnxtools.checkpoints.beside import check_folder, files_beside
    from onnxtools.cli.flags import check_output
    from onnxtools.cli.passes import instruments, show, write_model
    from onnxtools.cli.recipe import read_recipe
    from onnxtools.cli.render import console, print_json, verdict_table
    from onnxtools.ir.model import Model
    from onnxtools.pipeline.manager import PassManager

    plan = read_recipe(recipe, input_path, output_path)
    coding = next((pass_.name for pass_ in plan.passes if pass_.runs_code), None)
    if coding is not None and not allow_code:
        raise UsageError(
            f"{recipe}: its pass {coding!r} runs code that the recipe names; read the recipe, then say --allow-code"
        )
    check_output(plan.output, plan.input, force=force or check is False)
    model = Model.load(plan.input)
    check_folder(plan.output, files_beside(model))
    report = PassManager(plan.passes, instruments(plan.passes, model, check, None, None, dump, plan.output)).run(model)
    saved = write_model(model, plan.output, plan.passes, copy_weights)
    result: dict[str, object] = {
        "input": str(plan.input),
        "output": str(plan.output),
        "steps": report.as_json(),
        "notes": [*model.notes, *saved.lines()],
    }
    if not as_json:
        show(report, saved, model, plan.input, recipe.name, False)
    passed = True
    if plan.against is not None:
        from onnxtools.check.validate import validate

        verdict = validate(Model.load(plan.against), Model.load(plan.output), tolerance=plan.tolerance)
        result["validate"], passed = verdict.as_json(), verdict.passed
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
    sys.exit(0 if passed else 1)
