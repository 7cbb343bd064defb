"""Reads safetensors files: 8 bytes of header length, a JSON header, raw tensors (format: the safetensors README)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.checkpoints.checkpoint import MAX_JSON_BYTES, Region, json_object, member, read_json, reading

_DTYPES = {
    "F64": ir.DataType.DOUBLE, "F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN, "F8_E5M2": ir.DataType.FLOAT8E5M2, "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I16": ir.DataType.INT16, "I8": ir.DataType.INT8, "U8": ir.DataType.UINT8, "BOOL": ir.DataType.BOOL,
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, ir.TensorProtocol]:
    """Returns the tensors of one file by name, as references into the file. Only the header is read.

    Raises:
        ModelError: the file is missing or truncated, or its header does not fit it.
    """
    with reading(path):
        region = Region.of(path)
        if region.size < 8:
            raise ModelError(f"{path}: {region.size} bytes are no safetensors file; fetch it again")
        (length,) = struct.unpack("<Q", region.read(0, 8))
        if length > min(MAX_JSON_BYTES, region.size - 8):
            raise ModelError(
                f"{path}: its header claims {length} bytes and the file has {region.size}; it is truncated or no "
                "safetensors file, fetch it again"
            )
        header = json_object(region.read(8, length), f"{path}: header")
    header.pop("__metadata__", None)
    data = Region(region.path, 8 + length, region.size - 8 - length, str(path))
    tensors = {name: _tensor(data, name, entry) for name, entry in header.items()}
    # The format has no holes and no overlaps, so that every byte belongs to one tensor.
    offset = data.start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset or 0, t.nbytes)):
        if tensor.offset != offset:
            raise ModelError(
                f"{path}: tensor {tensor.name!r} begins at byte {(tensor.offset or 0) - data.start}, not at "
                f"{offset - data.start} where the one before ends"
            )
        offset += tensor.nbytes
    if offset != data.start + data.size:
        raise ModelError(
            f"{path}: {data.start + data.size - offset} bytes after the last tensor belong to nothing; fetch it again"
        )
    return dict(tensors)


def _tensor(data: Region, name: str, entry: object) -> ir.ExternalTensor:
    try:
        assert isinstance(entry, dict)
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        assert isinstance(dtype, str) and all(type(number) is int for number in (*shape, begin, end))
    except (AssertionError, KeyError, TypeError, ValueError):
        raise ModelError(
            f"{data.label}: tensor {name!r} has an ill-formed header entry; fetch the file again"
        ) from None
    if dtype not in _DTYPES:
        raise ModelError(f"{data.label}: tensor {name!r} has the type {dtype}; {', '.join(_DTYPES)} can be read")
    tensor = data.tensor(name, _DTYPES[dtype], shape, begin)
    if end - begin != tensor.nbytes:
        raise ModelError(
            f"{data.label}: tensor {name!r} of shape {list(shape)} needs {tensor.nbytes} bytes but its header gives "
            f"{end - begin}; fetch it again"
        )
    return tensor


def read_sharded(
    folder: Path, index_name: str, read: Callable[[Path], dict[str, ir.TensorProtocol]]
) -> dict[str, ir.TensorProtocol]:
    """Returns the tensors of all files of `folder` that the index of shards names. Index and files must agree.

    Args:
        folder: the folder of the index and the shards.
        index_name: file name of the index.
        read: reads one shard.

    Raises:
        ModelError: a file is missing or outside the folder, or a tensor is not in the file that the index names.
    """
    index = folder / index_name
    places = _weight_map(member(folder, index_name), index)
    merged: dict[str, ir.TensorProtocol] = {}
    for file in sorted(set(places.values())):
        tensors = read(member(folder, file))
        absent = sorted(name for name, place in places.items() if place == file and name not in tensors)
        if absent:
            raise ModelError(
                f"{folder / file}: has no tensor {absent[0]!r}, which {index_name} places there ({len(absent)} in "
                "all); fetch both again"
            )
        merged.update({name: tensor for name, tensor in tensors.items() if places.get(name, file) == file})
    return merged


def _weight_map(path: Path, index: Path) -> dict[str, str]:
    """Returns the file name of each tensor from the index of shards at `path`.

    Files must be in the folder of the index. `index` is the path of the index in errors.
    """
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{index}: has no weight_map; fetch it again")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ModelError(f"{index}: places {shown(name)} in {shown(file)}; shards must lie beside the index")
    return places
