"""Reads GGUF files (llama.cpp). The `gguf` package de-quantizes weights while they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.base.errors import JobError, ModelError
from onnxtools.base.inputs import shown
from onnxtools.checkpoints.checkpoint import Checkpoint, Region, reading
from onnxtools.checkpoints.gguf_header import TensorEntry, read_header
from onnxtools.checkpoints.gguf_tokenizer import tokenizer_files
from onnxtools.storage.rows import RowTensor, Scratch, elements

_RAW = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Divisors of the rotary frequencies: Llama 3.1's, and LongRoPE's for short and long texts."""
_MAX_FACTORS = 1 << 18
_QUANTIZED = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_XXS",
    "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip
"""What the `gguf` package de-quantizes."""


class QuantizedRows(RowTensor):
    """A block-quantized weight as float32. A row is a whole number of blocks; the `gguf` package de-quantizes them."""

    __slots__ = ("_bytes", "_kind")

    def __init__(self, region: Region, name: str, shape: tuple[int, ...], offset: int, kind: Any) -> None:
        super().__init__(shape, ir.DataType.FLOAT, name)
        from gguf.constants import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ModelError(
                f"{region.label}: tensor {shown(name)} is {list(shape)}, its rows no multiple of {kind.name}'s block "
                f"of {block}; fetch the file again"
            )
        rows = math.prod(shape[:-1])
        self._bytes = region.tensor(name, ir.DataType.UINT8, (rows, shape[-1] // block * size), offset)
        self._kind = kind
        self.sources = (self._bytes,)

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        """Returns the rows `start:stop` as float32. The packed bytes may be read into `scratch`."""
        from gguf.quants import dequantize

        from onnxtools.storage.rows import read_rows

        shape = list(self.shape.numpy())
        inner = int(np.prod(shape[1:-1], dtype=np.int64))
        packed = read_rows(self._bytes, start * inner, stop * inner, scratch)
        return np.asarray(dequantize(packed, self._kind), np.float32).reshape(stop - start, *shape[1:])


def read_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file. It reads the metadata and the table of tensors, and of the weights only the rotary factors.

    Raises:
        ModelError: the file is missing or damaged, or a weight type is not supported.
    """
    with reading(path):
        region = Region.of(path)
        metadata, entries = read_header(region)
    kinds = {entry.name: _kind(region, entry) for entry in entries}
    tensors = {entry.name: _tensor(region, entry, kinds[entry.name]) for entry in entries}
    notes = []
    files: dict[str, Path | bytes] = {}
    try:
        files = {name: text.encode() for name, text in tokenizer_files(metadata).items()}
    except JobError as error:
        notes.append(f"warning: no tokenizer was written: {error}")
    packed = sorted({kind.name for kind in kinds.values() if kind.name in _QUANTIZED})
    if packed:
        notes.append(f"{', '.join(packed)} weights are de-quantized")
    factors = {name: _rope_factors(region, tensors[name]) for name in ROPE_FACTORS if name in tensors}
    config = {**metadata, "_tensors": frozenset(tensors), "_rope_factors": factors}
    return Checkpoint(path, f"{_architecture(region, metadata)} (gguf)", config, tensors, files, notes)


def _architecture(region: Region, metadata: Mapping[str, Any]) -> str:
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or len(name) > 64:
        raise ModelError(
            f"{region.label}: general.architecture is {shown(name)}; it must be a name, fetch the file again"
        )
    return name


def _kind(region: Region, entry: TensorEntry) -> Any:
    """Returns the tensor's GGMLQuantizationType, if it can be read."""
    from gguf.constants import GGMLQuantizationType

    kinds = {kind.value: kind for kind in GGMLQuantizationType}
    kind = kinds.get(entry.kind)
    if kind is None or kind.name not in (*_RAW, *_QUANTIZED):
        name = kind.name if kind is not None else f"of the unknown type {entry.kind}"
        raise ModelError(
            f"{region.label}: tensor {shown(entry.name)} is {name}; {', '.join((*_RAW, *_QUANTIZED))} can be read, "
            "convert the file to one of them"
        )
    return kind


def _tensor(region: Region, entry: TensorEntry, kind: Any) -> ir.TensorProtocol:
    if kind.name in _RAW:
        return region.tensor(entry.name, _RAW[kind.name], entry.shape, entry.offset)
    return QuantizedRows(region, entry.name, entry.shape, entry.offset, kind)


def _rope_factors(region: Region, tensor: ir.TensorProtocol) -> tuple[float, ...]:
    """Returns the numbers of one of `ROPE_FACTORS`."""
    if tensor.nbytes > _MAX_FACTORS:
        raise ModelError(
            f"{region.label}: {tensor.name} has {tensor.nbytes} bytes; it holds a number for each pair of channels of "
            "a head, fetch the file again"
        )
    return tuple(elements(tensor).astype(np.float64).reshape(-1).tolist())
