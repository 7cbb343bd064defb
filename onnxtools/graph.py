"""Small helpers over onnx_ir graphs that several passes share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.model import Model

FP8_DTYPES = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ)
TE_QDQ = ("TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear", "TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear")
"""TransformerEngine's operators, of the domain `trt`."""


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind an initializer or a Constant node, without reading it; None for anything else.

    A graph input that also has an initializer may be overridden by the caller, so it is no constant.
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
    """The elements of a constant of at most `limit` elements, else None."""
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
    return node is not None and node.op_type in op_types and (node.domain or "").replace("ai.onnx", "") == domain


def stored_dtype(value: ir.Value | None) -> ir.DataType | None:
    """The type of a value, of its tensor where it has one."""
    if value is None:
        return None
    return value.const_value.dtype if value.const_value is not None else value.dtype


def is_fp8_qdq(node: ir.Node) -> bool:
    """Whether `node` quantizes to FP8 or back, in ONNX's way or in TransformerEngine's."""
    if is_op(node, *TE_QDQ, domain="trt"):
        return True
    if not is_op(node, "QuantizeLinear", "DequantizeLinear"):
        return False
    values = [*node.inputs[2:3], node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]]
    return any(stored_dtype(value) in FP8_DTYPES for value in values) or attribute(node, "output_dtype", 0) in FP8_DTYPES


def has_dynamic_scales(model: Model) -> bool:
    """Whether a QuantizeLinear takes its scale from the data (TransformerEngine's current scaling)."""
    return any(is_op(node, "QuantizeLinear") and not is_constant_expression(node.inputs[1]) for node in model.graph)


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def graphs_inside(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that are attributes of an If, Loop or Scan."""
    for held in node.attributes.values():
        if held.type == ir.AttributeType.GRAPH:
            yield held.as_graph()
        elif held.type == ir.AttributeType.GRAPHS:
            yield from held.as_graphs()


def rename_or_bypass(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let every user of `old`, graph outputs included, use `new`; a graph output keeps its name, type and shape."""
    output = old.is_graph_output()
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if output:
        name, old.name = old.name, f"{old.name}__replaced"
        new.name, new.type, new.shape = name, old.type or new.type, old.shape or new.shape


def replace_keeping_name(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """`rename_or_bypass`, and `new` takes over the name of `old`, so that tools and people can follow the value."""
    output = old.is_graph_output()
    rename_or_bypass(graph, old, new)
    if not output:
        name, old.name = old.name, f"{old.name}__replaced"
        new.name = name


class Names:
    """Hands out value and node names that the graph does not use yet."""

    def __init__(self, graph: ir.Graph) -> None:
        self.taken: set[str | None] = {*graph.initializers, *(v.name for v in graph.inputs)}
        for node in graph.all_nodes():
            self.taken.add(node.name)
            self.taken.update(v.name for v in node.outputs)

    def __call__(self, wanted: str) -> str:
        name = wanted
        for index in itertools.count(1):
            if name not in self.taken:
                break
            name = f"{wanted}_{index}"
        self.taken.add(name)
        return name


class Builder:
    """Inserts nodes and initializers with unique names; each call returns the new value.

    Nodes go right before `before` (or at the end of the graph), so a sorted graph stays sorted when the
    inputs are produced earlier.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.graph = model.graph
        self.names = Names(model.graph)
        self.before: ir.Node | None = None
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, *, outputs: int = 1, dtype: ir.DataType | None = None,
        shape: Sequence[int | str | None] | None = None, domain: str = "", **attributes: Any,
    ) -> ir.Value:  # fmt: skip
        """Append one node called `name`; its value is `name`/output_0. Several outputs: use `ops`."""
        value = self.ops(op_type, inputs, name, outputs=outputs, domain=domain, **attributes)[0]
        if dtype is not None:
            value.dtype = dtype
        if shape is not None:
            value.shape = ir.Shape(list(shape))
        return value

    def ops(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, *, outputs: int = 1, domain: str = "", **attributes: Any) -> Sequence[ir.Value]:
        name = self.names(name)
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = self.names(f"{name}/output_{index}")
        if self.before is not None:
            self.graph.insert_before(self.before, node)
        else:
            self.graph.append(node)
        return node.outputs

    def constant(self, array: np.ndarray | Sequence[int], name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """An initializer; equal small constants are shared."""
        data = np.asarray(array, dtype=np.int64) if not isinstance(array, np.ndarray) else array
        tensor = ir.Tensor(data, dtype=dtype)  # ir.tensor() checks protocols, which takes 100 us
        key = (tensor.dtype, data.shape, data.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(tensor, name)
        return self._constants[key]

    def initializer(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        name = self.names(name)
        tensor.name = name
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(tensor.shape.numpy())), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def remove_unused(model: Model) -> int:
    """Drop nodes, initializers and opset imports that nothing uses; returns how many nodes and initializers went."""
    before = len(model.graph) + len(model.graph.initializers)
    from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

    RemoveUnusedNodesPass()(model.ir)
    RemoveUnusedOpsetsPass()(model.ir)
    return before - len(model.graph) - len(model.graph.initializers)


def forget_types(values: Iterable[ir.Value]) -> None:
    """Drop recorded types and shapes that may no longer hold."""
    for value in values:
        value.type = None
        value.shape = None
