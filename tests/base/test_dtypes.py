"""The one table of element types, against ONNX's and numpy's own."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnxtools.base.dtypes import itemsize, of


@pytest.mark.parametrize("name", ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "INT64", "BOOL", "FLOAT8E4M3FN"])
def test_names_of_onnx(name: str) -> None:
    number = onnx.TensorProto.DataType.Value(name)
    assert of(name).value == of(name.lower()).value == number
    assert itemsize(name) == helper.tensor_dtype_to_np_dtype(number).itemsize


@pytest.mark.parametrize(("name", "dtype"), [
    ("float32", ir.DataType.FLOAT), ("float64", ir.DataType.DOUBLE), ("int8", ir.DataType.INT8),
    ("float8_e4m3fn", ir.DataType.FLOAT8E4M3FN), ("bfloat16", ir.DataType.BFLOAT16),
])  # fmt: skip
def test_names_of_numpy(name: str, dtype: ir.DataType) -> None:
    assert of(name) == dtype and of(name).numpy() == np.dtype(name)


def test_a_name_of_neither_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="float33"):
        of("float33")
