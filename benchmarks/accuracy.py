"""SmolLM2-135M (fp32, CPU) in ONNX Runtime against transformers: greedy tokens of 20 prompts, and the LAMBADA figures.

Targets: the same 64 tokens on all 20 prompts; LAMBADA's first 500 rows within 0.2 points, and perplexities equal to the
third digit. The prompts are the first words of LAMBADA's passages. Data: --path lambada_openai.jsonl.
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

from onnxtools.exporter.export import export
from onnxtools.exporter.export_options import ExportOptions

FIGURES = ("acc", "acc_top1", "acc_top3", "acc_top5", "ppl_last_token", "ppl_sequence", "ppl_token")


def said(*command: str) -> dict[str, object]:
    tool = str(Path(sys.executable).with_name("onnxtools"))
    done = subprocess.run(
        [tool, *command, "--json"], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, default=Path("../shared/data/lambada_openai.jsonl"))
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--kv-cache", default="concat", choices=("concat", "gqa"))
    options = parser.parse_args()
    rows = [json.loads(line)["context"] for line in options.path.read_text().splitlines()[:20]]
    prompts = [" ".join(row.split()[: 4 + index]) for index, row in enumerate(rows)]
    both = ("--runtime", "onnxrt", "--runtime", "frameworks", "--checkpoint", str(gguf()))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.onnx")
        export(gguf(), model, ExportOptions(kv_cache=options.kv_cache, dtype="fp32"))
        texts = said(
            "run",
            str(model),
            *(part for p in prompts for part in ("--prompt", p)),
            "--max-new-tokens",
            "64",
            "--batch-size",
            "1",
            "--ignore-eos",
            *both,
        )
        scores = said(
            "accuracy",
            str(model),
            "--dataset",
            "lambada",
            "--path",
            str(options.path),
            "--limit",
            str(options.limit),
            *both,
        )
    tokens = [found[0]["token_ids"] for found in texts["runtimes"].values()]  # type: ignore[attr-defined]
    same = sum(a == b for a, b in zip(*tokens, strict=True))
    print(
        f"{date.today()}; onnxruntime {version('onnxruntime')}, transformers {version('transformers')}, torch "
        f"{version('torch')}; --kv-cache {options.kv_cache}"
    )
    print(f"\ngreedy, 64 tokens: {same} of {len(prompts)} prompts give the same tokens as transformers\n")
    print(f"LAMBADA, first {options.limit} rows\n\n| | {' | '.join(FIGURES)} |\n| --- |{' ---: |' * len(FIGURES)}")
    for name, found in scores["models"].items():  # type: ignore[attr-defined]
        print(f"| {name} | {' | '.join(f'{found[figure]:.4f}' for figure in FIGURES)} |")


if __name__ == "__main__":
    main()
