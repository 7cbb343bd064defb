"""The one table of element types: short names of the command line, ONNX's names, numpy's types and item sizes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

BY_NAME = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "int8": ir.DataType.INT8,
}
"""Element types by their names in options."""


def of(name: str) -> ir.DataType:
    """Returns the element type of a name: ONNX's in lower or upper case (float, float16), or numpy's (float32).

    Raises:
        KeyError: neither has such a type.
    """
    try:
        return ir.DataType[name.upper()]
    except KeyError:
        pass
    try:
        return ir.DataType.from_numpy(np.dtype(name))  # onnx_ir has registered ml_dtypes' names with numpy
    except TypeError:
        raise KeyError(name) from None


def itemsize(name: str) -> int:
    """Returns the bytes of one element of the type `name`, which is as of `of`.

    Raises:
        KeyError: there is no such type.
    """
    return int(of(name).itemsize)
