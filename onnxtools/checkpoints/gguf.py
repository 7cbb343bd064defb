"""GGUF files (llama.cpp) through the `gguf` package; quantized weights become float rows while they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.checkpoints.base import Checkpoint, Region, reading
from onnxtools.checkpoints.gguf_tokenizer import tokenizer_files
from onnxtools.errors import JobError, ModelError
from onnxtools.tensors import RowTensor, Scratch

_RAW = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


class QuantizedRows(RowTensor):
    """A block-quantized weight as fp32: every row is a whole number of blocks, de-quantized by the `gguf` package."""

    __slots__ = ("_bytes", "_kind")

    def __init__(self, region: Region, name: str, shape: tuple[int, ...], offset: int, kind: Any) -> None:
        super().__init__(shape, ir.DataType.FLOAT, name)
        from gguf.constants import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ModelError(f"{region.label}: tensor {name!r} has rows of {shape[-1]}, no multiple of {kind.name}'s block of {block}; fetch the file again")
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        self._bytes = region.tensor(name, ir.DataType.UINT8, (rows, shape[-1] // block * size), offset)
        self._kind = kind
        self.sources = (self._bytes,)

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        from gguf.quants import dequantize

        from onnxtools.tensors import read_rows

        shape = list(self.shape.numpy())
        inner = int(np.prod(shape[1:-1], dtype=np.int64))
        packed = read_rows(self._bytes, start * inner, stop * inner, scratch)
        return np.asarray(dequantize(packed, self._kind), np.float32).reshape(stop - start, *shape[1:])


def read_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file; metadata and the table of tensors are read, no weight.

    Raises:
        ModelError: damaged, or a weight type that is not supported.
    """
    from gguf import GGUFReader

    with reading(path):
        region = Region.of(path)
        try:
            reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, TypeError, UnicodeDecodeError, MemoryError) as error:
            raise ModelError(f"{path}: not a GGUF file, or a truncated one ({' '.join(str(error).split())[:120]}); fetch it again") from None
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {tensor.name: _tensor(region, tensor) for tensor in reader.tensors}
    notes = []
    files: dict[str, Path | bytes] = {}
    try:
        files = {name: text.encode() for name, text in tokenizer_files(metadata).items()}
    except JobError as error:
        notes.append(f"warning: no tokenizer was written: {error}")
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors if tensor.tensor_type.name in _QUANTIZED})
    if kinds:
        notes.append(f"{', '.join(kinds)} weights are de-quantized")
    return Checkpoint(path, f"{metadata.get('general.architecture')} (gguf)", {**metadata, "_tensors": frozenset(tensors)}, tensors, files, notes)


def _tensor(region: Region, tensor: Any) -> ir.TensorProtocol:
    shape, kind = tuple(int(extent) for extent in reversed(tensor.shape)), tensor.tensor_type
    if kind.name in _RAW:
        return region.tensor(tensor.name, _RAW[kind.name], shape, int(tensor.data_offset))
    if kind.name in _QUANTIZED:
        return QuantizedRows(region, tensor.name, shape, int(tensor.data_offset), kind)
    raise ModelError(f"{region.label}: tensor {tensor.name!r} is {kind.name}; {', '.join((*_RAW, *_QUANTIZED))} can be read, convert the file to one of them")
