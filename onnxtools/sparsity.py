"""2:4 structured sparsity by magnitude, in plain numpy integer arithmetic.

Floating-point numbers with the sign bit cleared order like unsigned integers, so magnitudes are compared as integer
keys. The difference of two keys fits the signed type, and its sign bit is the comparison: an arithmetic shift spreads
it over the word, and majority logic on three such words gives the mask of an element, without booleans or branches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.tensors import read_rows, slabs

Array = np.ndarray[Any, Any]

LANE_ELEMENTS = 16 * 1024
"""Elements of each of the four lanes that are worked on at once: all buffers of a step stay in the second-level cache."""

_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32}
_NAMES = {"float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}


def prune_2_4(weight: Array, axis: int, out: Array | None = None) -> Array:
    """Zero the two smallest magnitudes in every four consecutive elements along `axis`.

    Of equal magnitudes the lower index goes first (a stable ascending sort); NaN counts as the largest; what is pruned
    becomes +0. The result does not depend on how a tensor is cut into groups of whole quadruples.

    Args:
        weight: any rank; float32, float16, bfloat16, float8_e4m3fn or float8_e5m2.
        axis: its length must be a multiple of 4.
        out: where to write, C-contiguous, of the shape and dtype of `weight`; a new array by default.
    Raises:
        ValueError: the length or the dtype does not fit.
    """
    view = _lanes(weight, axis)
    result = np.empty(weight.shape, weight.dtype) if out is None else out
    target = _lanes(result, axis)
    outer, groups, _, inner = view.shape
    if inner == 1:  # the groups lie in one row: treat all of them as one long lane
        view, target = (v.reshape(1, 1, outer * groups, 4).transpose(0, 1, 3, 2) for v in (view, target))
        outer, groups, _, inner = view.shape
    scratch = _Scratch(view.dtype)
    width = min(inner, LANE_ELEMENTS)
    height = max(1, LANE_ELEMENTS // width)
    for index in range(outer):
        for top in range(0, groups, height):
            for left in range(0, inner, width):
                part = (index, slice(top, top + height), slice(None), slice(left, left + width))
                scratch.prune(view[part], target[part])
    return result


def _lanes(array: Array, axis: int) -> Array:
    """`array` as signed integers [outer, groups, 4, inner]; a view where the memory allows."""
    if array.dtype.name not in _NAMES:
        raise ValueError(f"{array.dtype.name} cannot be pruned; use one of {', '.join(sorted(_NAMES))}")
    axis %= array.ndim
    length = array.shape[axis]
    if length % 4:
        raise ValueError(f"the axis has {length} elements, no multiple of 4")
    outer, inner = math.prod(array.shape[:axis]), math.prod(array.shape[axis + 1 :])
    return np.ascontiguousarray(array).view(_SIGNED[array.dtype.itemsize]).reshape(outer, length // 4, 4, inner)


class _Scratch:
    """Buffers of one worker: four lanes of keys and a few of masks."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.clear = np.array(np.iinfo(dtype).max, dtype)  # every bit but the sign
        self.shift = np.array(dtype.itemsize * 8 - 1, dtype)
        self.buffers = [np.empty(LANE_ELEMENTS, dtype) for _ in range(12)]

    def prune(self, x: Array, out: Array) -> None:
        """One step: x and out are [height, 4, width] with at most `LANE_ELEMENTS` elements a lane."""
        shape = (x.shape[0], x.shape[2])
        count = shape[0] * shape[1]
        buffers = [buffer[:count].reshape(shape) for buffer in self.buffers]
        keys, wins, a, b = buffers[:4], buffers[4:10], buffers[10], buffers[11]
        for lane in range(4):
            np.bitwise_and(x[:, lane], self.clear, out=keys[lane])
        # wins[ij] is all ones where lane i beats the later lane j: key j - key i is negative.
        for word, (i, j) in zip(wins, _PAIRS, strict=True):
            np.subtract(keys[j], keys[i], out=word)
            np.right_shift(word, self.shift, out=word)
        w01, w02, w03, w12, w13, w23 = wins
        self._keep(x, out, 0, w01, w02, w03, a, b)
        np.invert(w01, out=w01)
        self._keep(x, out, 1, w01, w12, w13, a, b)
        np.invert(w02, out=w02)
        np.invert(w12, out=w12)
        self._keep(x, out, 2, w02, w12, w23, a, b)
        for word in (w03, w13, w23):
            np.invert(word, out=word)
        self._keep(x, out, 3, w03, w13, w23, a, b)

    def _keep(self, x: Array, out: Array, lane: int, p: Array, q: Array, r: Array, a: Array, b: Array) -> None:
        """Keep a lane where at least two of its three comparisons are won: the majority of three words."""
        np.bitwise_or(p, q, out=a)
        np.bitwise_and(a, r, out=a)
        np.bitwise_and(p, q, out=b)
        np.bitwise_or(a, b, out=a)
        np.bitwise_and(x[:, lane], a, out=out[:, lane])


_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


@dataclass
class Sparsity:
    """Zeros of a weight: elements, zero elements, groups of four along K, and groups with at least two zeros."""

    elements: int = 0
    zeros: int = 0
    groups: int = 0
    sparse_groups: int = 0

    @property
    def is_2_4(self) -> bool:
        return self.groups > 0 and self.sparse_groups == self.groups

    @property
    def zero_fraction(self) -> float:
        return self.zeros / self.elements if self.elements else 0.0


def is_2_4(weight: Array, axis: int) -> tuple[int, int]:
    """(groups of four along `axis` with at least two zeros, groups in all)."""
    lanes = _lanes(weight, axis)
    zeros = (lanes & np.array(np.iinfo(lanes.dtype).max, lanes.dtype)) == 0
    return int(np.count_nonzero(zeros.sum(axis=2, dtype=np.int8) >= 2)), zeros.size // 4


def count_2_4(tensor: ir.TensorProtocol, axis: int) -> Sparsity:
    """`is_2_4` of a stored weight, read a slab at a time; axes that are no multiple of 4 have no groups."""
    found = Sparsity()
    whole = int(tensor.shape.numpy()[axis]) % 4 == 0 and tensor.dtype.numpy().name in _NAMES
    for start, stop in slabs(tensor, 4 if axis == 0 else 1):
        rows = read_rows(tensor, start, stop)
        found.elements += rows.size
        found.zeros += rows.size - int(np.count_nonzero(rows.astype(np.float32) if rows.dtype.itemsize == 1 else rows))
        if whole:
            sparse, groups = is_2_4(rows, axis)
            found.sparse_groups += sparse
            found.groups += groups
    return found
