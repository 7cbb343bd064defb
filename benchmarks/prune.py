"""`prune` as a whole process: against `polygraphy surgeon prune`, against `cp`, and its peak memory on a large model.

Targets: >= 500 times polygraphy on the same 0.5 GB file; >= 60% of `cp` with two workers; <= 200 MB at 10 GB.
"""

from __future__ import annotations

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


def ours(source: Path, out: Path) -> Command:
    return [tool("onnxtools"), "prune", str(source), str(out / "sparse.onnx"), "--no-check"]


def file_to_file(folder: Path, gigabytes: float, runs: int, target: str) -> list[Row]:
    source, out = folder / "gpt.onnx", folder / "out"
    make(source, gigabytes)
    data = weights_path(source)
    rows = against_cp(data, out, {"prune": ours(source, out)}, runs, target)
    data.unlink()
    return rows


def against_polygraphy(folder: Path, gigabytes: float, runs: int) -> list[Row]:
    source, out = folder / "small.onnx", folder / "out"
    size = make(source, gigabytes)

    def before() -> None:
        empty(out)
        warm(weights_path(source))

    times = interleave({"prune": ours(source, out)}, runs, before)["prune"]
    before()
    command = [
        tool("polygraphy"),
        "surgeon",
        "prune",
        str(source),
        "-o",
        str(out / "peer.onnx"),
        "--save-external-data",
        "peer.data",
    ]
    peer = run(command)
    faster = times_faster([peer] * runs, times)
    return [
        row("polygraphy surgeon prune (once)", size, [peer]),
        row("prune", size, times, f"{faster:.0f} x as fast as polygraphy", ">= 500 x"),
    ]


def main() -> None:
    made = parser(__doc__, runs=5)
    made.add_argument("--gb", type=float, default=5, help="size of the model that is compared with cp [5]")
    made.add_argument(
        "--large-gb", type=float, default=10, help="size of the model for peak memory, one run; 0 leaves it out [10]"
    )
    made.add_argument("--peer-gb", type=float, default=0.5, help="size of the file that polygraphy gets [0.5]")
    made.add_argument("--skip-polygraphy", action="store_true", help="leave out the peer, which takes seven minutes")
    options = made.parse_args()
    with scratch(options.folder) as folder:
        rows = file_to_file(folder, options.gb, options.runs, f">= 60% of cp, {MEMORY_TARGET}")
        if options.large_gb:
            rows += file_to_file(folder, options.large_gb, 1, MEMORY_TARGET)
        if not options.skip_polygraphy:
            rows += against_polygraphy(folder, options.peer_gb, options.runs)
    report("prune", "2:4 pruning, file to file", rows, ["The model of the largest size is run once."], options)


if __name__ == "__main__":
    main()
