"""Reads the header of a GGUF file: metadata and the table of tensors (format: ggml's docs/gguf.md, versions 2 and 3).

The `gguf` package's reader trusts the sizes that a file claims. This reader compares every size with the file before it
allocates memory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.checkpoints.checkpoint import Region

MAX_KEYS, MAX_TENSORS, MAX_RANK = 1 << 16, 1 << 17, 8
MAX_ELEMENTS = 1 << 22
"""Most elements of all arrays together.

A vocabulary of 262,144 tokens with its types, scores and merges has about 1.3 million.
"""

# gguf-py's GGUFValueType: struct codes of the scalar types, then STRING and ARRAY.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorEntry:
    """One row of the table of tensors.

    Attributes:
        name: the tensor's name.
        shape: sizes of the axes, the slowest first.
        kind: number of the GGMLQuantizationType.
        offset: bytes from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def read_header(region: Region) -> tuple[dict[str, Any], list[TensorEntry]]:
    """Returns the metadata by key, as numbers, booleans, texts and flat lists of them, and the tensors in file order.

    Raises:
        ModelError: the file is no GGUF file, has another version or byte order, or claims an impossible size.
    """
    with open(region.path, "rb") as file:
        reader = _Reader(file, region)
        if reader.take(4) != b"GGUF":
            raise ModelError(f"{region.label}: not a GGUF file; fetch it again")
        version = reader.number("<I")
        if version not in (2, 3):
            raise ModelError(
                f"{region.label}: is GGUF version {version}, or big-endian; 2 and 3, little-endian, can be read"
            )
        tensors, keys = reader.count("tensors", MAX_TENSORS, 24), reader.count("keys", MAX_KEYS, 13)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = reader.text()
            if name in metadata:
                raise reader.damaged(f"the key {shown(name)} stands there twice")
            metadata[name] = reader.value(reader.number("<I"))
        entries = [reader.entry() for _ in range(tensors)]
        if len({entry.name for entry in entries}) < len(entries):
            raise reader.damaged("two tensors have the same name")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise reader.damaged(f"general.alignment is {shown(alignment)}")
        data = -(-file.tell() // alignment) * alignment
    return metadata, [TensorEntry(e.name, e.shape, e.kind, data + e.offset) for e in entries]


class _Reader:
    """Reads values one after the other, and none beyond the end of the region."""

    def __init__(self, file: BinaryIO, region: Region) -> None:
        self._file, self._label, self._remaining = file, region.label, region.size
        self._elements = 0

    def damaged(self, what: str) -> ModelError:
        """Returns the error for a damaged file; `what` says what is wrong."""
        return ModelError(f"{self._label}: not a GGUF file, or a damaged one: {what}; fetch it again")

    def take(self, size: int) -> bytes:
        """Reads `size` bytes. Raises ModelError if the file has fewer."""
        if size > self._remaining:
            raise ModelError(
                f"{self._label}: not a GGUF file, or a truncated one: it needs {size} bytes where {self._remaining} "
                "are left; fetch it again"
            )
        self._remaining -= size
        return self._file.read(size)

    def number(self, code: str) -> Any:
        """Reads one number of the `struct` format `code`."""
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, what: str, most: int, smallest: int) -> int:
        """Reads the number of `what`: at most `most`, each of at least `smallest` bytes."""
        total: int = self.number("<Q")
        if total > min(most, self._remaining // smallest):
            raise self.damaged(f"it claims {total} {what}")
        return total

    def text(self) -> str:
        """Reads a UTF-8 text with its length."""
        try:
            return self.take(self.number("<Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged("a text is no UTF-8") from None

    def value(self, kind: int) -> Any:
        """Reads a metadata value of GGUF type `kind`."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._list(self.number("<I"), self.number("<Q"))
        if kind not in _SCALARS:
            raise self.damaged(f"a value has the type {kind}, which is not known")
        return self.number(_SCALARS[kind])

    def _list(self, kind: int, count: int) -> list[Any]:
        self._elements += count
        if self._elements > MAX_ELEMENTS:
            raise self.damaged(f"its arrays claim {self._elements} elements")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.damaged(
                "an array holds arrays, which no tokenizer has"
                if kind == _ARRAY
                else f"an array has the type {kind}, which is not known"
            )
        code = np.dtype(_SCALARS[kind])
        return list(np.frombuffer(self.take(count * code.itemsize), code).tolist())

    def entry(self) -> TensorEntry:
        """Reads one row of the table. Its offset counts from the beginning of the data."""
        name, rank = self.text(), self.number("<I")
        if rank > MAX_RANK:
            raise self.damaged(f"tensor {shown(name)} has {rank} axes")
        shape = tuple(self.number("<Q") for _ in range(rank))
        return TensorEntry(name, shape[::-1], self.number("<I"), self.number("<Q"))
