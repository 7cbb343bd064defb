"""`convert` and `add-kv-cache` on a large model with external data: in its folder, and to another one against `cp`.

Targets: in the same folder <= 2 s and <= 200 MB; elsewhere >= 90% of the bandwidth of `cp` of the same bytes.
Peers load and save a smaller model in the same run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from _measure import (
    MEMORY_TARGET,
    Command,
    Row,
    against_cp,
    empty,
    interleave,
    parser,
    report,
    row,
    run,
    scratch,
    times_faster,
    tool,
    warm,
)
from synthetic import make, weights_path

_SAVE = "save_as_external_data=True, location='peer.data'"
PEERS = {
    "onnx load + save": f"import onnx; onnx.save_model(onnx.load(a), b, {_SAVE})",
    "GraphSurgeon import + export": (
        "import onnx, onnx_graphsurgeon as gs; "
        f"onnx.save_model(gs.export_onnx(gs.import_onnx(onnx.load(a))), b, {_SAVE})"
    ),
    "onnx_ir load + save": "import onnx_ir as ir; ir.save(ir.load(a), b, external_data='peer.data')",
}


def peers(folder: Path, gigabytes: float, runs: int) -> list[Row]:
    """Load and save: onnxtools' smallest pass (`cleanup`) into another folder, and other libraries, a process each."""
    source, out = folder / "peer.onnx", folder / "peer-out"
    size = make(source, gigabytes)
    ours = "onnxtools cleanup, other folder"
    target = str(out / "out.onnx")
    cases: dict[str, Command] = {ours: [tool("onnxtools"), "cleanup", str(source), target]}
    for name, body in PEERS.items():
        cases[name] = [sys.executable, "-c", f"a, b = {str(source)!r}, {target!r}; {body}"]

    def before() -> None:
        empty(out)
        warm(weights_path(source))

    found = interleave(cases, runs, before)
    return [
        row(name, size, times, f"{times_faster(times, found[ours]):.1f} x our time" if name != ours else "")
        for name, times in found.items()
    ]


def large(folder: Path, gigabytes: float, runs: int) -> list[Row]:
    source, converted, out = folder / "gpt.onnx", folder / "qdq.onnx", folder / "out"
    size = make(source, gigabytes)
    data = weights_path(source)

    def commands(target: Path) -> dict[str, Command]:
        return {
            "convert": [tool("onnxtools"), "convert", str(source), str(target / "qdq.onnx"), "--opset19"],
            "add-kv-cache": [tool("onnxtools"), "add-kv-cache", str(converted), str(target / "kv.onnx")],
        }

    run(commands(folder)["convert"])  # add-kv-cache reads this one
    found = interleave(commands(folder), runs, lambda: warm(data))
    rows = [
        row(f"{name}, same folder", size, times, "no weight read or copied", f"<= 2 s, {MEMORY_TARGET}", moved=False)
        for name, times in found.items()
    ]
    elsewhere = {f"{name}, other folder": command for name, command in commands(out).items()}
    rows += against_cp(data, out, elsewhere, runs, f">= 90% of cp, {MEMORY_TARGET}")
    data.unlink()
    return rows


def main() -> None:
    made = parser(__doc__, runs=3)
    made.add_argument("--gb", type=float, default=10, help="size of the model [10]")
    made.add_argument(
        "--peer-gb", type=float, default=2.5, help="size of the model that the peers get; 0 leaves them out [2.5]"
    )
    options = made.parse_args()
    with scratch(options.folder) as folder:
        rows = large(folder, options.gb, options.runs)
        if options.peer_gb:
            rows += peers(folder, options.peer_gb, options.runs)
    report("surgery", "Graph surgery on a large model", rows, [], options)


if __name__ == "__main__":
    main()
