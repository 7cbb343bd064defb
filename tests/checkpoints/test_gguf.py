"""GGUF files written by the `gguf` package: every weight type, read in rows, equals the package's own de-quantization of the whole."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from onnxtools.checkpoints.gguf import read_gguf
from onnxtools.tensors import read_rows
from tests.support import refuse

WHOLE = np.random.default_rng(1).standard_normal((40, 64)).astype(np.float32)


def write(path: Path, kind: gguf.GGMLQuantizationType, architecture: str = "llama", **metadata: str) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        writer.add_string(key.replace("_", "."), value)
    writer.add_tensor("w", quantize(WHOLE, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_weight_types(name: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[name]
    write(tmp_path / "m.gguf", kind)
    tensor = read_gguf(tmp_path / "m.gguf").tensors["w"]
    found = np.concatenate([read_rows(tensor, start, min(start + 7, 40)) for start in range(0, 40, 7)])
    np.testing.assert_array_equal(found.astype(np.float32), dequantize(quantize(WHOLE, kind), kind).reshape(WHOLE.shape))


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32, "mamba")
    assert "'mamba (gguf)' is not supported" in refuse("export", tmp_path / "m.gguf", "-o", tmp_path / "m.onnx")
    write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    assert "no llama.embedding_length" in refuse("export", tmp_path / "m.gguf", "-o", tmp_path / "m.onnx")
