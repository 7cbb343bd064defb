"""What each Hugging Face family can do: measured here, and written down in docs/reference/families.md.

`python -m tests.exporter.family_table` writes the table; test_family_table.py measures it again.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from tests.exporter import hf
from tests.exporter.driver import decode
from tests.support import rel_l2, run

DOC = Path(__file__).parents[2] / "docs/reference/families.md"
CASES = {
    "bloom": "bloom", "cohere": "cohere", "deepseek_v2": "deepseek_v2", "deepseek_v3": "deepseek_v3",
    "exaone4": "exaone4_hybrid", "falcon": "falcon", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3",
    "glm": "glm", "glm4": "glm4", "gpt2": "gpt2", "gpt_bigcode": "bigcode_mqa", "gpt_neo": "gpt_neo",
    "gpt_neox": "gpt_neox_serial", "gpt_oss": "gpt_oss", "gptj": "gptj_inner", "granite": "granite", "helium": "helium",
    "llama": "llama", "ministral": "ministral", "mistral": "mistral", "mixtral": "mixtral", "mpt": "mpt",
    "nemotron": "nemotron", "olmo": "olmo", "olmo2": "olmo2", "opt": "opt", "phi": "phi_norms", "phi3": "phi3",
    "qwen2": "qwen2", "qwen2_moe": "qwen2_moe", "qwen3": "qwen3", "qwen3_moe": "qwen3_moe", "smollm3": "smollm3",
    "stablelm": "stablelm_grouped", "starcoder2": "starcoder2",
}  # fmt: skip
"""Each family and the case of `hf.CASES` that stands for it."""
FORMS = ("none", "concat", "scatter", "gqa")
COLUMNS = (*FORMS, "fp16", "bf16", "FP8", "INT4", "2:4", "engine")
SPLITS = (10, 1, 1, 1, 1, 1, 1, 1, 1)


def measure(family: str, folder: Path) -> list[str]:
    """The columns that hold for a tiny random model of the family.

    Forms: fp32 logits of a prefill and 8 steps within 1e-4 of transformers; fp16, bf16: within a relative L2 of 2e-2
    and 0.2 (a router that is nearly undecided decides otherwise); FP8, INT4, 2:4: the pass on the fp16 graph, and its
    own check; engine: TensorRT-RTX builds all three for 8.9.
    """
    has_size = "intermediate_size" in hf.CASES[CASES[family]][1]
    model = hf.make(CASES[family], folder / "hf", {"intermediate_size": 96} if has_size else {})  # blocks of 32
    rng = np.random.default_rng(3)
    ids, mask = rng.integers(3, 97, (2, sum(SPLITS))), np.ones((2, sum(SPLITS)), np.int64)
    expected, found = hf.logits(model, ids, mask), []
    for form in FORMS:
        path = folder / f"{form}.onnx"
        if run("export", folder / "hf", "-o", path, "--kv-cache", form).code == 0:
            assert np.abs(decode(path, form, ids, mask, SPLITS) - expected).max() <= 1e-4, (family, form)
            found.append(form)
    for dtype, tolerance in (("fp16", 2e-2), ("bf16", 0.2)):
        path = folder / f"{dtype}.onnx"
        if run("precision", folder / "concat.onnx", path, "--to", dtype, "--tolerance", str(tolerance)).code == 0:
            if dtype == "fp16":  # ONNX Runtime's CPU has no bf16 kernels; the pass compares in fp32 itself
                assert rel_l2(decode(path, "concat", ids, mask, SPLITS), expected) <= tolerance, (family, dtype)
            found.append(dtype)
    return found + _compressed(folder, rng)


def _compressed(folder: Path, rng: Any) -> list[str]:
    texts = [json.dumps({"text": row.tolist()}) for row in rng.integers(3, 97, (4, 12))]
    (folder / "texts.jsonl").write_text("\n".join(texts))
    jobs: dict[str, tuple[list[Any], list[str]]] = {
        "FP8": (["quantize", "--fp8", "--calib", folder / "texts.jsonl"], ["--fp8"]),
        "INT4": (["quantize", "--int4-rtn", "--block-size", "32"], ["--int4"]),
        "2:4": (["prune", "--tolerance", "2"], ["--sparsity"]),  # half of a tiny random model is nearly all of it
    }
    found, built = [], 0
    for name, (job, demand) in jobs.items():
        path = folder / f"{name.replace(':', '')}.onnx"
        command, *options = job
        if run(command, folder / "fp16.onnx", path, *options).code == 0:
            found.append(name)
            engine = path.with_suffix(".engine")
            built += run("build", path, engine, "--compute-capability", "8.9", "--max-seq-len", "32", *demand).code == 0
    return found + (["engine"] if built == len(jobs) else [])


def row(family: str, columns: list[str]) -> str:
    """The family's line of the table."""
    return f"| `{family}` | " + " | ".join("yes" if column in columns else "-" for column in COLUMNS) + " |"


def _write() -> None:
    transformers.logging.set_verbosity_error()
    lines = [line for line in DOC.read_text().splitlines() if not line.startswith("|")]
    table = ["| family | " + " | ".join(COLUMNS) + " |", "| --- |" + " :-: |" * len(COLUMNS)]
    for family in CASES:
        with tempfile.TemporaryDirectory() as folder:
            table.append(row(family, measure(family, Path(folder))))
        print(table[-1], flush=True)
    place = lines.index("<!-- table -->") + 1
    DOC.write_text("\n".join([*lines[:place], "", *table, *lines[place:]]).replace("\n\n\n", "\n\n") + "\n")


if __name__ == "__main__":
    _write()
