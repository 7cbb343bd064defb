"""`convert` and `add-kv-cache` on a large model with external data: in its folder, and to another one against `cp`.

Targets: in the same folder <= 2 s and <= 200 MB; elsewhere >= 90% of the bandwidth of `cp` of the same bytes.
Whole processes, page cache warm (the data file is read once before each timed run), interleaved A B A B.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from _measure import ONNXTOOLS, Run, median, report, run, warm
from synthetic import make


def peers(folder: Path) -> list[list[str]]:
    """Load and save with other tools on a smaller model, as one process each."""
    import sys

    path = folder / "peer.onnx"
    size = make(path, 2.0)
    out = folder / "peer-out.onnx"
    code = {
        "onnx load + save": "m = onnx.load(a); onnx.save_model(m, b, save_as_external_data=True, location='peer-out.data')",
        "GraphSurgeon import + export": "g = gs.import_onnx(onnx.load(a)); onnx.save_model(gs.export_onnx(g), b, save_as_external_data=True, location='peer-out.data')",
        "onnx_ir load + save": "m = ir.load(a); ir.save(m, b, external_data='peer-out.data')",
    }
    imports = {
        "onnx load + save": "import onnx",
        "GraphSurgeon import + export": "import onnx, onnx_graphsurgeon as gs",
        "onnx_ir load + save": "import onnx_ir as ir",
    }
    rows = []
    ours = run([ONNXTOOLS, "cleanup", str(path), str(folder / "ours" / "out.onnx")])
    rows.append(["onnxtools cleanup, other folder", f"{size / 1e9:.1f} GB", f"{ours.seconds:.2f}", f"{ours.peak_mib:.0f}", "1.0"])
    for name, body in code.items():
        for leftover in folder.glob("peer-out*"):
            leftover.unlink()
        found = run([sys.executable, "-c", f"{imports[name]}; a, b = {str(path)!r}, {str(out)!r}; {body}"])
        rows.append([name, f"{size / 1e9:.1f} GB", f"{found.seconds:.2f}", f"{found.peak_mib:.0f}", f"{found.seconds / ours.seconds:.1f} x our time"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=10)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="onnxtools-bench-", dir=options.folder))
    try:
        (folder / "ours").mkdir()
        source = folder / "gpt.onnx"
        size = make(source, options.gb)
        data = source.with_name("gpt.onnx.weights")
        gigabytes = f"{size / 1e9:.1f} GB"
        commands = {
            "convert": ["convert", str(source), str(folder / "qdq.onnx"), "--opset19"],
            "add-kv-cache": ["add-kv-cache", str(folder / "qdq.onnx"), str(folder / "kv.onnx")],
        }
        rows = []
        for name, command in commands.items():
            found = median([run([ONNXTOOLS, *command]) for _ in range(options.runs)])
            rows.append([f"{name}, same folder", gigabytes, f"{found.seconds:.2f}", f"{found.peak_mib:.0f}", "no weight copied"])
        copies: dict[str, list[Run]] = {"cp": [], "cp + sync": [], "convert": []}
        for _ in range(options.runs):
            for name, times in copies.items():
                for leftover in (folder / "ours").iterdir():
                    leftover.unlink()
                warm(data)
                target = folder / "ours"
                command = {
                    "cp": ["cp", str(data), str(target / "copy")],
                    "cp + sync": ["sh", "-c", f"cp {data} {target / 'copy'} && sync {target / 'copy'}"],
                    "convert": [ONNXTOOLS, "convert", str(source), str(target / "qdq.onnx"), "--opset19"],
                }[name]
                times.append(run(command))
        base = median(copies["cp"]).seconds
        synced = median(copies["cp + sync"]).seconds
        for name, times in copies.items():
            found = median(times)
            ratio = f"{base / found.seconds:.0%} of cp, {synced / found.seconds:.0%} of cp + sync"
            rows.append([f"{name}, other folder", gigabytes, f"{found.seconds:.2f}", f"{found.peak_mib:.0f}", ratio])
        for leftover in (*(folder / "ours").iterdir(), data):
            leftover.unlink()
        rows += peers(folder)
        notes = ["Our saves flush to disk before the rename (fsync); `cp` alone does not.", f"Medians of {options.runs}; peak is the process's VmHWM."]
        report("surgery", "Graph surgery on a large model", ("what", "weights", "s", "peak MiB", "ratio"), rows, notes, options.json)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
