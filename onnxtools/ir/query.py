"""Queries on a graph: operators, attributes, constants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.ir.model import Model

FP8_DTYPES = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ)
TE_QDQ = ("TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear", "TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear")
"""TransformerEngine's operators, of the domain `trt`."""


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Returns the tensor of an initializer or a Constant node, without reading it; None for other values.

    A caller may override a graph input that also has an initializer, so it is no constant.
    """
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None and value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor()
        if name in ("value_float", "value_floats"):
            return ir.Tensor(np.array(attribute.value, dtype=np.float32))
        if name in ("value_int", "value_ints"):
            return ir.Tensor(np.array(attribute.value, dtype=np.int64))
    return None


def small_constant(value: ir.Value | None, limit: int = 4096) -> np.ndarray | None:
    """Returns the elements of a constant of at most `limit` elements, else None."""
    tensor = constant_tensor(value)
    return tensor.numpy() if tensor is not None and tensor.size <= limit else None


def is_constant_expression(value: ir.Value | None) -> bool:
    """Whether `value` is computed from constants alone."""
    waiting, seen = [value], {value}
    while waiting:
        current = waiting.pop()
        if current is None or constant_tensor(current) is not None:
            continue
        node = current.producer()
        if node is None:
            return False
        new = [v for v in node.inputs if v not in seen]
        seen.update(new)
        waiting += new
    return True


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Whether `node` is one of the operators `op_types` of `domain`; "" is ONNX's own domain."""
    return node is not None and node.op_type in op_types and (node.domain or "").replace("ai.onnx", "") == domain


def stored_dtype(value: ir.Value | None) -> ir.DataType | None:
    """Returns the element type of a value: of its tensor if it has one, else the recorded one, which may be None."""
    if value is None:
        return None
    return value.const_value.dtype if value.const_value is not None else value.dtype


def is_fp8_qdq(node: ir.Node) -> bool:
    """Whether `node` quantizes to FP8 or dequantizes it, by ONNX's operators or TransformerEngine's."""
    if is_op(node, *TE_QDQ, domain="trt"):
        return True
    if not is_op(node, "QuantizeLinear", "DequantizeLinear"):
        return False
    values = [*node.inputs[2:3], node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]]
    return (
        any(stored_dtype(value) in FP8_DTYPES for value in values) or attribute(node, "output_dtype", 0) in FP8_DTYPES
    )


def has_dynamic_scales(model: Model) -> bool:
    """Whether a QuantizeLinear's scale is computed from the data (TransformerEngine's current scaling)."""
    return any(is_op(node, "QuantizeLinear") and not is_constant_expression(node.inputs[1]) for node in model.graph)


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Returns the value of an attribute of `node`, or `default` if it has none."""
    attr = node.attributes.get(name)
    return default if attr is None else attr.value


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Returns the attributes of `node` by name, as `Builder.op` takes them."""
    return {name: attr.value for name, attr in node.attributes.items()}


def graphs_inside(node: ir.Node) -> Iterator[ir.Graph]:
    """Yields the graphs that are attributes of `node` (If, Loop, Scan)."""
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH:
            yield attr.as_graph()
        elif attr.type == ir.AttributeType.GRAPHS:
            yield from attr.as_graphs()
