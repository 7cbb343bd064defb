"""Show what a model or engine contains: operators, types, weights, quantization, sparsity, cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from onnxtools.base.options import option
from onnxtools.cli.flags import PATH, from_parameters, make_command

_HELP = """Show what MODEL contains.

An engine is shown by the manifest that lies beside it.

\b
Examples:
  onnxtools inspect gpt.onnx --sparsity
  onnxtools inspect gpt.engine
"""


@dataclass(frozen=True)
class InspectOptions:
    """The flags of `inspect`."""

    sparsity: bool = option(False, "Read the weights and count zeros and 2:4 groups.", switch=True)


def _callback(model: Path, as_json: bool, **values: Any) -> None:
    from onnxtools.cli.render import print_json
    from onnxtools.engines.build.manifest import manifest_path

    if model.suffix != ".onnx" and (manifest_path(model).is_file() or model.suffix in (".engine", ".plan", ".trt")):
        _engine(model, as_json)
        return
    from onnxtools.check.describe import describe
    from onnxtools.ir.model import Model

    options: InspectOptions = from_parameters(InspectOptions, values)
    description = describe(Model.load(model), sparsity=options.sparsity)
    if as_json:
        print_json(description)
    else:
        _show(description)


def _engine(path: Path, as_json: bool) -> None:
    from onnxtools.cli.build import show_layers, show_manifest
    from onnxtools.cli.render import print_json
    from onnxtools.engines.build.builder import Engine
    from onnxtools.engines.build.manifest import check_unchanged, read_manifest

    engine = Engine(path, read_manifest(path))
    check_unchanged(path, engine.manifest)
    if as_json:
        print_json(engine.manifest)
        return
    show_manifest(engine)
    show_layers(engine)


def _show(d: dict[str, Any]) -> None:
    from onnxtools.cli.render import collapse, console, size, table

    out = console()
    opsets = ", ".join(f"{k or 'ai.onnx'} {v}" for k, v in d["opsets"].items())
    out.print(
        f"{d['path']}: {d['nodes']} nodes, opset {opsets}, IR {d['ir_version']}, producer {d['producer'] or 'unknown'}",
        markup=False,
    )
    rows = [(io["kind"], io["name"], io["dtype"], " x ".join(map(str, io["shape"]))) for io in d["io"]]
    table("inputs and outputs", ("", "name", "type", "shape"), collapse(rows, 1))
    table("operators", ("operator", "count"), d["ops"].items(), right=("count",))
    by_type = [(dtype, entry["count"], size(entry["bytes"])) for dtype, entry in d["weights"]["by_dtype"].items()]
    where = ", ".join(d["weights"]["files"]) or "in the graph file"
    table(
        f"weights: {size(d['weights']['bytes'])}, {where}",
        ("type", "tensors", "size"),
        by_type,
        right=("tensors", "size"),
    )
    q = d["quantization"]
    out.print(
        f"  quantized: {q['quantized_products']} of {q['products']} weight products, {q['weight_fraction']:.0%} of "
        "their weight elements",
        markup=False,
    )
    cache = d["cache"]
    out.print(
        f"  cache: {cache['tensors']} tensors in {cache['dtype']}, {cache['shape']}" if cache else "  cache: none",
        markup=False,
    )
    for entry in d["provenance"]:
        out.print(f"  made by: {', '.join(p['pass'] for p in entry['passes'])} from {entry.get('input')}", markup=False)
    if d["sparsity"] is not None:
        rows = [
            (s["name"], "x".join(map(str, s["shape"])), f"{s['zeros']:.1%}", "yes" if s["is_2_4"] else "no")
            for s in d["sparsity"]
        ]
        table("sparsity", ("weight", "shape", "zeros", "2:4"), rows, right=("zeros",))


command = make_command("inspect", _HELP, _callback, [click.Argument(["model"], type=PATH)], [InspectOptions])
