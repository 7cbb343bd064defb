"""Run any function over an onnx_graphsurgeon graph as a pass, weights left on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxtools.base.options import option
from onnxtools.base.registry import load_object
from onnxtools.ir.edit import remove_unused
from onnxtools.ir.model import Model
from onnxtools.pipeline.passbase import Pass, PassResult

GraphFunction = Callable[[Any], Any]


@dataclass(frozen=True)
class GraphSurgeonPass(Pass):
    """Apply `function(graph)` to the model as an `onnx_graphsurgeon.Graph`.

    Rules:
      - weights are imported as references; one that the function does not touch is never read and keeps its type,
        also those that GraphSurgeon cannot hold (FP8, INT4, BF16);
      - what GraphSurgeon drops is put back by name: metadata of the model, graph and nodes, and doc strings;
      - the function may return a graph; None means that it changed its argument;
      - `cleanup().toposort()` is the function's business.
    """

    name = "graphsurgeon"
    numerics = "lossy"
    runs_code = True
    example = "onnxtools graphsurgeon model.onnx out.onnx --function my_package.surgery:fix_names"

    function: str | GraphFunction = option("", "The function, as package.module:name.")

    def options(self) -> dict[str, Any]:
        function = self.function
        return {"function": function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"}

    def apply(self, model: Model) -> PassResult:
        import onnx_graphsurgeon as gs

        function = self._function()
        before = len(model.graph)
        tensors = {value.name: tensor for value, tensor in model.weights()}
        graph = gs.import_onnx(model.proto())
        _load_from_model(graph, tensors)
        imported = [(t._values, tensors[t.name]) for t in graph.tensors().values() if _is_lazy(t) and t.name in tensors]
        graph = function(graph) or graph
        exported = gs.export_onnx(graph, do_type_check=False)
        lazy = {id(values): tensor for values, tensor in imported}
        untouched = {
            t.name: lazy[id(t._values)] for t in graph.tensors().values() if _is_lazy(t) and id(t._values) in lazy
        }
        _adopt(model, exported, untouched)
        notes = [
            f"{self.options()['function']}: {before} -> {len(model.graph)} nodes, {len(untouched)} weights untouched"
        ]
        return PassResult(True, 1, notes)

    def _function(self) -> GraphFunction:
        return load_object("graphsurgeon: function", self.function) if isinstance(self.function, str) else self.function


def _is_lazy(tensor: Any) -> bool:
    return type(getattr(tensor, "_values", None)).__name__ == "LazyValues"


def _load_from_model(graph: Any, tensors: Mapping[str | None, ir.TensorProtocol]) -> None:
    """Let lazy weights load from the model's own tensors.

    GraphSurgeon would look for the data files in the working directory.
    """
    for inner in (graph, *graph.subgraphs(recursive=True)):
        for tensor in inner.tensors().values():
            if _is_lazy(tensor) and isinstance(tensors.get(tensor.name), ir.ExternalTensor):
                tensor._values.load = partial(_elements, tensors[tensor.name])


def _elements(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    return np.array(tensor.numpy())


def _adopt(model: Model, exported: onnx.ModelProto, untouched: dict[str, ir.TensorProtocol]) -> None:
    """Make `exported` the model, with its untouched weights and with the metadata that GraphSurgeon lost."""
    for initializer in exported.graph.initializer:
        if initializer.name in untouched:  # the bytes stay in their file; the loop below restores the reference
            initializer.CopyFrom(
                onnx.TensorProto(
                    name=initializer.name, data_type=initializer.data_type, dims=initializer.dims, raw_data=b""
                )
            )
        elif initializer.data_location == onnx.TensorProto.EXTERNAL and not initializer.external_data:
            initializer.data_location = onnx.TensorProto.DEFAULT
    old = model.ir
    new = ir.from_proto(exported)
    for name, tensor in untouched.items():
        if name in new.graph.initializers:
            new.graph.initializers[name].const_value = tensor
            new.graph.initializers[name].dtype = tensor.dtype
    new.ir_version = old.ir_version
    new.producer_name, new.producer_version, new.doc_string = old.producer_name, old.producer_version, old.doc_string
    for domain, version in old.opset_imports.items():
        new.opset_imports.setdefault(domain, version)
    new.metadata_props.update(old.metadata_props)
    new.graph.metadata_props.update(old.graph.metadata_props)
    new.graph.doc_string = old.graph.doc_string
    nodes = {node.name: node for node in old.graph.all_nodes()}
    for node in new.graph.all_nodes():
        if node.name in nodes:
            node.metadata_props.update(nodes[node.name].metadata_props)
            node.doc_string = nodes[node.name].doc_string
    model.ir = new
    remove_unused(model)
