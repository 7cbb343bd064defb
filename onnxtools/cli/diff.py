"""Show what two models have in different ways."""

from __future__ import annotations

from pathlib import Path

import click

from onnxtools.cli.options import PATH, common_options


@click.command(
    help="""Show what changed from BEFORE to AFTER: opsets, operators, inputs and outputs, weights.

    \b
    Example:
      onnxtools diff te.onnx qdq.onnx
    """
)
@click.argument("before", type=PATH)
@click.argument("after", type=PATH)
@common_options
def command(before: Path, after: Path, as_json: bool, debug: bool) -> None:
    from onnxtools.cli.render import console, print_json, table
    from onnxtools.describe import differences
    from onnxtools.model import Model

    found = differences(Model.load(before), Model.load(after))
    if as_json:
        print_json(found)
        return
    for title, rows in found.items():
        if rows:
            table(title, ("", "before", "after"), [(r["name"], _cell(r["before"]), _cell(r["after"])) for r in rows])
    if not any(found.values()):
        console().print("no difference in opsets, operators, inputs, outputs or weights")


def _cell(value: object) -> str:
    return "-" if value is None else str(value)
