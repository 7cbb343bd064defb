"""The one table of element types: short names of the command line, ONNX's names, numpy's types and item sizes."""

from __future__ import annotations

import onnx_ir as ir

BY_NAME = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "int8": ir.DataType.INT8,
}
"""Element types by the names that options give them."""


def itemsize(name: str) -> int:
    """Bytes of an element, by ONNX's name in lower case (float16)."""
    return int(ir.DataType[name.upper()].itemsize)
