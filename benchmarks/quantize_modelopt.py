"""nvidia-modelopt on the model and the texts of `benchmarks/quantize.py`, in PyTorch (its quantization is simulated
there).

Needs an environment of its own: `pip install torch==2.13.0 nvidia-modelopt transformers accelerate gguf`. Its rows are
compared with PyTorch's fp32 on the same passages; tokens and scores are those of `onnxtools.evaluate.lambada`, so the
differences can be laid beside ours.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
import transformers
from modelopt.torch.quantization import extensions

SHARED = Path(__file__).parents[1] / "../shared/data"


def configurations() -> dict[str, dict[str, Any]]:
    """Its own presets; INT4 with our block size, and the head left alone as ours is."""
    awq = json.loads(json.dumps(mtq.INT4_AWQ_CFG, default=str))
    text = json.dumps(awq).replace('"-1": 128', '"-1": 64')
    awq64 = json.loads(text, object_hook=lambda d: {int(k) if k.lstrip("-").isdigit() else k: v for k, v in d.items()})
    return {
        "modelopt FP8_DEFAULT": mtq.FP8_DEFAULT_CFG,
        "modelopt INT8_SMOOTHQUANT": mtq.INT8_SMOOTHQUANT_CFG,
        "modelopt INT4_AWQ, block 64": awq64,
    }


@torch.no_grad()
def score(model: Any, passages: list[tuple[list[int], list[int]]]) -> tuple[np.ndarray, np.ndarray, float]:
    """Whole word right, first piece right, perplexity a token."""
    exact, first, total, count = [], [], 0.0, 0
    for start in range(0, len(passages), 8):
        part = passages[start : start + 8]
        longest = max(len(c) + len(w) for c, w in part)
        ids = torch.tensor([c + w + [0] * (longest - len(c) - len(w)) for c, w in part], device=model.device)
        mask = torch.tensor(
            [[1] * (len(c) + len(w)) + [0] * (longest - len(c) - len(w)) for c, w in part], device=model.device
        )
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
        for row, (context, word) in enumerate(part):
            logits = model.lm_head(hidden[row, len(context) - 1 : len(context) - 1 + len(word)])
            target = torch.tensor(word, device=model.device)
            hit = logits.argmax(-1) == target
            exact.append(bool(hit.all()))
            first.append(bool(hit[0]))
            total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
            count += len(word)
    return np.array(exact), np.array(first), float(np.exp(total / count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", help="names of presets; INT4_AWQ searches for a quarter of an hour")
    args = parser.parse_args()
    for kernels in (extensions.get_cuda_ext, extensions.get_cuda_ext_fp8):
        kernels.extension = None  # they would be compiled for minutes; PyTorch's own operators give the same
    options = {"gguf_file": args.gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.gguf.parent, **options)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    rows = [json.loads(line) for line in (SHARED / "lambada_openai.jsonl").read_text().splitlines()[: args.rows]]
    passages = [(encode(row["context"]), encode(" " + row["continuation"].strip())) for row in rows]
    ids = encode((SHARED / "wikitext2_test.txt").read_text()[:400000])[: 32 * 512]
    texts = [torch.tensor([ids[start : start + 512]], device=args.device) for start in range(0, len(ids), 512)]

    def load() -> Any:
        return (
            transformers.AutoModelForCausalLM.from_pretrained(args.gguf.parent, dtype=torch.float32, **options)
            .eval()
            .to(args.device)
        )

    what = f"nvidia-modelopt {version('nvidia-modelopt')}, torch {torch.__version__}, {args.device}"
    print(f"{date.today()}, {what}; SmolLM2-135M, first {len(rows)} rows of LAMBADA\n")
    print("| tool | acc (whole word) | difference, points | top1 | difference | ppl(token) | seconds to make |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    exact, first, perplexity = score(load(), passages)
    print(f"| torch fp32 | {exact.mean():.4f} | | {first.mean():.4f} | | {perplexity:.3f} | |", flush=True)
    for name, configuration in configurations().items():
        if args.only and name not in args.only:
            continue
        model = load()
        began = time.perf_counter()

        def calibrate(model: Any) -> None:
            for text in texts:
                model(text)

        mtq.quantize(model, configuration, calibrate)
        seconds = time.perf_counter() - began
        e, f, p = score(model, passages)
        lost = [100 * (now.mean() - before.mean()) for now, before in ((e, exact), (f, first))]
        print(
            f"| {name} | {e.mean():.4f} | {lost[0]:+.2f} | {f.mean():.4f} | {lost[1]:+.2f} | {p:.3f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
