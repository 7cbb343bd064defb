"""Build a TensorRT engine and its manifest; TensorRT-RTX builds on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxtools.cli.options import PATH, dataclass_options, from_parameters
from onnxtools.engines.spec import EngineSpec

if TYPE_CHECKING:
    from onnxtools.engines.builder import Engine

_HELP = """Build ENGINE from MODEL and write ENGINE.json beside it.

The graph is checked before the build (operators, FP8, 2:4 weights, shapes, TensorRT's silent traps) and the manifest says
what the engine has: inputs and outputs, profiles, layers, hashes, versions. Without shapes, profiles are derived from the
graph: for a model with a KV cache one for the context and one for generation.

\b
Example:
  onnxtools build sparse.onnx gpt.engine --fp8 --sparsity --compute-capability 8.9
"""


def _callback(model_path: Path, engine_path: Path, print_trtexec: bool, as_json: bool, debug: bool, **values: Any) -> None:
    from onnxtools.cli.render import print_json
    from onnxtools.engines.build import build

    spec = from_parameters(EngineSpec, values)
    if print_trtexec:
        from onnxtools.engines.profiles import profiles_for
        from onnxtools.engines.trtexec import trtexec_line
        from onnxtools.model import Model

        click.echo(trtexec_line(model_path, engine_path, spec, profiles_for(Model.load(model_path), spec)))
        return
    engine = build(model_path, engine_path, spec)
    if as_json:
        print_json(engine.manifest)
    else:
        show_manifest(engine)


command = click.Command(
    "build",
    help=_HELP,
    callback=_callback,
    params=[
        click.Argument(["model_path"], metavar="MODEL", type=PATH),
        click.Argument(["engine_path"], metavar="ENGINE", type=PATH),
        *dataclass_options(EngineSpec),
        click.Option(["--print-trtexec"], is_flag=True, help="Print the equivalent trtexec line and build nothing."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the manifest as JSON on stdout."),
        click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
    ],
)


def show_manifest(engine: Engine) -> None:
    """The manifest as people read it."""
    from onnxtools.cli.render import collapse, console, size, table

    m, out = engine.manifest, console()
    backend, capabilities = m["backend"], ", ".join(m["compute_capabilities"])
    rows = [("input", i["name"], i["dtype"], _dims(i["shape"])) for i in m["inputs"]]
    rows += [("output", i["name"], i["dtype"], _dims(i["shape"])) for i in m["outputs"]]
    title = f"{engine.path}: {size(m['engine']['bytes'])}, {backend['name']} {backend['version']}, compute capability {capabilities}"
    table(f"{title} (from the {m['io_source']})", ("", "name", "type", "shape"), collapse(rows, 1))
    for index, profile in enumerate(m["profiles"]):
        spans = [(name, *(_dims(span[which]) for which in ("min", "opt", "max"))) for name, span in profile["inputs"].items()]
        table(f"profile {index}: {profile['name']}", ("input", "min", "opt", "max"), collapse(spans, 0))
    types = ", ".join(f"{count} {name}" for name, count in m["layers"]["output_dtypes"].items())
    out.print(f"  layer outputs: {types}", markup=False)
    for line in (*m["mends"], *m["notes"]):
        out.print(f"  {line}", markup=False)
    for line in m["warnings"]:
        out.print(f"  warning: {line}", style="yellow", markup=False)
    out.print(f"  built in {m['build_seconds']:.1f} s, peak {m['peak_rss_mib']:.0f} MiB; manifest in {engine.path}.json", markup=False)


def _dims(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
