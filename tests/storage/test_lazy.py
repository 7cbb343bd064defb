"""Slices, stacks and casts of weights in files: equal to numpy's on the whole, however the rows are cut."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxtools.base.errors import ModelError
from onnxtools.storage import lazy as w
from onnxtools.storage.lazy import cast
from onnxtools.storage.rows import RowTensor, elements, read_rows

WHOLE = np.random.default_rng(1).standard_normal((24, 6)).astype(np.float32)


@pytest.fixture
def stored(tmp_path: Path) -> ir.ExternalTensor:
    (tmp_path / "w.bin").write_bytes(b"head" + WHOLE.tobytes())
    return ir.ExternalTensor(
        "w.bin", 4, WHOLE.nbytes, ir.DataType.FLOAT, shape=ir.Shape(WHOLE.shape), name="w", base_dir=tmp_path
    )


def rows(tensor: ir.TensorProtocol, step: int) -> np.ndarray:
    """All rows, read `step` at a time (or in the multiple that the tensor asks for)."""
    step = max(step, tensor.row_multiple if isinstance(tensor, RowTensor) else 1)
    count = tensor.shape.numpy()[0]
    return np.concatenate([read_rows(tensor, start, min(start + step, count)) for start in range(0, count, step)])


@pytest.mark.parametrize("step", [1, 5, 24])
def test_pieces(stored: ir.ExternalTensor, step: int) -> None:
    a, b = w.row_range(stored, 3, 9), w.row_range(stored, 15, 24)
    np.testing.assert_array_equal(rows(a, step), WHOLE[3:9])
    np.testing.assert_array_equal(rows(w.vstack([b, a], "x"), step), np.vstack([WHOLE[15:24], WHOLE[3:9]]))
    np.testing.assert_array_equal(
        rows(w.row_range(w.vstack([b, a], "x"), 7, 12), step), np.vstack([WHOLE[15:24], WHOLE[3:9]])[7:12]
    )
    np.testing.assert_array_equal(
        rows(w.hstack([a, w.row_range(stored, 0, 6)], "x"), step), np.hstack([WHOLE[3:9], WHOLE[0:6]])
    )
    np.testing.assert_array_equal(rows(w.columns(stored, 2, 5), step), WHOLE[:, 2:5])
    np.testing.assert_array_equal(
        rows(w.pick_rows(stored, [(20, 22), (1, 2), (2, 4)], "x"), step), WHOLE[[20, 21, 1, 2, 3]]
    )
    np.testing.assert_array_equal(rows(w.plus_one(stored), step), WHOLE + 1)
    np.testing.assert_array_equal(rows(w.cast(stored, ir.DataType.BFLOAT16), step), WHOLE.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("step", [1, 5, 24])
def test_half_rotation_undoes_llama_cpps_order(stored: ir.ExternalTensor, step: int) -> None:
    """convert_hf_to_gguf.py: w.reshape(heads, 2, size / 2, ...).swapaxes(1, 2)."""
    heads = 3
    theirs = WHOLE.reshape(heads, 2, 4, 6).swapaxes(1, 2).reshape(WHOLE.shape)
    Path(stored.base_dir, "w.bin").write_bytes(b"head" + theirs.tobytes())
    turned = w.half_rotation(stored, heads)
    np.testing.assert_array_equal(rows(turned, step), WHOLE)
    np.testing.assert_array_equal(rows(w.vstack([turned, turned], "x"), step), np.vstack([WHOLE, WHOLE]))


def test_what_is_contiguous_stays_a_byte_range(stored: ir.ExternalTensor) -> None:
    """So that it is copied by the kernel, or not at all."""
    pieces = [w.row_range(stored, 3, 9), w.row_range(stored, 9, 10), w.row_range(stored, 10, 24)]
    joined = w.vstack(pieces, "x")
    assert isinstance(joined, ir.ExternalTensor) and (joined.offset, joined.length) == (4 + 3 * 24, 21 * 24)
    assert w.row_range(stored, 0, 24) is stored and w.cast(stored, ir.DataType.FLOAT) is stored
    assert not isinstance(w.vstack(pieces[::-1], "x"), ir.ExternalTensor)


_FLOATS = {
    "float64": (np.float64, ir.DataType.DOUBLE), "float32": (np.float32, ir.DataType.FLOAT),
    "float16": (np.float16, ir.DataType.FLOAT16),
    "bfloat16": (ml_dtypes.bfloat16, ir.DataType.BFLOAT16),
}  # fmt: skip


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", _FLOATS)
def test_a_value_beyond_the_target_is_refused_and_a_mask_stays(source: str, target: str) -> None:
    """Of every pair of types: the largest value that fits stays finite, the next one that the source has is refused."""
    kind, wide = _FLOATS[source][0], _FLOATS[target][0]
    largest = float(ml_dtypes.finfo(wide).max)
    fits = np.array([largest, -largest, 0, -np.inf], np.float64).astype(kind)
    if np.isfinite(fits[0].astype(np.float64)) and float(fits[0]) <= largest:
        found = elements(cast(ir.Tensor(fits, name="w"), _FLOATS[target][1]))
        np.testing.assert_array_equal(found.astype(np.float64), fits.astype(np.float64))
    beyond = np.array([1.0, 2 * largest], np.float64).astype(kind)
    if np.isfinite(beyond[1].astype(np.float64)):
        with pytest.raises(ModelError, match="'w' has values beyond"):
            elements(cast(ir.Tensor(beyond, name="w"), _FLOATS[target][1]))
        with pytest.raises(ModelError, match="'w' has values beyond"):
            elements(cast(ir.Tensor(-beyond, name="w"), _FLOATS[target][1]))
    for odd in (np.inf, np.nan):
        if source != target:
            with pytest.raises(ModelError, match="'w' has infinite or NaN elements"):
                elements(cast(ir.Tensor(np.array([1.0, odd], np.float64).astype(kind), name="w"), _FLOATS[target][1]))


def test_a_value_that_rounds_up_to_infinity_is_beyond() -> None:
    """3.4e38 is a float32, and nearer to bfloat16's infinity than to its largest number; 65520 is so of float16."""
    for value, target in ((3.4e38, ir.DataType.BFLOAT16), (65520.0, ir.DataType.FLOAT16)):
        with pytest.raises(ModelError, match="beyond"):
            elements(cast(ir.Tensor(np.array([value], np.float32), name="w"), target))
    np.testing.assert_array_equal(
        elements(cast(ir.Tensor(np.array([65519.0], np.float32), name="w"), ir.DataType.FLOAT16)), [65504]
    )
