"""Which of our models TensorRT-RTX builds: every fixture, and SmolLM2 in every precision and cache, for 8.9 and 12.0 in
one plan.

Each is built, or refused before the parser sees it with the name of a node (issue 6); a failure inside the parser or
builder is an error here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

from decode import gguf

ROOT = Path(__file__).parents[1]
SHARED = ROOT / "../shared"
CALIB = ["--calib", str(SHARED / "data/wikitext2_test.txt"), "--calib-size", "2", "--calib-length", "128"]
STEPS = {
    "fp32": [], "fp16": [["precision", "--to", "fp16"]], "bf16": [["precision", "--to", "bf16"]], "2:4": [["prune"]],
    "FP8": [["precision", "--to", "fp16"], ["quantize", "--fp8", *CALIB]],
    "FP8 attention": [["precision", "--to", "fp16"], ["quantize", "--fp8", "--attention", *CALIB]],
    "INT8": [["quantize", "--smoothquant", "0.5", *CALIB]],
    "INT8 per token": [["quantize", "--int8", "--per-token", "--per-channel", "--all-layers", *CALIB]],
    "INT4": [["precision", "--to", "fp16"], ["quantize", "--int4-awq", *CALIB]],
    "KV FP8": [["quantize", "--kv-cache", "fp8", *CALIB]],
    "KV INT8": [["quantize", "--kv-cache", "int8", *CALIB]],
}  # fmt: skip
BUILD = [
    "--backend",
    "tensorrt-rtx",
    "--compute-capability",
    "8.9",
    "--compute-capability",
    "12.0",
    "--max-batch-size",
    "2",
    "--max-seq-len",
    "128",
    "--json",
]


def onnxtools(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onnxtools", *map(str, args)], capture_output=True, text=True, check=False
    )


def built(source: Path, folder: Path) -> str:
    """A cell of the table."""
    done = onnxtools("build", source, folder / "e.engine", *BUILD)
    if done.returncode:
        line = done.stderr.strip().splitlines()[-1].removeprefix("error: ")
        return (
            f"**fails inside TensorRT**: {line}"
            if "parser refuses" in line or "cannot build" in line or "internal" in line
            else f"refused: {line}"
        )
    found = json.loads(done.stdout)
    return (
        f"{found['engine']['bytes'] / 1e6:.1f} MB in {found['build_seconds']:.1f} s, peak {found['peak_rss_mib']:.0f} "
        "MiB"
    )


def fixtures(folder: Path) -> None:
    paths = [*sorted((ROOT / "fixtures").rglob("*.onnx")), *sorted((SHARED / "fixtures/te").glob("*.onnx"))]
    for path in paths:
        print(f"| {path.parent.name}/{path.stem} | as it is | {short(built(path, folder))} |", flush=True)
        made = folder / "converted.onnx"
        done = onnxtools("convert", path, made, "--opset19")
        if done.returncode == 0:
            print(f"| {path.parent.name}/{path.stem} | converted | {short(built(made, folder))} |", flush=True)


def short(cell: str) -> str:
    return cell.replace(str(ROOT), ".").replace("|", "/")[:260]


def smollm2(folder: Path, forms: list[str]) -> None:
    for form in forms:
        first = folder / f"{form}.onnx"
        onnxtools("export", gguf(), "-o", first, "--kv-cache", form, "--dtype", "fp32").check_returncode()
        for name, steps in STEPS.items():
            path = first
            problem = ""
            for number, (command, *flags) in enumerate(steps):
                target = folder / f"step{number}.onnx"
                done = onnxtools(command, path, target, "--no-check", *flags)
                problem = problem or (done.stderr.strip() if done.returncode else "")
                path = target
            print(f"| SmolLM2 {form} | {name} | {short(problem or built(path, folder))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=["fixtures", "concat", "scatter"])
    parts = parser.parse_args().parts
    print(f"{date.today()}, tensorrt-rtx {version('tensorrt-rtx-cu13')}, on a CPU, for 8.9 and 12.0 in one plan\n")
    print("| model | form | result |\n| --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        if "fixtures" in parts:
            fixtures(Path(temporary))
        smollm2(Path(temporary), [part for part in parts if part != "fixtures"])


if __name__ == "__main__":
    main()
