"""`quantize` as a whole process: INT4 without calibration against `cp`, and the peak memory of FP8 with calibration.

Targets (issue 5): weights alone at >= 50% of `cp` a core; FP8 with calibration of 5 GB of fp16 within 1.5 GB and one
layer's activations.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from _measure import Row, against_cp, parser, report, row, run, scratch, tool
from synthetic import make, weights_path

SHAPE = "--family gpt2 --n-layer 32 --n-embd 2560 --n-head 32 --vocab-size 51200 --n-positions 1024 --dtype fp16"


def weights_alone(folder: Path, gigabytes: float, runs: int) -> list[Row]:
    source, out = folder / "gpt.onnx", folder / "out"
    make(source, gigabytes)
    data, raised = weights_path(source), folder / "gpt21.onnx"
    run([tool("onnxtools"), "set-opset", str(source), str(raised), "--version", "21", "--no-check"])
    command = [tool("onnxtools"), "quantize", str(raised), str(out / "int4.onnx"), "--int4-rtn", "--no-check"]
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # what is started inherits it
    try:
        rows = against_cp(data, out, {"quantize --int4-rtn": command}, runs, ">= 50% of cp a core")
    finally:
        os.sched_setaffinity(0, cores)
    rows = [replace(found, what=f"{found.what}, one core") for found in rows]
    rows += against_cp(data, out, {"quantize --int4-rtn": command}, runs, "")
    data.unlink()
    return rows


def calibrated(folder: Path, texts: int, length: int) -> Row:
    model, calib = folder / "big" / "m.onnx", folder / "calib.jsonl"
    model.parent.mkdir()
    run([tool("onnxtools"), "export", "--random", *SHAPE.split(), "-o", str(model)])
    size = model.with_name("m.onnx.data").stat().st_size
    generator = np.random.default_rng(0)
    calib.write_text(
        "".join(json.dumps({"text": generator.integers(0, 51200, length).tolist()}) + "\n" for _ in range(texts))
    )
    made = run(
        [
            tool("onnxtools"),
            "quantize",
            str(model),
            str(model.with_name("fp8.onnx")),
            "--fp8",
            "--calib",
            str(calib),
            "--no-check",
        ]
    )
    return row(
        f"quantize --fp8, {texts} texts of {length} tokens", size, [made], "", "<= 1.5 GB and one layer's activations"
    )


def main() -> None:
    made = parser(__doc__, runs=5)
    made.add_argument("--gb", type=float, default=4, help="size of the model that is compared with cp [4]")
    made.add_argument("--texts", type=int, default=2, help="calibration texts; 0 leaves calibration out [2]")
    made.add_argument("--length", type=int, default=128, help="tokens of a text [128]")
    options = made.parse_args()
    with scratch(options.folder) as folder:
        rows = weights_alone(folder, options.gb, options.runs)
        if options.texts:
            rows.append(calibrated(folder, options.texts, options.length))
    report(
        "quantize_files",
        "Quantization, file to file",
        rows,
        ["The model with calibration is GPT-2's shape with random weights, run once."],
        options,
    )


if __name__ == "__main__":
    main()
