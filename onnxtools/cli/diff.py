"""Show what two models have in different ways."""

from __future__ import annotations

from pathlib import Path

import click

from onnxtools.base.errors import UsageError
from onnxtools.cli.flags import PATH, make_command

_HELP = """Show what changed from BEFORE to AFTER: opsets, operators, inputs and outputs, weights.

Of two engines: options, builder, graph, inputs and outputs, layers and their types.

\b
Examples:
  onnxtools diff te.onnx qdq.onnx
  onnxtools diff fp16.engine fp8.engine
"""


def _callback(before: Path, after: Path, as_json: bool) -> None:
    from onnxtools.check.describe import differences, engine_differences
    from onnxtools.cli.render import console, print_json, table
    from onnxtools.engines.build.manifest import check_unchanged, read_manifest
    from onnxtools.ir.model import Model

    engines = [path for path in (before, after) if path.suffix != ".onnx"]
    if len(engines) == 1:
        raise UsageError(f"{engines[0]} is no .onnx file and the other one is; compare two models, or two engines")
    manifests = [read_manifest(path) for path in engines]
    for path, manifest in zip(engines, manifests, strict=True):
        check_unchanged(path, manifest)
    changes = engine_differences(*manifests) if engines else differences(Model.load(before), Model.load(after))
    if as_json:
        print_json(changes)
        return
    for title, rows in changes.items():
        if rows:
            table(title, ("", "before", "after"), [(r["name"], _cell(r["before"]), _cell(r["after"])) for r in rows])
    if not any(changes.values()):
        console().print("no difference")


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


command = make_command(
    "diff",
    _HELP,
    _callback,
    [click.Argument(["before"], type=PATH), click.Argument(["after"], type=PATH)],
)
