"""TensorRT-RTX builds what `quantize` and `precision` write, for compute capability 8.9."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from onnxtools.base.errors import JobError
from tests.engines.conftest import Build
from tests.support import succeed

SIZES = (
    "--family llama --n-layer 1 --n-embd 128 --n-head 4 --n-kv-head 2 --n-inner 256 --vocab-size 97 --n-positions 64 "
    "--dtype fp32"
)


def made(folder: Path, command: list[str], form: str = "concat") -> Path:
    succeed("export", "--random", *SIZES.split(), "--kv-cache", form, "-o", folder / "m.onnx")
    generator = np.random.default_rng(5)
    (folder / "c.jsonl").write_text(
        "".join(json.dumps({"text": generator.integers(0, 97, 12).tolist()}) + "\n" for _ in range(4))
    )
    calib = ["--calib", folder / "c.jsonl"] if command[0] == "quantize" else []
    succeed(command[0], folder / "m.onnx", folder / "q.onnx", *command[1:], *calib)
    return folder / "q.onnx"


@pytest.mark.parametrize("form", ["concat", "scatter"])
@pytest.mark.parametrize("command", [
    "quantize --fp8", "quantize --fp8 --per-channel --gptq", "quantize --smoothquant 0.5",
    "quantize --int8 --per-token --per-channel --all-layers",
    "quantize --fp8 --attention", "quantize --int4-awq --block-size 128", "precision --to fp16", "precision --to bf16",
])  # fmt: skip
def test_quantized_graphs_build(command: str, form: str, tmp_path: Path, make: Build) -> None:
    assert make(made(tmp_path, command.split(), form)).path.stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_quantized_cache_builds_where_it_grows(kind: str, tmp_path: Path, make: Build) -> None:
    make(made(tmp_path, ["quantize", "--kv-cache", kind]))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_quantized_static_cache_is_refused_by_name(kind: str, tmp_path: Path, make: Build) -> None:
    """TensorRT's KV cache update takes fp32, fp16 and bf16."""
    with pytest.raises(JobError, match="TensorScatter"):
        make(made(tmp_path, ["quantize", "--kv-cache", kind], "scatter"))
