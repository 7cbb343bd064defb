"""The 2:4 kernel against a stable argsort of magnitudes, which shares no code with it."""

from __future__ import annotations

import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from onnxtools.numerics import sparsity
from onnxtools.numerics.sparsity import is_2_4, prune_2_4

TYPES = (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
DTYPES = [np.dtype(t) for t in TYPES]
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def reference(weight: np.ndarray, axis: int) -> np.ndarray:
    """Stable argsort of |w| in float64 over groups of 4; NaN sorts last; the first two become +0."""
    moved = np.moveaxis(np.array(weight), axis, -1)
    groups = np.ascontiguousarray(moved).reshape(-1, 4)
    order = np.argsort(np.abs(groups.astype(np.float64)), axis=1, kind="stable")
    result = groups.copy()
    np.put_along_axis(result, order[:, :2], np.zeros(1, weight.dtype)[0], axis=1)
    return np.ascontiguousarray(np.moveaxis(result.reshape(moved.shape), -1, axis))


def special(dtype: np.dtype) -> np.ndarray:
    """Zero, extreme subnormals, the smallest normal, ordinary values, largest, infinity, NaN; both signs."""
    info = ml_dtypes.finfo(dtype)
    one = np.array(1, dtype)
    values = [0, info.smallest_subnormal, info.smallest_normal, 0.5, 1, one + info.eps, 2, info.max, np.nan]
    values = [np.array(v).astype(dtype) for v in values]
    values.append((bits(values[2].reshape(1)) - 1).view(dtype)[0])  # the largest subnormal
    if dtype.name != "float8_e4m3fn":
        values.append(np.array(np.inf).astype(dtype))
    array = np.array(values, dtype)
    array = (bits(array) & (np.iinfo(bits(array).dtype).max >> 1)).view(dtype)
    return np.concatenate([array, -array])


def data(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A third ordinary values, a third few values (ties), a third special values; shuffled."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    normal = rng.normal(size=count).astype(dtype)
    ties = rng.integers(-2, 3, count).astype(dtype) * np.array(rng.choice([-1, 1], count), dtype)
    edge = rng.choice(special(dtype), count)
    kind = rng.integers(0, 3, count)
    return np.choose(kind, [bits(normal), bits(ties), bits(edge)]).view(dtype).reshape(shape)


def check(weight: np.ndarray, axis: int, got: np.ndarray) -> None:
    assert got.dtype == weight.dtype and got.shape == weight.shape
    np.testing.assert_array_equal(bits(got), bits(reference(weight, axis)))


@per_dtype
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((4,), 0), ((4096,), -1), ((8, 5), 0), ((5, 8), 1), ((5, 8), -1), ((400, 1), 0), ((64, 300), 0),
        ((3, 64, 7), 1), ((3, 8, 64), 2), ((4, 3, 5), 0),
        ((6, 16, 3, 3), 1), ((8, 2, 3, 4), -4), ((2, 3, 5, 12), 3), ((2, 4, 1, 1), 1),
    ],
)  # fmt: skip
def test_same_as_reference(dtype: np.dtype, shape: tuple[int, ...], axis: int) -> None:
    for seed in range(3):
        weight = data(dtype, shape, seed)
        before = bits(weight).copy()
        check(weight, axis, prune_2_4(weight, axis))
        np.testing.assert_array_equal(bits(weight), before)


@per_dtype
def test_every_group_of_special_values(dtype: np.dtype) -> None:
    values = special(dtype)
    groups = np.stack(np.meshgrid(*[values] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    check(groups, 1, prune_2_4(groups, 1))
    rows = np.ascontiguousarray(groups.T)
    check(rows, 0, prune_2_4(rows, 0))


@per_dtype
@pytest.mark.parametrize("across", [(4, 270001), (36, 40009), (1048592, 1), (160004, 9)], ids=str)
def test_larger_than_a_slab(dtype: np.dtype, across: tuple[int, int]) -> None:
    weight = data(dtype, across)
    assert weight.size > 4 * sparsity.LANE_BYTES // dtype.itemsize
    check(weight, 0, prune_2_4(weight, 0))
    turned = np.ascontiguousarray(weight.T)
    check(turned, 1, prune_2_4(turned, 1))


@per_dtype
@pytest.mark.parametrize("axis", [0, 1])
def test_independent_of_slabs_and_cuts(dtype: np.dtype, axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = data(dtype, (120, 84))
    expected = bits(reference(weight, axis))
    for lane in (4, 8, 64, 1000, 4096):
        monkeypatch.setattr(sparsity, "LANE_BYTES", lane)
        monkeypatch.setattr(sparsity, "PIECE_BYTES", 4 * lane)
        np.testing.assert_array_equal(bits(prune_2_4(weight, axis)), expected)
        np.testing.assert_array_equal(bits(prune_2_4(np.asfortranarray(weight), axis)), expected)
        assert is_2_4(weight, axis) == is_2_4(np.asfortranarray(weight), axis)
    parts = [prune_2_4(weight[i : i + 12], axis) for i in range(0, 120, 12)]
    np.testing.assert_array_equal(bits(np.concatenate(parts)), expected)


@per_dtype
def test_strides_of_input_and_output(dtype: np.dtype) -> None:
    base = data(dtype, (48, 40, 12))
    for view in (base.transpose(2, 1, 0), base[::-1, ::2, ::-1], base[:, 3:31, :], base[:, :, 4:8]):
        for axis in [a for a in range(3) if view.shape[a] % 4 == 0]:
            check(view, axis, prune_2_4(view, axis))
            out = np.zeros((*view.shape[::-1], 2), dtype)[..., 1].T
            assert prune_2_4(view, axis, out) is out
            check(view, axis, out)
    expected = reference(base, 1)
    prune_2_4(base, 1, base)
    np.testing.assert_array_equal(bits(base), bits(expected))


def test_kept_signs_and_pruned_zeros() -> None:
    weight = np.array([-3, 1, 2, -1, -0.0, -0.0, 5, -4, -1, 1, -1, 1], np.float16)
    expected = np.array([-3, 0, 2, 0, 0, 0, 5, -4, 0, 0, -1, 1], np.float16)
    np.testing.assert_array_equal(bits(prune_2_4(weight, 0)), bits(expected))


def test_nans_with_different_payloads_stay_nan() -> None:
    words = [0x7E00, 0xFE01, 0x7C01, 0x7E02, 0x7C00, 0x7C01, 0x0001, 0xFFFF]
    weight = np.array(words, np.uint16).view(np.float16)
    assert np.isnan(prune_2_4(weight, 0)).sum() == 4 and is_2_4(prune_2_4(weight, 0), 0) == (2, 2)


@pytest.mark.parametrize("axis", [0, 1])
def test_read_only_map_in_bounded_memory(axis: int, tmp_path: object) -> None:
    path = os.path.join(str(tmp_path), "w.bin")
    weight = data(np.dtype(np.float16), (4096, 4096))
    weight.tofile(path)
    mapped = np.memmap(path, np.float16, "r", shape=weight.shape)
    out = np.empty_like(weight)
    turned = np.empty_like(weight)
    tracemalloc.start()
    prune_2_4(mapped, axis, out)
    found = is_2_4(out, axis)
    prune_2_4(mapped.T, 1 - axis, turned.T)
    prune_2_4(mapped.T, axis, turned)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert found == (weight.size // 4, weight.size // 4)
    check(weight, axis, out)
    check(np.ascontiguousarray(weight.T), axis, turned)


def test_threads() -> None:
    weight = data(np.dtype(np.float16), (64, 16384))
    out = np.empty_like(weight)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: prune_2_4(weight[i : i + 4], 0, out[i : i + 4]), range(0, 64, 4)))
    check(weight, 0, out)


@per_dtype
@pytest.mark.parametrize(("shape", "axis"), [((64, 300), 0), ((300, 64), 1), ((3, 8, 5), 1), ((1 << 19,), 0)])
def test_is_2_4_counts_groups(dtype: np.dtype, shape: tuple[int, ...], axis: int) -> None:
    weight = data(dtype, shape)
    groups = np.moveaxis(weight.astype(np.float32), axis, -1).reshape(-1, 4)
    assert is_2_4(weight, axis) == (int(((groups == 0).sum(axis=1) >= 2).sum()), len(groups))
    assert is_2_4(prune_2_4(weight, axis), axis) == (len(groups), len(groups))


@pytest.mark.parametrize("axis", [0, 1])
def test_is_2_4_counts_int8_whose_lowest_value_is_a_sign_bit_alone(axis: int) -> None:
    weight = np.random.default_rng(0).choice(np.array([-128, -1, 0, 0, 127], np.int8), (64, 304))
    groups = np.moveaxis(weight, axis, -1).reshape(-1, 4)
    assert is_2_4(weight, axis) == (int(((groups == 0).sum(axis=1) >= 2).sum()), len(groups))
    with pytest.raises(ValueError, match="int8 has no 2:4 pruning"):
        prune_2_4(weight, axis)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0,), (8, 0, 3)])
def test_empty(shape: tuple[int, ...]) -> None:
    weight = np.empty(shape, np.float16)
    assert prune_2_4(weight, 0).shape == shape
    assert is_2_4(weight, 0) == (0, 0)


@pytest.mark.parametrize("function", [prune_2_4, is_2_4])
@pytest.mark.parametrize(
    ("weight", "axis", "words"),
    [
        (np.zeros((6, 4), np.float16), 0, "no multiple of 4"),
        (np.zeros((4, 6), np.float16), -1, "no multiple of 4"),
        (np.zeros((4, 4), np.float64), 0, "float64"),
        (np.zeros((4, 4), np.uint8), 0, "uint8"),
        (np.zeros((4, 4), ">f2"), 0, "byte order"),
        (np.zeros((4, 4), np.float32), 2, "axis 2"),
        (np.zeros((4, 4), np.float32), -3, "axis -3"),
        (np.zeros((), np.float32), 0, "rank 0"),
    ],
)
def test_errors(function: object, weight: np.ndarray, axis: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        function(weight, axis)  # type: ignore[operator]


def test_unfit_output() -> None:
    weight = np.zeros((4, 8), np.float16)
    fixed = np.zeros((4, 8), np.float16)
    fixed.flags.writeable = False
    for out in (np.zeros((8, 4), np.float16), np.zeros((4, 8), np.float32), fixed):
        with pytest.raises(ValueError, match="writeable"):
            prune_2_4(weight, 0, out)
