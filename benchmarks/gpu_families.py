"""Each family on a GPU, and mixtures of experts as NonZero or as com.microsoft.MoE.

On a machine without a GPU, `--make FOLDER` writes tiny random models of every family in fp16 (forms concat and gqa) and
the fp32 logits of transformers. On a machine with one, `--run FOLDER` decodes them in ONNX Runtime's CUDA provider and
prints the relative L2 of the logits, then times a Mixtral of two layers in both forms.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = (10, 1, 1, 1, 1, 1, 1, 1, 1)
LIMIT = 3e-2


def make(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.exporter import hf
    from tests.exporter.family_table import CASES
    from tests.support import run

    ids = np.random.default_rng(3).integers(3, 97, (2, sum(SPLITS)))
    expected = {}
    for family, case in CASES.items():
        with tempfile.TemporaryDirectory() as source:
            expected[family] = hf.logits(hf.make(case, Path(source, "hf")), ids, np.ones_like(ids))
            for form in ("concat", "gqa"):
                place = folder / family / form
                place.mkdir(parents=True)
                command = ("export", Path(source, "hf"), "-o", place / "m.onnx", "--dtype", "fp16", "--kv-cache", form)
                if run(*command).code:
                    shutil.rmtree(place)
                elif family in ("mixtral", "qwen2_moe", "qwen3_moe") and form == "gqa":
                    (folder / family / "gqa, MoE").mkdir()
                    assert not run(
                        "lower-ort", place / "m.onnx", folder / family / "gqa, MoE/m.onnx", "--copy-weights"
                    ).code
    np.savez(folder / "expected.npz", ids=ids, **expected)


def decode(path: Path, form: str, ids: Any) -> Any:
    """Logits of all tokens in fp32, in steps of SPLITS; written without the product's code."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    names = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    past = {
        name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float16)
        for name, value in names.items() if name.startswith("past")
    }  # fmt: skip
    done, steps = 0, []
    for length in SPLITS:
        mask = np.ones((len(ids), done + length), np.int64)
        feeds = {
            "input_ids": ids[:, done : done + length], "attention_mask": mask,
            "position_ids": (mask.cumsum(axis=1) - 1)[:, done:], **past,
        }  # fmt: skip
        found = dict(zip(outputs, session.run(None, {name: feeds[name] for name in names}), strict=True))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        steps.append(found["logits"])
        done += length
    return np.concatenate(steps, axis=1)


def families(folder: Path) -> list[str]:
    data = np.load(folder / "expected.npz")
    rows = []
    for family in sorted(name for name in data.files if name != "ids"):
        cells = []
        for form in ("concat", "gqa", "gqa, MoE"):
            path = folder / family / form / "m.onnx"
            if not path.is_file():
                cells.append("-")
                continue
            try:
                found = decode(path, form, data["ids"])
                error = np.linalg.norm(found - data[family]) / np.linalg.norm(data[family])
                cells.append(f"{error:.1e}{'' if error <= LIMIT else ' (missed)'}")
            except Exception as error:  # what the provider refuses is a finding
                cells.append("refused: " + " ".join(str(error).split())[:120])
        rows.append(f"| `{family}` | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    return rows


def tool(*arguments: object) -> str:
    code = "import torch, onnxruntime; onnxruntime.preload_dlls(); from onnxtools.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-600:])
    return done.stdout


def experts(folder: Path) -> list[str]:
    """Mixtral-8x7B's layer, twice, fp16: seconds of a prompt of 128 and milliseconds a step, by turns."""
    plain, lowered = folder / "plain/m.onnx", folder / "lowered/m.onnx"
    plain.parent.mkdir(), lowered.parent.mkdir()
    sizes = ("--n-layer", 2, "--dtype", "fp16", "--kv-cache", "gqa", "--logits", "last")
    tool("export", "--random", "--family", "mixtral", *sizes, "-o", plain)
    tool("lower-ort", plain, lowered, "--no-check")
    rows = []
    for batch in (1, 16):
        found: dict[str, list[tuple[float, float]]] = {"NonZero": [], "MoE": []}
        for name, path in (("NonZero", plain), ("MoE", lowered), ("MoE", lowered), ("NonZero", plain)):
            said = tool(
                "benchmark", path, "--batch-size", batch, "--input-seq-len", 128, "--output-seq-len", 20, "--warmup", 2,
                "--iterations", 8, "--device", "cuda", "--json",
            )  # fmt: skip
            b = next(iter(json.loads(said)["runtimes"].values()))
            found[name].append((b["time_to_first_token_s"] * 1e3, b["time_per_output_token_s"] * 1e3))
        best = {name: tuple(map(min, zip(*times, strict=True))) for name, times in found.items()}
        for name, (first, step) in best.items():
            ratio = f"{best['NonZero'][0] / first:.2f}, {best['NonZero'][1] / step:.2f}"
            rows.append(f"| {batch} | {name} | {first:.2f} | {step:.2f} | {ratio} |")
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--make", type=Path, help="write the models into this folder")
    made.add_argument("--run", type=Path, help="run the models of this folder on the GPU")
    options = made.parse_args()
    if options.make:
        make(options.make)
    if options.run:
        import torch

        print(torch.cuda.get_device_name(0))
        import onnxruntime

        onnxruntime.preload_dlls()
        families(options.run)
        with tempfile.TemporaryDirectory() as folder:
            experts(Path(folder))


if __name__ == "__main__":
    main()
