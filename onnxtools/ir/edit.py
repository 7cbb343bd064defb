"""`Builder`: inserts nodes and initializers under free names; and how values take each other's place."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.ir.model import Model


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
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        outputs: int = 1,
        dtype: ir.DataType | None = None,
        shape: Sequence[int | str | None] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Append one node called `name`; its value is `name`/output_0. Several outputs: use `ops`."""
        value = self.ops(op_type, inputs, name, outputs=outputs, domain=domain, **attributes)[0]
        if dtype is not None:
            value.dtype = dtype
        if shape is not None:
            value.shape = ir.Shape(list(shape))
        return value

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
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
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(tensor.shape.numpy())), const_value=tensor
        )
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
