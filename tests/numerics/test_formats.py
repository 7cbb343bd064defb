"""Stored weights against ONNX's own definition of QuantizeLinear and against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from onnxtools.base.errors import ModelError
from onnxtools.numerics.formats import FP8, INT4, INT8, Format, magnitudes, quantized, scale_of
from onnxtools.storage.rows import raw_bytes

Array = np.ndarray[Any, Any]
WEIGHT = (np.random.default_rng(1).standard_normal((48, 64)) * np.geomspace(0.01, 30, 48)[:, None]).astype(np.float32)


def by_onnx(weight: Array, scale: Array, form: Format, axis: int | None, block: int = 0) -> Array:
    """onnx.reference's QuantizeLinear and DequantizeLinear."""
    attributes = {} if axis is None else {"axis": axis, **({"block_size": block} if block else {})}
    elem = form.dtype.value
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes)
    ]  # fmt: skip
    zero = helper.make_tensor("z", elem, list(scale.shape), b"\0" * -(-scale.size * form.dtype.bitwidth // 8), raw=True)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("w", TensorProto.FLOAT, None), helper.make_tensor_value_info("s",
            TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [zero],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    return np.asarray(ReferenceEvaluator(model).run(None, {"w": weight, "s": scale})[0])


@pytest.mark.parametrize("form", [FP8, INT8, INT4], ids=lambda form: form.name)
@pytest.mark.parametrize(("axis", "how"), [(1, "tensor"), (1, "channel"), (0, "channel"), (1, "block"), (0, "block")])
def test_a_quantized_weight_is_what_onnx_says(form: Format, axis: int, how: str) -> None:
    weight = WEIGHT if axis == 1 else np.ascontiguousarray(WEIGHT.T)
    tensor, block = ir.Tensor(weight), 16 if how == "block" else 0
    amax = magnitudes(tensor, axis, block)
    grouped = np.abs(weight).reshape((48, 4, 16) if axis == 1 else (4, 16, 48)) if block else np.abs(weight)
    np.testing.assert_array_equal(amax, grouped.max(axis=(2 if axis == 1 else 1) if block else axis))
    scale = scale_of(amax.max() if how == "tensor" else amax, form, ir.DataType.FLOAT)
    expected = by_onnx(weight, scale, form, None if how == "tensor" else axis if block else 1 - axis, block)
    stored = quantized(tensor, form, scale, axis, block)
    made = stored.numpy().astype(np.float32)
    spread = scale if how == "tensor" else np.repeat(scale, block, axis=axis) if block else np.expand_dims(scale, axis)
    np.testing.assert_array_equal(made * spread, expected)


def test_int4_is_packed_with_the_low_nibble_first() -> None:
    values = np.array([[1, -2, 7, -8]], ml_dtypes.int4)
    assert bytes(raw_bytes(values)) == bytes([0xE1, 0x87])


def test_slabs_give_what_the_whole_gives() -> None:
    tensor = ir.Tensor(WEIGHT)
    scale = scale_of(magnitudes(tensor, 0, 16), INT4, ir.DataType.FLOAT)
    whole = quantized(tensor, INT4, scale, 0, 16)
    parts = np.concatenate([whole.rows(start, start + 16).astype(np.int8) for start in (0, 16, 32)])
    np.testing.assert_array_equal(parts, whole.numpy().astype(np.int8))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_damaged_weight_is_named(value: float) -> None:
    weight = WEIGHT.copy()
    weight[5, 5] = value
    with pytest.raises(ModelError, match=r"'fc1'.*infinite or NaN"):
        magnitudes(ir.Tensor(weight, name="fc1"), 1)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_scales_of_zeros_and_of_next_to_nothing_divide(dtype: ir.DataType) -> None:
    scale = scale_of(np.array([0.0, 1e-30, 448.0]), FP8, dtype).astype(np.float64)
    assert scale[0] == 1 and scale[1] >= float(ml_dtypes.finfo(dtype.numpy()).tiny) and scale[2] == 1


def test_nothing_is_read_before_it_is_written(tmp_path: Path) -> None:
    """A weight whose file is gone by then fails when it is written, not when it is quantized."""
    WEIGHT.tofile(tmp_path / "w.bin")
    tensor = ir.ExternalTensor(
        "w.bin", 0, WEIGHT.nbytes, ir.DataType.FLOAT, shape=ir.Shape([48, 64]), name="w", base_dir=tmp_path
    )
    made = quantized(tensor, INT8, np.array(0.1, np.float32), 1)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(OSError):
        made.numpy()
