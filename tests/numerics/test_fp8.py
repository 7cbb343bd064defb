"""E4M3 and MX against ONNX's own reference evaluator, ml_dtypes and the OCP specification's words."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from onnxtools.numerics.formats import FP8, quantized
from onnxtools.numerics.fp8 import MX_BLOCK, mx_data_rows, mx_scale_rows, to_e4m3
from tests.support import Array, normal

E4M3 = ml_dtypes.float8_e4m3fn
TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def by_onnx(x: Array, scale: Array, axis: int) -> Array:
    """QuantizeLinear-19 of onnx.reference, in float32."""
    info = helper.make_tensor_value_info
    kind = TensorProto.FLOAT8E4M3FN
    shapes = [info("x", 1, None), info("s", 1, None), info("z", kind, None)]
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], axis=axis)
    graph = helper.make_graph([node], "g", shapes, [info("y", kind, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    zero = np.zeros(scale.shape, E4M3)
    (codes,) = ReferenceEvaluator(model).run(None, {"x": x.astype(np.float32), "s": scale, "z": zero})
    return codes.astype(E4M3)


def test_every_value_between_two_codes_goes_to_the_nearer_and_ties_to_the_even_one() -> None:
    codes = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float64)  # 0 to 448
    low, high = codes[:-1], codes[1:]
    middle = (low + high) / 2
    even = np.where(np.arange(len(low)) % 2 == 0, low, high)
    for x, expected in ((middle, even), (np.nextafter(middle, 0), low), (np.nextafter(middle, 1e3), high)):
        x32 = x.astype(np.float32)
        if x is not middle:
            x32 = np.nextafter(middle.astype(np.float32), np.float32(0 if expected is low else 1e3))
        assert (to_e4m3(x32).astype(np.float64) == expected).all()
        assert (to_e4m3(-x32).astype(np.float64) == -expected).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_beyond_the_range_it_saturates_and_nan_stays(dtype: type) -> None:
    x = np.array([448, 464, 480, 1e4, np.inf, -np.inf, np.nan, 0.0, -0.0], dtype)
    got = to_e4m3(x).astype(np.float32)
    np.testing.assert_array_equal(got, [448, 448, 448, 448, 448, -448, np.nan, 0, 0])
    assert np.signbit(got[-1])


def test_float32_of_every_magnitude_is_what_ml_dtypes_says() -> None:
    """All upper halves, with lower halves that decide ties: 0, 1, the middle, and the last."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x8000, 0xFFFF):
        x = (upper | np.uint32(lower)).view(np.float32)
        x = x[np.isfinite(x)]
        expected = np.clip(x, -448, 448).astype(E4M3)
        np.testing.assert_array_equal(to_e4m3(x).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("channels", [False, True])
def test_rows_are_what_onnx_reference_quantizes(dtype: type, axis: int, channels: bool) -> None:
    x = normal(96, 80, seed=3).astype(dtype)
    x[0, :4] = [0, -0.0, 3e4, -3e4]
    count = x.shape[1 - axis]
    scale = (np.abs(normal(count, seed=4)) + 0.01).astype(np.float32) if channels else np.float32(0.037)
    stored = quantized(ir.tensor(x), FP8, scale, axis)
    np.testing.assert_array_equal(stored.numpy().view(np.uint8), by_onnx(x, scale, 1 - axis).view(np.uint8))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [np.float32(200), np.full(6, 200, np.float32)], ids=["tensor", "channel"])
def test_infinite_and_nan_elements_are_not_made_numbers(dtype: type, scale: Array) -> None:
    """Infinity saturates; a conversion that forgot the exponent of infinities would give 65536 / 200 = 328."""
    x = np.zeros((4, 6), dtype)
    x[1, 2], x[1, 3], x[1, 4] = np.inf, -np.inf, np.nan
    got = quantized(ir.tensor(x), FP8, scale, 0).numpy().astype(np.float32)
    np.testing.assert_array_equal(got[1], [0, 0, 448, -448, np.nan, 0])


@pytest.mark.parametrize("shape", [(5,), (3, 4, 5), ()])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_one_scale_takes_any_rank(shape: tuple[int, ...], dtype: type) -> None:
    x = np.asarray(normal(*shape, seed=5)).astype(dtype)
    stored = quantized(ir.tensor(x), FP8, np.float32(0.1), 1).numpy()
    assert stored.shape == shape
    np.testing.assert_array_equal(stored.view(np.uint8), by_onnx(x, np.float32(0.1), 0).view(np.uint8))


def test_mx_scales_are_the_least_powers_of_two_that_hold_a_block() -> None:
    """OCP MX, section 6.3, with TransformerEngine's rounding up: amax / scale is at most 448 and more than 224."""
    rows = normal(8, 4 * MX_BLOCK, seed=6) * np.float32(10) ** np.arange(-4, 4, dtype=np.float32)[:, None]
    rows[3, :MX_BLOCK] = 0
    rows[4, :MX_BLOCK] = 448  # exactly a power of two times 448
    scales = mx_scale_rows(rows, 0).astype(np.float64)
    amax = np.abs(rows.astype(np.float64)).reshape(8, 4, MX_BLOCK).max(-1)
    assert scales[3, 0] == 2.0**-127 and scales[4, 0] == 1
    filled = amax > 0
    assert (np.log2(scales) % 1 == 0).all()
    assert (amax <= 448 * scales).all() and (amax > 224 * scales)[filled].all()
    data = mx_data_rows(rows, 0).astype(np.float64).reshape(8, 4, MX_BLOCK) * scales[..., None]
    error = np.abs(data - rows.reshape(8, 4, MX_BLOCK))
    assert (error <= np.maximum(np.abs(rows.reshape(8, 4, MX_BLOCK)) / 16, scales[..., None] * 2.0**-10)).all()
