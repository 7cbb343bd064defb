"""GGUF files written by the `gguf` package: every weight type, read in rows, equals the package's own de-quantization
of the whole.
"""

from __future__ import annotations

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from onnxtools.base.errors import JobError, ModelError
from onnxtools.checkpoints.checkpoint import Region
from onnxtools.checkpoints.gguf import read_gguf
from onnxtools.checkpoints.gguf_header import read_header
from onnxtools.checkpoints.gguf_tokenizer import tokenizer_files
from onnxtools.storage.rows import read_rows
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
    np.testing.assert_array_equal(
        found.astype(np.float32), dequantize(quantize(WHOLE, kind), kind).reshape(WHOLE.shape)
    )


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32, "mamba")
    assert "'mamba (gguf)' is not supported" in refuse("export", tmp_path / "m.gguf", "-o", tmp_path / "m.onnx")
    write(tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    assert "no llama.embedding_length" in refuse("export", tmp_path / "m.gguf", "-o", tmp_path / "m.onnx")


# --- the header
# -------------------------------------------------------------------------------------------------------------


def every_kind(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for add, name, value in (
        ("uint8", "a", 200), ("int8", "b", -100), ("uint16", "c", 60_000), ("int16", "d", -30_000),
        ("uint32", "e", 2**32 - 1), ("int32", "f", -(2**31)),
        ("float32", "g", 0.1), ("uint64", "h", 2**64 - 1), ("int64", "i", -(2**63)), ("float64", "j", 0.1),
        ("bool", "k", True), ("string", "l", "é▁"),
        ("array", "m", ["x", "", "é"]), ("array", "n", [1, -2]), ("array", "o", [0.5, 0.1]),
        ("array", "p", [True, False]), ("array", "q", b"\x00\xff"),
    ):  # fmt: skip
        getattr(writer, f"add_{add}")(name, value)
    writer.add_custom_alignment(4096)
    writer.add_tensor("w", WHOLE)
    writer.add_tensor("v", WHOLE[:3].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    every_kind(tmp_path / "m.gguf")
    metadata, tensors = read_header(Region.of(tmp_path / "m.gguf"))
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    assert metadata == {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert [(t.name, t.shape[::-1], t.kind, t.offset) for t in tensors] == [
        (t.name, tuple(map(int, t.shape)), int(t.tensor_type), int(t.data_offset)) for t in theirs.tensors
    ]


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IIQ", 9, kind, count) + content


def header(*values: bytes, tensors: int = 0, keys: int | None = None, version: int = 3) -> bytes:
    named = b"".join(string(f"k{number}") + value for number, value in enumerate(values))
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(values) if keys is None else keys) + named


HOSTILE = {
    "an endless array": header(array(0, 2**63)), "a longer array than the file": header(array(0, 1000, b"\0" * 999)),
    "texts without end": header(array(8, 2**40)),
    "arrays of arrays": header(array(9, 1, array(0, 1, b"\0")[4:])),
    "millions of elements": header(array(0, 1 << 23, b"\0" * (1 << 23))),
    "keys without end": header(keys=2**40), "tensors without end": header(tensors=2**62),
    "a long text": header(struct.pack("<IQ", 8, 2**63)),
    "an unknown type": header(struct.pack("<II", 99, 0)), "an array of unknown type": header(array(13, 0)),
    "another version": header(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "a key twice": b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + (string("k") + struct.pack("<IB", 0, 1)) * 2,
    "no UTF-8": header(struct.pack("<IQ", 8, 1) + b"\xff"),
    "ranks": header(tensors=1) + string("w") + struct.pack("<I", 2**31) + bytes(40),
    "one tensor twice": header(tensors=2) + (string("w") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 2 + bytes(40),
    "nothing": b"", "another format": b"PK\x03\x04" * 9,
    "an alignment of nothing": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("general.alignment") + struct.pack("<II",
        4, 0),
    "an architecture that is no name": b"GGUF" + struct.pack("<IQQ", 3, 0,
        1) + string("general.architecture") + struct.pack("<II", 4, 7),
}  # fmt: skip


SAID = {
    "an endless array": "its arrays claim 9223372036854775808 elements",
    "a longer array than the file": "it needs 1000 bytes where 999 are left",
    "texts without end": "its arrays claim", "arrays of arrays": "an array holds arrays",
    "millions of elements": "its arrays claim 8388608 elements",
    "keys without end": "it claims 1099511627776 keys", "tensors without end": "it claims 4611686018427387904 tensors",
    "ranks": "has 2147483648 axes",
    "a long text": "it needs 9223372036854775808 bytes",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_does_not_fit_its_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(HOSTILE[name])
    start = time.monotonic()
    with pytest.raises(ModelError, match=rf"m\.gguf: .*{SAID.get(name, '')}") as error:
        read_gguf(tmp_path / "m.gguf")
    assert time.monotonic() - start < 5 and len(str(error.value)) < 300
    assert "is damaged, or not what its name says" not in str(error.value)


def test_a_token_of_half_a_million_characters_is_no_piece() -> None:
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "b" * 500_000, "b"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0], "tokenizer.ggml.token_type": [2, 3, 3, 1, 1],
    }  # fmt: skip
    start = time.monotonic()
    with pytest.raises(JobError, match="a piece of 500000 characters"):
        tokenizer_files(metadata)
    assert time.monotonic() - start < 5
