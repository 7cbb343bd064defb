"""2:4 structured sparsity by magnitude, in plain numpy integer arithmetic.

Floating-point numbers with the sign bit cleared order like unsigned integers (IEEE 754-2019, 5.10; OCP FP8
likewise), so magnitudes are compared as integer keys. The difference of two keys fits the signed type, and its
sign bit is the result of the comparison. In a group a, b, c, d with s = [b < a] and t = [d < c] two facts decide:

    U = [max(c, d) < min(a, b)]   a and b stay           keep a: s & W | U       keep c: t & ~U | ~W
    W = [min(c, d) < max(a, b)]   if not, c and d stay   keep b: ~s & W | U      keep d: ~t & ~U | ~W

Otherwise the larger of each pair stays. This takes 30 vector operations for four elements. Only sign bits matter
until one arithmetic shift spreads them over the word. There are no booleans and no branches, and all buffers stay in
the cache. If the four elements of a group are neighbours in memory, casts from double words to halves split them: numpy
vectorizes these casts, but not strided access. Integers are little endian, as in ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.storage.rows import read_rows, slabs

Array = np.ndarray[Any, Any]

LANE_BYTES = 256 * 1024
"""Bytes of each of the four lanes of a slab. The scratch of a call is 12 lanes (3 MiB).

One thread is as fast with 64 KiB, but two threads are then no faster than one: each numpy call releases the interpreter
lock and must last longer than reacquiring it takes. With 256 KiB, two threads are 1.4 to 1.7 times as fast as one.
"""
PIECE_BYTES = 256 * 1024
"""Arrays that are not C-contiguous are copied in pieces of at most this many bytes."""

_NAMES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_COUNTED = (*_NAMES, "int8")


def prune_2_4(weight: Array, axis: int, out: Array | None = None) -> Array:
    """Zero the two smallest magnitudes in every four consecutive elements along `axis`.

    The first two elements of a stable ascending sort of |w| are pruned: of equal magnitudes, the lower index. -0 equals
    0. NaN is larger than infinity, and NaNs are ordered by payload. Pruned elements become +0, kept ones keep their
    bits. The result does not depend on how a tensor is cut into whole groups. Several threads may call at once.

    Args:
        weight: any rank >= 1, any strides; it may be read-only or a memory map. float32, float16, bfloat16,
            float8_e4m3fn or float8_e5m2 in native byte order.
        axis: the axis of the groups; its length must be a multiple of 4.
        out: an array of the shape and dtype of `weight`: `weight` itself, or memory that does not overlap it. A new
            C-contiguous array by default. With `out` a call needs less than 8 MiB of memory, whatever the size.

    Returns:
        `out`.

    Raises:
        ValueError: the axis, its length, the dtype or `out` does not fit.
    """
    weight = np.asarray(weight)
    axis = _check(weight, axis)
    if out is None:
        out = np.empty(weight.shape, weight.dtype)
    elif out.shape != weight.shape or out.dtype != weight.dtype or not out.flags.writeable:
        raise ValueError(f"out is {out.dtype} {out.shape}; not writeable {weight.dtype} {weight.shape}")
    kernel = _Kernel(weight)
    for index in _pieces(weight, axis, weight.flags.c_contiguous and out.flags.c_contiguous):
        piece = out[index]
        target = piece if piece.flags.c_contiguous else np.empty(piece.shape, piece.dtype)
        x, y = _groups(weight[index], axis), _groups(target, axis)
        for slab in _slabs(x):
            (kernel.neighbours if x.shape[2] == 1 else kernel.rows)(x[slab], y[slab])
        if target is not piece:
            piece[...] = target
    return out


@dataclass
class Sparsity:
    """Zeros of a weight.

    Attributes:
        elements: elements in all.
        zeros: elements that are zero.
        groups: groups of four along K.
        sparse_groups: groups with at least two zeros.
    """

    elements: int = 0
    zeros: int = 0
    groups: int = 0
    sparse_groups: int = 0

    @property
    def is_2_4(self) -> bool:
        """Whether there are groups and each has at least two zeros."""
        return self.groups > 0 and self.sparse_groups == self.groups

    @property
    def zero_fraction(self) -> float:
        """Zeros / elements, 0 to 1; 0 of an empty weight."""
        return self.zeros / self.elements if self.elements else 0.0


def is_2_4(weight: Array, axis: int) -> tuple[int, int]:
    """Counts the groups of four along `axis` with at least two zeros, in less than 8 MiB of memory.

    Args:
        weight: as in `prune_2_4`, or int8.
        axis: as in `prune_2_4`.

    Returns:
        Groups with at least two zeros, and groups in all.

    Raises:
        ValueError: the axis, its length or the dtype does not fit.
    """
    weight = np.asarray(weight)
    axis = _check(weight, axis, _COUNTED)
    sparse, clear = 0, np.int8(-1) if weight.dtype == np.int8 else _clear(weight.dtype.itemsize)
    for index in _pieces(weight, axis, weight.flags.c_contiguous):
        x = _groups(weight[index], axis)
        for slab in _slabs(x):
            zero = ((x[slab] & clear) == 0).view(np.uint8)
            if x.shape[2] == 1:
                words = zero.reshape(-1).view(np.uint32)
                sparse += int(np.count_nonzero(words & (words - 1)))  # more than one of four bits
            else:
                sparse += int(np.count_nonzero(zero[:, 0] + zero[:, 1] + zero[:, 2] + zero[:, 3] > 1))
    return sparse, weight.size // 4


def count_2_4(tensor: ir.TensorProtocol, axis: int) -> Sparsity:
    """Counts zeros and groups (`is_2_4`) of a stored weight, and reads it slab by slab.

    There are no groups if the length of `axis` is no multiple of 4, or if the type has no 2:4 pruning.
    """
    counts = Sparsity()
    whole = int(tensor.shape.numpy()[axis]) % 4 == 0 and tensor.dtype.numpy().name in _COUNTED
    for start, stop in slabs(tensor, 4 if axis == 0 else 1):
        rows = read_rows(tensor, start, stop)
        counts.elements += rows.size
        values = rows.astype(np.float32) if rows.dtype.itemsize == 1 else rows
        counts.zeros += rows.size - int(np.count_nonzero(values))
        if whole:
            sparse, groups = is_2_4(rows, axis)
            counts.sparse_groups += sparse
            counts.groups += groups
    return counts


def _check(weight: Array, axis: int, names: tuple[str, ...] = _NAMES) -> int:
    """Returns `axis` counted from the front. Raises the errors of `prune_2_4`."""
    if weight.dtype.name not in names or not weight.dtype.isnative:
        raise ValueError(f"{weight.dtype} has no 2:4 pruning; use {', '.join(names)} in native byte order")
    if not -weight.ndim <= axis < weight.ndim:
        raise ValueError(f"axis {axis} of an array of rank {weight.ndim}")
    if weight.shape[axis] % 4:
        raise ValueError(f"axis {axis} has {weight.shape[axis]} elements, no multiple of 4")
    return axis % weight.ndim


def _clear(size: int) -> Array:
    """Returns the mask of all bits but the sign of a `size`-byte integer."""
    signed = np.dtype(f"i{size}")
    return np.array(np.iinfo(signed).max, signed)


def _groups(array: Array, axis: int) -> Array:
    """Returns signed integers [groups, 4, elements after the axis]: a view of a C-contiguous array, else a copy."""
    after = math.prod(array.shape[axis + 1 :])
    lanes = np.ascontiguousarray(array).view(f"i{array.dtype.itemsize}")
    return lanes.reshape(array.size // (4 * after), 4, after)


def _pieces(array: Array, axis: int, whole: bool) -> Iterator[tuple[slice, ...]]:
    """Yields indices that cover `array`: one if `whole`, else parts of PIECE_BYTES, by halving the longest axis."""
    todo = [tuple(slice(0, size) for size in array.shape)] if array.size else []
    units = [4 if i == axis else 1 for i in range(array.ndim)]
    while todo:
        index = todo.pop()
        counts = [(part.stop - part.start) // unit for part, unit in zip(index, units, strict=True)]
        if whole or 4 * math.prod(counts) * array.dtype.itemsize <= PIECE_BYTES:
            yield index
            continue
        longest = counts.index(max(counts))
        low, high = index[longest].start, index[longest].stop
        middle = low + counts[longest] // 2 * units[longest]
        todo += [(*index[:longest], slice(*ends), *index[longest + 1 :]) for ends in ((low, middle), (middle, high))]


def _slabs(x: Array) -> Iterator[tuple[slice, slice, slice]]:
    """Yields indices that cut [groups, 4, n] into slabs whose lanes fit LANE_BYTES. Long rows are cut evenly."""
    lane = LANE_BYTES // x.dtype.itemsize
    width = -(-x.shape[2] // -(-x.shape[2] // lane))
    for top in range(0, x.shape[0], lane // width):
        for column in range(0, x.shape[2], width):
            yield slice(top, top + lane // width), slice(None), slice(column, column + width)


class _Kernel:
    """Scratch memory and constants of one call. Slabs are signed integers [h, 4, w] of at most LANE_BYTES a lane."""

    def __init__(self, weight: Array) -> None:
        bits = 8 * weight.dtype.itemsize
        self.lane, self.word = np.dtype(f"u{bits // 8}"), np.dtype(f"u{bits // 4}")
        self.clear = _clear(bits // 8)
        signed = self.clear.dtype
        self.sign = np.array(bits - 1, signed)
        self.bits, self.one = np.array(bits, self.word), np.array(1 << bits, self.word)
        size = min(weight.size, 4 * LANE_BYTES // signed.itemsize)
        self.memory = np.empty((3, size + 64), signed)  # the 64 keep rows from aliasing in the cache

    def rows(self, x: Array, out: Array) -> None:
        """Prune a slab whose lanes are rows: the pairs p = (a, c) and q = (b, d) are stacked copies."""
        h, _, w = x.shape
        n = h * w
        a, b, c = self.memory[:, : 4 * n]
        keys, result = a.reshape(2, 2, h, w), c.reshape(2, 2, n)
        x, out = x.reshape(h, 2, 2, w), out.reshape(h, 2, 2, w)
        np.bitwise_and(x.transpose(2, 1, 0, 3), self.clear, out=keys)
        p, q = keys.reshape(2, 2, n)
        m = b.reshape(4, n)  # max(a, b), min(a, b), min(c, d), max(c, d)
        np.minimum(p, q, out=m[1:3])
        np.maximum(p, q, out=m[::3])
        np.subtract(q, p, out=result[0])  # s, t
        facts = a.reshape(4, n)  # W, ~U, U, ~W; over the keys
        np.subtract(m[2:], m[:2], out=facts[::2])
        np.invert(facts[2::-2], out=facts[1::2])
        self._keep(result, facts[:2], facts[2:])
        np.bitwise_and(x, result.reshape(2, 2, h, w).transpose(2, 1, 0, 3), out=out)

    def neighbours(self, x: Array, out: Array) -> None:
        """Prune a slab of neighbours: p = (a, c, ...) and q = (b, d, ...) are low and high halves of double words."""
        n = x.size // 2
        a, b, c = self.memory[:, : 2 * n]
        result, aw, bw, bits = c.reshape(2, n), a.view(self.word), b.view(self.word), self.bits
        np.bitwise_and(x.reshape(-1), self.clear, out=a)
        p, q = result
        np.copyto(p.view(self.lane), aw, casting="unsafe")
        np.right_shift(aw, bits, out=bw)
        np.copyto(q.view(self.lane), bw, casting="unsafe")
        low, high = a.reshape(2, n)
        yes, no = b.reshape(2, n)  # (U, ~W, ...) and (W, ~U, ...)
        yes_w, no_w, high_w = yes.view(self.word), no.view(self.word), high.view(self.word)
        np.minimum(p, q, out=low)
        np.maximum(p, q, out=high)
        np.subtract(q, p, out=result[0])
        self._swap(high_w, yes_w, no_w)
        np.subtract(yes, low, out=yes)  # max(c, d) - min(a, b), max(a, b) - min(c, d)
        np.subtract(yes_w, self.one, out=yes_w)  # one less in the second: <= instead of <
        self._swap(yes_w, no_w, high_w)
        np.invert(no, out=no)
        self._keep(result, no, yes)
        np.copyto(aw, result[0].view(self.lane))
        np.copyto(bw, result[1].view(self.lane))
        np.left_shift(bw, bits, out=bw)
        np.bitwise_or(aw, bw, out=aw)
        np.bitwise_and(x.reshape(-1), a, out=out.reshape(-1))

    def _swap(self, words: Array, out: Array, spare: Array) -> None:
        """Exchanges the halves of every word."""
        np.right_shift(words, self.bits, out=out)
        np.left_shift(words, self.bits, out=spare)
        np.bitwise_or(out, spare, out=out)

    def _keep(self, result: Array, both: Array, sure: Array) -> None:
        """Turn result[0] = (s, t), both = (W, ~U), sure = (U, ~W) into result = masks of (a, c) and (b, d)."""
        first, second = result
        np.bitwise_and(first, both, out=first)
        np.bitwise_or(first, sure, out=first)
        np.bitwise_xor(first, both, out=second)
        np.bitwise_or(second, sure, out=second)
        np.right_shift(result, self.sign, out=result)
