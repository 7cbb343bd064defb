"""`Builder` inserts nodes and initializers under free names; other functions replace and remove values."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.ir.model import Model


def rename_or_bypass(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Replace every use of `old`, graph outputs included, by `new`. A graph output keeps its name, type and shape.

    An input or another output of the graph keeps its own name too, so an Identity stands between it and the output.
    """
    output = old.is_graph_output()
    if output and (new.is_graph_input() or new.is_graph_output()):
        node = ir.node("Identity", [new], name=f"{old.name}/Identity")
        graph.append(node)
        new = node.outputs[0]
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if output:
        name, old.name = old.name, f"{old.name}__replaced"
        new.name, new.type, new.shape = name, old.type or new.type, old.shape or new.shape


def replace_keeping_name(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Like `rename_or_bypass`, but `new` always gets the name of `old`, so that people and tools can follow it."""
    output = old.is_graph_output()
    rename_or_bypass(graph, old, new)
    if not output:
        name, old.name = old.name, f"{old.name}__replaced"
        new.name = name


class Names:
    """Generates value and node names that the graph does not use yet: the given name, or the name with _1, _2, ...

    Attributes:
        taken: all names in use.
    """

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

    Nodes are inserted right before `before`, or at the end of the graph if it is None. A sorted graph stays sorted if
    the inputs are produced earlier.
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
        """Insert one node called `name`. Returns its first output, called `name`/output_0.

        Args:
            outputs: number of outputs; `ops` returns them all.
            dtype: element type to record; None records none.
            shape: shape to record; None records none.
            domain: the operator's domain.
            attributes: the node's attributes.
        """
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
        """Insert one node called `name`. Returns its outputs, called `name`/output_0, `name`/output_1, ..."""
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
        """Returns an initializer with the elements of `array`. Constants of equal type, shape and bytes are shared.

        A sequence of integers becomes int64. `dtype` is the ONNX type of an array that numpy cannot type itself.
        """
        data = np.asarray(array, dtype=np.int64) if not isinstance(array, np.ndarray) else array
        tensor = ir.Tensor(data, dtype=dtype)  # ir.tensor() checks protocols, which takes 100 us
        key = (tensor.dtype, data.shape, data.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(tensor, name)
        return self._constants[key]

    def initializer(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """Register `tensor` as an initializer called `name`, or `name`_1, ... if that is in use."""
        name = self.names(name)
        tensor.name = name
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(tensor.shape.numpy())), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value


def remove_unused(model: Model) -> int:
    """Remove unused nodes, initializers and opset imports. Returns the number of removed nodes and initializers."""
    before = len(model.graph) + len(model.graph.initializers)
    from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

    RemoveUnusedNodesPass()(model.ir)
    RemoveUnusedOpsetsPass()(model.ir)
    return before - len(model.graph) - len(model.graph.initializers)


def forget_types(values: Iterable[ir.Value]) -> None:
    """Remove the recorded types and shapes of `values`, which may no longer hold."""
    for value in values:
        value.type = None
        value.shape = None
