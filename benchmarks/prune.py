"""`prune` as a whole process against `polygraphy surgeon prune`, against `cp`, and its peak memory on a large model.

Targets: >= 500 times polygraphy on the same 0.5 GB file; >= 60% of `cp` warm with two workers; <= 200 MB at 10 GB.
`fp8-fold` is `convert` storing the weights of an FP8 export, against `cp` of the bytes that it reads.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from _measure import ONNXTOOLS, Run, median, report, run, warm
from synthetic import make

Row = list[str]


def against_cp(folder: Path, gigabytes: float, runs: int, command: str, *, fp8: bool = False) -> list[Row]:
    """`command` and `cp` of the data file, interleaved."""
    source = folder / "m.onnx"
    size = make(source, gigabytes, fp8=fp8)
    data = source.with_name("m.onnx.weights")
    out = folder / "out"
    times: dict[str, list[Run]] = {"cp": [], "cp + sync": [], command: []}
    for _ in range(runs):
        for name, found in times.items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            warm(data)
            cp = ["cp", str(data), str(out / "copy")]
            ours = [ONNXTOOLS, command, str(source), str(out / "out.onnx"), "--no-check"]
            found.append(run(ours if name == command else cp if name == "cp" else ["sh", "-c", f"cp {data} {out / 'copy'} && sync {out / 'copy'}"]))
    base, synced = median(times["cp"]).seconds, median(times["cp + sync"]).seconds
    label = f"{command}{' (FP8 weights folded)' if fp8 else ''}"
    rows = [[name, f"{size / 1e9:.1f} GB", f"{median(times[name]).seconds:.2f}", f"{median(times[name]).peak_mib:.0f}", ""] for name in ("cp", "cp + sync")]
    found = median(times[command])
    ratio = f"{base / found.seconds:.0%} of cp, {synced / found.seconds:.0%} of cp + sync"
    rows.append([label, f"{size / 1e9:.1f} GB", f"{found.seconds:.2f}", f"{found.peak_mib:.0f}", ratio])
    for leftover in (source, data):
        leftover.unlink()
    shutil.rmtree(out)
    return rows


def against_polygraphy(folder: Path) -> list[Row]:
    source = folder / "small.onnx"
    size = make(source, 0.5)
    ours = median([run([ONNXTOOLS, "prune", str(source), str(folder / "ours.onnx"), "--no-check"]) for _ in range(3)])
    polygraphy = str(Path(sys.executable).with_name("polygraphy"))
    peer = run([polygraphy, "surgeon", "prune", str(source), "-o", str(folder / "peer.onnx"), "--save-external-data", "peer.data"])
    return [
        ["polygraphy surgeon prune", f"{size / 1e9:.2f} GB", f"{peer.seconds:.1f}", f"{peer.peak_mib:.0f}", "1"],
        ["onnxtools prune", f"{size / 1e9:.2f} GB", f"{ours.seconds:.2f}", f"{ours.peak_mib:.0f}", f"{peer.seconds / ours.seconds:.0f} x polygraphy"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2.5, help="size of the model that is compared with cp")
    parser.add_argument("--large-gb", type=float, default=10, help="size of the model for peak memory; 0 leaves it out")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--skip-polygraphy", action="store_true", help="leave out the peer, which takes seven minutes")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="onnxtools-bench-", dir=options.folder))
    try:
        rows = against_cp(folder, options.gb, options.runs, "prune")
        rows += against_cp(folder, options.gb, options.runs, "convert", fp8=True)
        if options.large_gb:
            rows += against_cp(folder, options.large_gb, 1, "prune")
        if not options.skip_polygraphy:
            rows += against_polygraphy(folder)
        notes = [f"Medians of {options.runs}, page cache warm, interleaved; peak is the process's VmHWM.", "Our saves flush to disk before the rename (fsync)."]
        report("prune", "2:4 pruning and FP8 folding, file to file", ("what", "weights", "s", "peak MiB", "ratio"), rows, notes, options.json)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
