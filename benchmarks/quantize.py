"""What quantization costs SmolLM2-135M: LAMBADA of each scheme against our own fp32 graph, in one run.

bf16 needs `--device cuda`: ONNX Runtime's CPU provider has no bf16 kernels.

Targets (issue 5), of the greedy first piece (`top1`) and the whole word (`acc`), in points against fp32: fp16 and bf16
0.2, FP8 0.5, SmoothQuant INT8 per token and channel 1.0 and better than without smoothing, INT4 AWQ block 64 4.0 and
better than rounding to nearest, KV cache 0.3.
Calibration: WikiText-2, the scores: LAMBADA; neither sees the other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import onnxruntime

from onnxtools.checkpoints.tokenizer import Tokenizer
from onnxtools.engines.runtimes.onnxrt.ort_runtime import OrtRuntime
from onnxtools.evaluate.lambada import (
    PassageResult,
    compare_lambada,
    read_lambada,
    score_lambada,
    summarize_lambada,
    tokenized,
)
from onnxtools.generation.runtime import RuntimeOptions

from benchmarks.decode import gguf  # isort: skip

SHARED = Path(__file__).parents[1] / "../shared/data"
CALIB = ["--calib", str(SHARED / "wikitext2_test.txt"), "--calib-size", "32"]
SCHEMES: dict[str, list[str]] = {
    "fp16": ["precision", "--to", "fp16"],
    "bf16": ["precision", "--to", "bf16"],
    "FP8 W8A8": ["quantize", "--fp8", *CALIB],
    "FP8 W8A8, GPTQ": ["quantize", "--fp8", "--gptq", *CALIB],
    "FP8 W8A8, GPTQ, attention": ["quantize", "--fp8", "--gptq", "--attention", *CALIB],
    "INT8 per tensor, QKV and FC1": ["quantize", "--int8", *CALIB],
    "INT8 SmoothQuant 0.5 per tensor, QKV and FC1": ["quantize", "--smoothquant", "0.5", *CALIB],
    "INT8 per token, per channel": ["quantize", "--int8", "--per-token", "--per-channel", "--all-layers", *CALIB],
    "INT8 SmoothQuant 0.5 per token, per channel": [
        "quantize",
        "--smoothquant",
        "0.5",
        "--per-token",
        "--per-channel",
        "--all-layers",
        *CALIB,
    ],
    "INT4 RTN, block 64": ["quantize", "--int4-rtn", "--block-size", "64"],
    "INT4 AWQ, block 64": ["quantize", "--int4-awq", "--block-size", "64", *CALIB],
    "INT4 AWQ and GPTQ, block 64": ["quantize", "--int4-awq", "--gptq", "--block-size", "64", *CALIB],
    "KV cache FP8": ["quantize", "--kv-cache", "fp8", *CALIB],
    "KV cache INT8": ["quantize", "--kv-cache", "int8", *CALIB],
}


def onnxtools(*args: str | Path) -> None:
    """In a process of its own, so that one run does not warm the next."""
    subprocess.run([sys.executable, "-m", "onnxtools", *map(str, args)], check=True, stdout=subprocess.DEVNULL)


def written(path: Path) -> float:
    """MB of the data files that were written for this graph."""
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*data")) / 1e6


def score(path: Path, rows: list[tuple[str, str]], device: str = "cpu") -> tuple[list[PassageResult], float]:
    runtime = OrtRuntime(path, RuntimeOptions(device=device))
    passages = tokenized(rows, Tokenizer.open(path.parent), runtime.info.max_positions)
    began = time.perf_counter()
    found = score_lambada(runtime, passages, batch_size=8, known={}, done=lambda *_: None)
    runtime.close()
    return found, time.perf_counter() - began


def line(name: str, results: list[PassageResult], reference: list[PassageResult], seconds: float, size: float) -> str:
    s, d = summarize_lambada(results), compare_lambada(reference, results)
    top1 = 100 * (s["acc_top1"] - summarize_lambada(reference)["acc_top1"])
    return (
        f"| {name} | {s['acc']:.4f} | {100 * d['acc_difference']:+.2f} +- {100 * d['acc_difference_half_ci95']:.2f} | "
        f"{s['acc_top1']:.4f} | {top1:+.2f} |"
        f" {s['ppl_token']:.3f} | {size:.0f} | {seconds:.0f} |"
    )


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="what scores them; they are made on the CPU"
    )
    parser.add_argument("--only", nargs="*", help="names of schemes")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        source = folder / "model.onnx"
        if not source.exists():
            onnxtools("export", gguf(), "-o", source, "--dtype", "fp32")
        rows = read_lambada(SHARED / "lambada_openai.jsonl", args.rows)
        print(
            f"{date.today()}, onnxruntime {onnxruntime.__version__}, {args.device}; SmolLM2-135M, first {len(rows)} "
            "rows of LAMBADA;"
            " calibration: 32 texts of 512 tokens of WikiText-2\n"
        )
        print(
            "| scheme | acc (whole word) | difference, points | top1 | difference | ppl(token) | weights MB | seconds "
            "to make |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        reference, _ = score(source, rows, args.device)
        print(line("fp32", reference, reference, 0, written(source)), flush=True)
        for name in args.only or [name for name in SCHEMES if args.device == "cuda" or name != "bf16"]:
            command, *flags = SCHEMES[name]
            out = folder / f"{''.join(c if c.isalnum() else '_' for c in name)}.onnx"
            began = time.perf_counter()
            onnxtools(command, source, out, "--no-check", *flags)
            seconds = time.perf_counter() - began
            results, _ = score(out, rows, args.device)
            print(line(name, results, reference, seconds, written(out)), flush=True)


if __name__ == "__main__":
    run()
