"""Weights derived from others without reading them: slices, stacks, casts. A plain byte range stays one."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxtools.base.errors import ModelError
from onnxtools.storage.quantized_weight import QuantizedWeight
from onnxtools.storage.rows import RowTensor, Scratch, StreamedTensor, external_path, read_rows, row_bytes

Tensor = ir.TensorProtocol


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Returns the sizes of the axes."""
    return tuple(int(extent) for extent in tensor.shape.numpy())


def row_range(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Returns the rows `start:stop`, in the weight's own type.

    For a weight in a file this is a shorter byte range, so that it can still be copied or referred to.
    """
    shape = (stop - start, *shape_of(tensor)[1:])
    if shape == shape_of(tensor):
        return tensor
    cut = _cut(tensor, start, stop) if isinstance(tensor, QuantizedWeight) else None
    if cut is not None:
        return cut
    if isinstance(tensor, ir.ExternalTensor):
        size = row_bytes(tensor)
        return ir.ExternalTensor(
            tensor.location, (tensor.offset or 0) + start * size, (stop - start) * size, tensor.dtype,
            shape=ir.Shape(shape), name=tensor.name or "", base_dir=tensor.base_dir,
        )  # fmt: skip
    return _Stack([(tensor, start, stop)], tensor.name or "")


def vstack(tensors: Sequence[Tensor], name: str) -> Tensor:
    """Returns the rows of all tensors, one after the other. Neighbours in a file become one byte range."""
    packed = [tensor for tensor in tensors if isinstance(tensor, QuantizedWeight)]
    whole = _stacked(packed, name) if len(packed) == len(tensors) else None
    if whole is not None:
        return whole
    parts = [tensors[0]]
    for tensor in tensors[1:]:
        neighbours = _joined(parts[-1], tensor)
        parts[-1:] = [parts[-1], tensor] if neighbours is None else [neighbours]
    return parts[0] if len(parts) == 1 else _Stack([(part, 0, shape_of(part)[0]) for part in parts], name)


def _cut(tensor: QuantizedWeight, start: int, stop: int) -> QuantizedWeight | None:
    """The rows `start:stop` as a quantized weight; None where the codes have outputs along their second axis."""
    p = tensor.parts
    if p.in_out:
        return None
    has_rows = bool(shape_of(p.scale))
    scale = row_range(p.scale, start, stop) if has_rows else p.scale
    zero = row_range(p.zero, start, stop) if p.zero is not None and has_rows else p.zero
    return QuantizedWeight(replace(p, codes=row_range(p.codes, start, stop), scale=scale, zero=zero), tensor.name or "")


def _stacked(weights: Sequence[QuantizedWeight], name: str) -> QuantizedWeight | None:
    """The rows of all weights as one; None where their rows have no scales of their own, or they differ otherwise."""
    first = weights[0].parts
    kinds = {(p.block, p.input_scale, p.codes.dtype, p.zero is None, p.scale.dtype) for p in (w.parts for w in weights)}
    changed = any(
        p.in_out or p.input_order is not None or p.input_factors is not None for p in (w.parts for w in weights)
    )
    if len(kinds) > 1 or changed or not all(shape_of(weight.parts.scale) for weight in weights):
        return None
    zeros = [weight.parts.zero for weight in weights if weight.parts.zero is not None]
    return QuantizedWeight(
        replace(
            first,
            codes=vstack([weight.parts.codes for weight in weights], name),
            scale=vstack([weight.parts.scale for weight in weights], f"{name}_scale"),
            zero=vstack(zeros, f"{name}_zero") if zeros else None,
        ),
        name,
    )


def _joined(a: Tensor, b: Tensor) -> Tensor | None:
    """Returns `a` and `b` as one byte range if `b` follows `a` in the file, else None."""
    if not (isinstance(a, ir.ExternalTensor) and isinstance(b, ir.ExternalTensor)) or external_path(a) != external_path(
        b
    ):
        return None
    if (a.offset or 0) + a.nbytes != (b.offset or 0) or shape_of(a)[1:] != shape_of(b)[1:] or a.dtype != b.dtype:
        return None
    shape = (shape_of(a)[0] + shape_of(b)[0], *shape_of(a)[1:])
    return ir.ExternalTensor(
        a.location,
        a.offset,
        a.nbytes + b.nbytes,
        a.dtype,
        shape=ir.Shape(shape),
        name=a.name or "",
        base_dir=a.base_dir,
    )


class _Stack(RowTensor):
    """Concatenates row ranges (tensor, start, stop) of weights of one width and type."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[tuple[Tensor, int, int]], name: str) -> None:
        first = parts[0][0]
        super().__init__(
            (sum(stop - start for _, start, stop in parts), *shape_of(first)[1:]),
            first.dtype,
            name,
            [part for part, _, _ in parts],
        )
        self.row_multiple = 1  # `_read` keeps to the parts' own multiples
        self._parts = parts

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        pieces, first_row = [], 0
        for tensor, first, last in self._parts:
            low, high = max(start, first_row), min(stop, first_row + last - first)
            if low < high:
                pieces.append(_read(tensor, first + low - first_row, first + high - first_row))
            first_row += last - first
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _read(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    """Reads the rows `start:stop`, in ranges that are multiples of the weight's `row_multiple`."""
    step = tensor.row_multiple if isinstance(tensor, RowTensor) else 1
    low = start // step * step
    high = min(-(-stop // step) * step, shape_of(tensor)[0])
    return read_rows(tensor, low, high)[start - low : stop - low]


class _Beside(RowTensor):
    """Concatenates the columns of its sources."""

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        return np.concatenate([_read(source, start, stop) for source in self.sources], axis=1)


def hstack(tensors: Sequence[Tensor], name: str) -> Tensor:
    """Returns matrices [rows, K_i] of one type side by side, [rows, sum of K_i]."""
    shapes = [shape_of(tensor) for tensor in tensors]
    return _Beside((shapes[0][0], sum(shape[1] for shape in shapes)), tensors[0].dtype, name, tensors)


def columns(tensor: Tensor, start: int, stop: int, step: int = 1) -> Tensor:
    """Returns the columns `start:stop:step` of a matrix, or the elements `start:stop` of a vector."""
    if len(shape_of(tensor)) == 1 and step == 1:
        return row_range(tensor, start, stop)
    shape = (*shape_of(tensor)[:-1], len(range(start, stop, step)))
    return StreamedTensor(
        tensor,
        lambda rows, _: np.ascontiguousarray(rows[..., start:stop:step]),
        dtype=tensor.dtype,
        name=tensor.name or "",
        shape=shape,
    )


class _Folded(RowTensor):
    """[groups x rows, ...] as [groups, rows, ...]."""

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        each = self.shape[1]
        assert isinstance(each, int)
        return _read(self.sources[0], start * each, stop * each).reshape(stop - start, *shape_of(self)[1:])


def folded(tensor: Tensor, groups: int) -> Tensor:
    """Returns the rows of a tensor [groups x rows, ...] as [groups, rows, ...]."""
    rows, *rest = shape_of(tensor)
    shape = (groups, rows // groups, *rest)
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(shape),
            name=tensor.name or "", base_dir=tensor.base_dir,
        )  # fmt: skip
    return _Folded(shape, tensor.dtype, tensor.name or "", [tensor])


class _Plane(RowTensor):
    """Element `index` along the first axis."""

    __slots__ = ("_index",)

    def __init__(self, tensor: Tensor, index: int) -> None:
        super().__init__(shape_of(tensor)[1:], tensor.dtype, tensor.name or "", [tensor])
        self._index = index

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        return np.ascontiguousarray(_read(self.sources[0], self._index, self._index + 1)[0][start:stop])


def plane(tensor: Tensor, index: int) -> Tensor:
    """Returns element `index` along the first axis of a tensor [planes, ...], without this axis."""
    own = getattr(tensor, "plane", None)  # a tensor that cuts its sources
    if own is not None:
        return own(index)  # type: ignore[no-any-return]
    if not isinstance(tensor, ir.ExternalTensor):
        return _Plane(tensor, index)
    size = row_bytes(tensor)
    return ir.ExternalTensor(
        tensor.location, (tensor.offset or 0) + index * size, size, tensor.dtype, shape=ir.Shape(shape_of(tensor)[1:]),
        name=tensor.name or "", base_dir=tensor.base_dir,
    )  # fmt: skip


class _Alternating(RowTensor):
    """Rows of two weights of one shape in turn."""

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        low, high = start // 2, -(-stop // 2)
        pair = np.stack([_read(source, low, high) for source in self.sources], axis=1)
        whole = pair.reshape(2 * (high - low), *shape_of(self)[1:])
        return np.ascontiguousarray(whole[start - 2 * low : stop - 2 * low])


def alternating(a: Tensor, b: Tensor, name: str) -> Tensor:
    """Returns the rows of two weights of one shape in turn: a[0], b[0], a[1], b[1], ..."""
    rows, *rest = shape_of(a)
    made = _Alternating((2 * rows, *rest), a.dtype, name, [a, b])
    made.row_multiple = 1  # `_read` keeps to the sources' own multiples
    return made


class _EveryRow(RowTensor):
    """Rows `first`, `first` + `step`, ..."""

    __slots__ = ("_first", "_step")

    def __init__(self, tensor: Tensor, first: int, step: int) -> None:
        rows, *rest = shape_of(tensor)
        super().__init__((len(range(first, rows, step)), *rest), tensor.dtype, tensor.name or "", [tensor])
        self.row_multiple, self._first, self._step = 1, first, step

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        low, high = self._first + start * self._step, self._first + (stop - 1) * self._step + 1
        return np.ascontiguousarray(_read(self.sources[0], low, high)[:: self._step])


def every_row(tensor: Tensor, first: int, step: int) -> Tensor:
    """Returns the rows `first`, `first` + `step`, ..."""
    return _EveryRow(tensor, first, step)


def pick_rows(tensor: Tensor, ranges: Sequence[tuple[int, int]], name: str) -> Tensor:
    """Returns the rows of several ranges (start, stop), in this order."""
    return vstack([row_range(tensor, start, stop) for start, stop in ranges], name)


def plus_one(tensor: Tensor) -> Tensor:
    """Returns `1 + tensor` in float32: the gain of a zero-centred norm (LayerNorm1p)."""
    return StreamedTensor(
        tensor, lambda rows, _: rows.astype(np.float32) + 1, dtype=ir.DataType.FLOAT, name=tensor.name or ""
    )


def half_rotation(tensor: Tensor, heads: int) -> Tensor:
    """Reorders rows of queries or keys from llama.cpp's neighbouring rotary pairs to Hugging Face's halves.

    llama.cpp's converter stores channel j of half h of a head at 2 j + h (convert_hf_to_gguf.py, `permute`).
    """
    size = shape_of(tensor)[0] // heads

    def rows(block: np.ndarray, _: int) -> np.ndarray:
        return np.ascontiguousarray(block.reshape(-1, size // 2, 2, *block.shape[1:]).swapaxes(1, 2)).reshape(
            block.shape
        )

    return StreamedTensor(tensor, rows, dtype=tensor.dtype, name=tensor.name or "", row_multiple=size)


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two weights of one shape hold the same numbers. It reads 1024 rows at a time."""
    if (
        isinstance(a, ir.ExternalTensor)
        and isinstance(b, ir.ExternalTensor)
        and (external_path(a), a.offset) == (external_path(b), b.offset)
    ):
        return True
    rows = shape_of(a)[0]
    return all(
        np.array_equal(_read(a, start, stop), _read(b, start, stop))
        for start, stop in ((i, min(i + 1024, rows)) for i in range(0, rows, 1024))
    )


def cast(tensor: Tensor, dtype: ir.DataType) -> Tensor:
    """Returns the weight in another float type, rounded to nearest even.

    Reading the result raises a ModelError if a value overflows the type, is plus infinity or NaN. Minus infinity stays,
    since masks hold it.
    """
    if tensor.dtype == dtype:
        return tensor

    def rows(block: np.ndarray, _: int) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            result = block.astype(dtype.numpy())
        finite = np.isfinite(result)
        # minus infinity is a mask
        if not finite.all() and not (finite | (block == -np.inf) & (result == -np.inf)).all():
            if not (np.isfinite(block) | (block == -np.inf)).all():
                raise ModelError(f"weight {tensor.name!r} has infinite or NaN elements; restore it")
            raise ModelError(
                f"weight {tensor.name!r} has values beyond {dtype.name}; use "
                f"{'fp32' if dtype == ir.DataType.BFLOAT16 else 'bf16 or fp32'}"
            )
        return result

    return StreamedTensor(tensor, rows, dtype=dtype, name=tensor.name or "")


class RandomRows(RowTensor):
    """Normal random numbers that depend only on the name and the position, not on how the rows are cut."""

    __slots__ = ("_deviation", "_mean")

    def __init__(self, shape: Sequence[int], dtype: ir.DataType, name: str, mean: float, deviation: float) -> None:
        width = int(np.prod(shape[1:], dtype=np.int64))
        super().__init__(shape, dtype, name, row_multiple=max(1, (1 << 16) // max(1, width)))
        self._mean, self._deviation = np.float32(mean), np.float32(deviation)

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        """Returns the rows `start:stop` in the type `dtype`; `start` is a multiple of `row_multiple`."""
        step, inner = self.row_multiple, shape_of(self)[1:]
        blocks = range(start // step, -(-stop // step))
        out = np.empty((stop - start, *inner), self.dtype.numpy())
        seed = zlib.crc32((self.name or "").encode())
        for block in blocks:
            low, high = block * step - start, min((block + 1) * step, shape_of(self)[0]) - start
            values = np.random.Generator(np.random.SFC64((seed, block))).standard_normal(
                (high - low, *inner), np.float32
            )
            out[low:high] = values * self._deviation + self._mean
        return out


def flatten(groups: Sequence[Sequence[tuple[int, int]]]) -> list[tuple[int, int]]:
    """Returns the row ranges (start, stop) of all groups as one list, with neighbours joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in itertools.chain.from_iterable(groups):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
