"""Reads files of torch.save (zip format) without torch. A restricted unpickler reads the pickle.

Tensors stay in the file.

The rules are those of `torch.load(weights_only=True)`, and narrower: a global that is not on the list below is refused
by name, so no code of the file can run. The list: https://docs.pytorch.org/docs/stable/notes/serialization.html
Unpickled objects take no state, since a state may set any attribute. Keys are plain, since hash() of nested tuples
takes exponential time or the whole stack.
"""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxtools.base.dtypes import of
from onnxtools.base.errors import ModelError, one_line
from onnxtools.base.inputs import shown
from onnxtools.checkpoints.checkpoint import Region

MAX_PICKLE_BYTES = 256 << 20
"""The pickle has names and shapes, no weights: the state dict of a 175B model has about 1 MB."""
MAX_OPCODES = 4_000_000
"""A tensor takes about 30 opcodes: the state dict of a mixture of experts with 50,000 weights has 1.5 million."""
_MAX_RANK = 64
_LOCAL_HEADER = 30  # bytes before the name in a zip entry (APPNOTE.TXT, 4.3.7)

_DTYPES = {
    "DoubleStorage": ir.DataType.DOUBLE, "FloatStorage": ir.DataType.FLOAT, "HalfStorage": ir.DataType.FLOAT16,
    "BFloat16Storage": ir.DataType.BFLOAT16, "LongStorage": ir.DataType.INT64, "IntStorage": ir.DataType.INT32,
    "ShortStorage": ir.DataType.INT16, "CharStorage": ir.DataType.INT8, "ByteStorage": ir.DataType.UINT8,
    "BoolStorage": ir.DataType.BOOL,
    "UntypedStorage": ir.DataType.UINT8,
}  # fmt: skip
_SCALARS = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn",
    "float8_e5m2",
)  # fmt: skip
"""Element types of torch that are read; numpy and ml_dtypes have the same names."""


@dataclass(frozen=True)
class _StorageType:
    dtype: ir.DataType


@dataclass(frozen=True)
class _Storage:
    """One storage of torch.

    Attributes:
        dtype: element type.
        region: where the bytes are in the file; None if they are in `data`.
        data: the bytes themselves.
    """

    dtype: ir.DataType
    region: Region | None
    data: bytes = b""

    def tensor(self, offset: int, shape: tuple[int, ...]) -> ir.TensorProtocol:
        """Returns the contiguous tensor of `shape` that starts at element `offset`."""
        if self.region is not None:
            return self.region.tensor("", self.dtype, shape, offset * int(self.dtype.itemsize))
        array = np.frombuffer(
            self.data, self.dtype.numpy(), int(np.prod(shape, dtype=np.int64)), offset * int(self.dtype.itemsize)
        )
        return ir.Tensor(array.reshape(shape), dtype=self.dtype)


def read_torch(region: Region) -> Any:
    """Returns the object in a file of torch.save. Its tensors are references into the file.

    Args:
        region: the file, or the part of a file.

    Raises:
        ModelError: the file has another format or is damaged, or its pickle needs more than data.
        OSError: the file cannot be read.
    """
    with open(region.path, "rb") as file:
        window = _Window(file, region.start, region.size)
        try:
            archive = zipfile.ZipFile(window)
        except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError):
            raise ModelError(
                f"{region.label}: not a zip archive of torch.save, or truncated; fetch it again (files of torch < 1.6 "
                "must be loaded and saved again)"
            ) from None
        entries = {info.filename: info for info in archive.infolist()}
        name = next((n for n in entries if n.endswith("/data.pkl") or n == "data.pkl"), None)
        if name is None:
            raise ModelError(
                f"{region.label}: a zip archive without data.pkl is no file of torch.save; name the checkpoint itself"
            )
        prefix, info = name.removesuffix("data.pkl"), entries[name]
        if info.file_size > MAX_PICKLE_BYTES or info.compress_type != zipfile.ZIP_STORED:
            raise ModelError(
                f"{region.label}: its data.pkl claims {info.file_size} bytes, which no state dict has; do not trust "
                "this file"
            )
        try:
            order = entries.get(f"{prefix}byteorder")
            if order is not None and _stored(region, order).size < 16 and archive.read(order) == b"big":
                raise ModelError(f"{region.label}: holds big-endian tensors; save it on a little-endian machine")
            payload = archive.read(name)
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            RuntimeError,
            EOFError,
            UnicodeDecodeError,
        ) as error:  # a wrong header or checksum, or an encrypted entry
            raise ModelError(f"{region.label}: its data.pkl is damaged ({error}); fetch it again") from None

    def storage(persistent: Any) -> _Storage:
        kind, key = _storage_id(persistent, region.label)
        entry = entries.get(f"{prefix}data/{key}")
        if entry is None:
            raise ModelError(f"{region.label}: the storage {key!r} is missing from the archive; fetch it again")
        return _Storage(kind, _stored(region, entry))

    return _unpickle(payload, storage, region.label)


def _storage_id(persistent: Any, label: str) -> tuple[ir.DataType, str]:
    """Returns type and key of a persistent id ('storage', type, key, location, elements) of torch.serialization."""
    if (
        isinstance(persistent, tuple)
        and len(persistent) == 5
        and persistent[0] == "storage"
        and isinstance(persistent[1], _StorageType)
    ):
        return persistent[1].dtype, str(persistent[2])
    raise ModelError(f"{label}: refers to something that is no storage; fetch it again")


def _stored(region: Region, info: zipfile.ZipInfo) -> Region:
    """Returns the region of an entry's bytes. torch never compresses them."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ModelError(
            f"{region.label}: {info.filename!r} is compressed, which torch.save never does; save it again with "
            "torch.save"
        )
    name, extra = struct.unpack("<HH", region.read(info.header_offset + 26, 4))
    start = info.header_offset + _LOCAL_HEADER + name + extra
    if start + info.file_size > region.size:
        raise ModelError(
            f"{region.label}: {info.filename!r} claims {info.file_size} bytes, more than the file has; it is "
            "truncated, fetch it again"
        )
    return Region(region.path, region.start + start, info.file_size, region.label)


def _unpickle(payload: bytes, storage: Callable[[Any], _Storage], label: str) -> Any:
    try:
        return _load(io.BytesIO(payload), storage, label)
    except ModelError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ModelError(
            f"{label}: its pickle is damaged ({type(error).__name__}: {one_line(error, 100)}); fetch it again"
        ) from None


def _load(stream: io.BytesIO, storage: Callable[[Any], _Storage], label: str, *, nested: bool = False) -> Any:
    """Loads the next pickle of `stream`, after all its opcodes have been checked."""
    start = stream.tell()
    for count, (opcode, _, _) in enumerate(pickletools.genops(stream)):
        if opcode.name in _REFUSED:
            raise ModelError(
                f"{label}: its pickle has the opcode {opcode.name}, which no state dict needs; refused: save the state "
                "dict alone"
            )
        if count >= MAX_OPCODES:
            raise ModelError(
                f"{label}: its pickle has more than {MAX_OPCODES} opcodes, which no state dict has; do not trust this "
                "file"
            )
    stream.seek(start)
    return _Unpickler(stream, storage, label, nested).load()


_REFUSED = {
    "INST",
    "OBJ",
    "NEWOBJ_EX",
    "EXT1",
    "EXT2",
    "EXT4",
    "BYTEARRAY8",
    "NEXT_BUFFER",
    "READONLY_BUFFER",
    "FROZENSET",
    "ADDITEMS",
}
"""Refused opcodes: they create objects without a global, allocate the size that they claim, or hash any object."""


def _plain_key(key: Any, label: str) -> Any:
    """Returns `key` if it is a text, bytes, a number, None, or a short tuple of these; else raises ModelError."""
    parts = key if isinstance(key, tuple) and len(key) <= 8 else (key,)
    if not all(part is None or isinstance(part, (str, bytes, int, float)) for part in parts):
        raise ModelError(
            f"{label}: its pickle has a {type(key).__name__} as a key, which no state dict has; do not trust this file"
        )
    return key


class _Unpickler(pickle._Unpickler):
    """Creates tensors and plain containers, and refuses every other global by name.

    It extends the Python implementation of pickle, since the C implementation cannot override an opcode. Its memo is a
    dictionary, so a large index allocates nothing.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: io.BytesIO, storage: Callable[[Any], _Storage], label: str, nested: bool) -> None:
        super().__init__(file, encoding="utf-8")
        self._storage, self._label, self._nested = storage, label, nested

    def _build(self) -> None:
        """BUILD: write the bytes of a BytesIO, and drop the state of other objects.

        These are state dicts (their `_metadata`) and `_Opaque`.
        """
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, io.BytesIO) and isinstance(state, tuple) and state and isinstance(state[0], bytes):
            instance.write(state[0])
        elif type(instance) not in (OrderedDict, _Opaque):
            raise ModelError(
                f"{self._label}: its pickle sets attributes of a {type(instance).__name__}, which no state dict does; "
                "do not trust this file"
            )

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._target()[_plain_key(key, self._label)] = value

    def _set_items(self) -> None:
        items = self.pop_mark()
        target = self._target()
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_plain_key(key, self._label)] = value

    def _target(self) -> dict[Any, Any]:
        if not isinstance(target := self.stack[-1], dict):
            raise ModelError(
                f"{self._label}: its pickle puts items into a {type(target).__name__}; it is damaged, fetch it again"
            )
        return target

    def _dictionary(self) -> None:
        items = self.pop_mark()
        self.stack.append(
            {_plain_key(key, self._label): value for key, value in zip(items[::2], items[1::2], strict=True)}
        )

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch, pickle.BUILD[0]: _build, pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dictionary,
        # `find_class` returns functions, so NEWOBJ calls the function, as REDUCE does.
        pickle.NEWOBJ[0]: pickle._Unpickler.dispatch[pickle.REDUCE[0]],
    }  # fmt: skip

    def persistent_load(self, pid: Any) -> _Storage:
        """Returns the storage of a persistent id."""
        return self._storage(pid)

    def find_class(self, module: str, name: str) -> Any:
        """Returns the replacement of a global.

        Raises:
            ModelError: the global is not on the list.
        """
        if module.startswith("transformer_engine."):  # the recipe beside FP8 scales; its class is never imported
            return _Opaque
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if module == "torch" and name in _SCALARS:
            return of(name)
        allowed = _GLOBALS.get((module, name))
        if allowed is None or (self._nested and allowed is _load_from_bytes):
            requested = " ".join(f"{module}.{name}".split())[:120]
            raise ModelError(
                f"{self._label}: its pickle wants {requested}, which is not data and may run code; refused: "
                "load it where you trust it and save the state dict alone"
            )
        return allowed


class _Opaque:
    """A placeholder for an object of a class that is not imported."""

    def __init__(self, *_: Any) -> None: ...


def _rebuild_tensor(
    storage: _Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    grad: Any = None,
    hooks: Any = None,
    metadata: Any = None,
) -> ir.TensorProtocol:
    for name, numbers in (("shape", size), ("strides", stride), ("offset", (offset,))):
        if (
            not isinstance(numbers, tuple)
            or len(numbers) > _MAX_RANK
            or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
        ):
            raise ModelError(f"a tensor has the {name} {shown(numbers)}; the file is damaged, fetch it again")
    if metadata:  # a lazy negation or conjugation, say
        raise ModelError(
            f"a tensor of shape {list(size)} is stored with {shown(metadata)}; save it with .resolve_neg() or .clone()"
        )
    expected = 1
    for extent, step in zip(reversed(size), reversed(stride), strict=True):
        if extent > 1 and step != expected:
            raise ModelError(
                f"a tensor of shape {list(size)} is stored with strides {list(stride)}; save it with .contiguous()"
            )
        expected *= max(extent, 1)
    return storage.tensor(offset, tuple(size))


def _rebuild_parameter(tensor: ir.TensorProtocol, *_: Any) -> ir.TensorProtocol:
    return tensor


def _load_from_bytes(data: bytes) -> _Storage:
    """Returns the storage inside a plain pickle of a tensor.

    This is torch's older format: five pickles, then the count of elements and the bytes.
    """
    stream = io.BytesIO(data)
    kinds: dict[str, ir.DataType] = {}

    def storage(persistent: Any) -> _Storage:
        kind, key = _storage_id((persistent if len(persistent) == 5 else persistent[:5]), "a nested tensor")
        kinds[key] = kind
        return _Storage(kind, None)

    for _ in range(4):  # magic number, protocol version, system information, the tensor
        _load(stream, storage, "a nested tensor", nested=True)
    keys = _load(stream, storage, "a nested tensor", nested=True)
    count = int(np.frombuffer(stream.read(8), np.int64)[0])
    kind = kinds[str(keys[0])]
    return _Storage(kind, None, stream.read(count * int(kind.itemsize)))


def _ordered(*arguments: Any) -> OrderedDict[Any, Any]:
    """OrderedDict in the form of Python 2: a list of pairs, or no argument."""
    return OrderedDict((_plain_key(key, "a state dict"), value) for key, value in (arguments[0] if arguments else ()))


def _nothing(*_: Any) -> None:
    """A placeholder for torch.device."""


def _latin1(text: str, _: str = "") -> bytes:
    """Returns bytes in the form of pickle protocol 2."""
    return text.encode("latin1")


def _size(numbers: Any = ()) -> tuple[Any, ...]:
    return tuple(numbers)


def _bytes_io(data: bytes = b"") -> io.BytesIO:
    return io.BytesIO(data)


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
    ("torch", "Size"): _size,
    ("torch", "device"): _nothing,
    ("_io", "BytesIO"): _bytes_io,
    ("_codecs", "encode"): _latin1,
}


def loads(data: bytes, label: str) -> Any:
    """Returns the object in a pickle or torch.save archive in memory (TransformerEngine's extra state).

    The rules of `read_torch` apply.

    Args:
        data: the pickle or the archive.
        label: names the data in errors.

    Raises:
        ModelError: the data is damaged, or its pickle needs more than data.
    """
    if not data.startswith(b"PK"):
        return _unpickle(data, lambda pid: _Storage(_storage_id(pid, label)[0], None), label)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            prefix = name.removesuffix("data.pkl")
            if sum(info.file_size for info in archive.infolist()) > MAX_PICKLE_BYTES:
                raise ModelError(f"{label}: claims more than {MAX_PICKLE_BYTES} bytes; do not trust this file")

            read = functools.cache(archive.read)  # reads each entry once, however often the pickle names it

            def storage(persistent: Any) -> _Storage:
                kind, key = _storage_id(persistent, label)
                return _Storage(kind, None, read(f"{prefix}data/{key}"))

            return _unpickle(archive.read(name), storage, label)
    except ModelError:
        raise
    except Exception:  # a damaged archive raises nearly anything
        raise ModelError(f"{label}: a damaged archive of torch.save; fetch the checkpoint again") from None


class _Window(io.RawIOBase):
    """A read-only view of a byte range of an open file (a zip archive inside a tar)."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def seekable(self) -> bool:
        """Always True."""
        return True

    def readable(self) -> bool:
        """Always True."""
        return True

    def tell(self) -> int:
        """Returns the position in the range, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        """Sets the position in the range, and returns it."""
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Returns at most `size` bytes, or all that remain in the range if `size` is negative."""
        remaining = max(0, self._size - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(remaining if size < 0 else min(size, remaining))
        self._position += len(data)
        return data
