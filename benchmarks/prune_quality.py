"""What 2:4 costs SmolLM2-135M: perplexity of WikiText-2 after each method, in one run. Calibration: contexts of
LAMBADA.

Target (issue 5): SparseGPT better than Wanda better than magnitude, by clear factors.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import date
from pathlib import Path

import onnxruntime

from onnxtools.checkpoints.tokenizer import Tokenizer
from onnxtools.engines.runtimes.onnxrt.ort_runtime import OrtRuntime
from onnxtools.evaluate.wikitext import Windows, score_wikitext
from onnxtools.generation.runtime import RuntimeOptions

from benchmarks.decode import gguf  # isort: skip
from benchmarks.quantize import SHARED, onnxtools  # isort: skip


def perplexity(path: Path, windows: int) -> float:
    runtime = OrtRuntime(path, RuntimeOptions(device="cpu"))
    text = (SHARED / "wikitext2_test.txt").read_text()
    tokens = Tokenizer.open(path.parent).pieces(text)[: windows * 1024]
    found = score_wikitext(runtime, tokens, len(text.split()), Windows(1024, 1024), batch_size=1, done=lambda: None)
    runtime.close()
    return float(found.figures["ppl_token"])


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--texts", type=int, default=512)
    args = parser.parse_args()
    calib = ["--calib", SHARED / "lambada_openai.jsonl", "--calib-field", "context", "--calib-size", str(args.texts)]
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "model.onnx")
        onnxtools("export", gguf(), "-o", source, "--dtype", "fp32")
        dense = perplexity(source, args.windows)
        print(
            f"{date.today()}, onnxruntime {onnxruntime.__version__}; WikiText-2, {args.windows} windows of 1024 tokens;"
            f" calibration: {args.texts} LAMBADA contexts\n"
        )
        print("| 2:4 by | ppl(token) | of dense | seconds to make |\n| --- | ---: | ---: | ---: |")
        print(f"| dense | {dense:.2f} | 1.00 | |", flush=True)
        for method in ("magnitude", "wanda", "sparsegpt"):
            out, began = source.with_name(f"{method}.onnx"), time.perf_counter()
            onnxtools("prune", source, out, "--no-check", "--method", method, *(calib if method != "magnitude" else []))
            seconds = time.perf_counter() - began
            found = perplexity(out, args.windows)
            print(f"| {method} | {found:.2f} | {found / dense:.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    run()
