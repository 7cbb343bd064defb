"""Speed of the 2:4 kernel: GB/s of weights read, medians of 5, against a copy and a stable argsort.

python benchmarks/kernel_2_4.py [MiB per array, 256 by default]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

from onnxtools.numerics.sparsity import is_2_4, prune_2_4

Array = np.ndarray[Any, Any]
TYPES = (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
THREADS = 2
SLABS = 16


def argsort_prune(weight: Array, axis: int) -> None:
    moved = np.moveaxis(weight.astype(np.float32), axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, 4)
    order = np.argsort(np.abs(groups), axis=-1, kind="stable")
    np.put_along_axis(groups, order[..., :2], 0, axis=-1)
    np.moveaxis(groups.reshape(moved.shape), -1, axis).astype(weight.dtype)


def speed(function: Callable[[], object], size: int, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return size / statistics.median(times) / 1e9


def parts(weight: Array, out: Array, count: int) -> list[tuple[Array, Array]]:
    step = weight.shape[0] // count
    return [(weight[i : i + step], out[i : i + step]) for i in range(0, weight.shape[0], step)]


def main() -> None:
    size = int(sys.argv[1]) << 20 if len(sys.argv) > 1 else 256 << 20
    pool = ThreadPoolExecutor(THREADS)
    print(f"{'dtype':15} axis   copy  copy x2  prune  prune x2  is_2_4  argsort  of copy  over argsort")
    for scalar in TYPES:
        dtype = np.dtype(scalar)
        shape = (size // dtype.itemsize // 4096, 4096)
        noise = np.random.default_rng(0).normal(size=(64, 4096)).astype(dtype)
        weight = np.tile(noise, (shape[0] // 64, 1))
        out = np.zeros_like(weight)
        slabs = parts(weight, out, SLABS)

        def copy(slab: tuple[Array, Array]) -> None:
            np.copyto(slab[1].view(np.uint8), slab[0].view(np.uint8))

        for axis in (0, 1):

            def prune(slab: tuple[Array, Array], axis: int = axis) -> None:
                prune_2_4(slab[0], axis, slab[1])

            total = weight.nbytes
            few = weight[: max(64, weight.shape[0] // 64 // 4 * 4)]
            c1 = speed(lambda: list(map(copy, slabs)), total)  # noqa: B023
            c2 = speed(lambda: list(pool.map(copy, slabs)), total)  # noqa: B023
            p1 = speed(lambda: list(map(prune, slabs)), total)  # noqa: B023
            p2 = speed(lambda: list(pool.map(prune, slabs)), total)  # noqa: B023
            test = speed(lambda: is_2_4(out, axis), total)  # noqa: B023
            plain = speed(lambda: argsort_prune(few, axis), few.nbytes)  # noqa: B023
            numbers = f"{c1:7.2f} {c2:8.2f} {p1:6.2f} {p2:9.2f} {test:7.2f} {plain:8.4f}"
            print(f"{dtype.name:15} {axis:4}{numbers} {p1 / c1:8.0%} {p1 / plain:12.0f}x", flush=True)


if __name__ == "__main__":
    main()
