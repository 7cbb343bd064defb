"""Replace what can be computed from constants, and shape arithmetic that came out constant, by initializers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts, constants
from onnxtools.base.options import option
from onnxtools.ir.edit import Builder, remove_unused, rename_or_bypass
from onnxtools.ir.model import Model
from onnxtools.ir.query import constant_tensor
from onnxtools.pipeline.passbase import Pass, PassResult

SHARED_ELEMENTS = 1024
"""Constants up to this many elements are compared, so that equal ones are stored once."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Fold constant sub-expressions.

    Rules:
      - a node output becomes an initializer when its elements are the same for all values of the symbolic dimensions;
      - results above `max_elements` stay: folding must never make a file grow;
      - outputs of Range, Expand and similar operators stay nodes for the same reason;
      - Constant nodes become initializers, equal ones are shared;
      - adding an all-zero tensor, multiplying by one (exporters leave `baddbmm(beta=0)` that way), and slicing,
        expanding or reshaping to the shape that the tensor already has, are removed.
    """

    name = "fold-constants"
    example = "onnxtools fold-constants model.onnx folded.onnx"

    max_elements: int = option(1024, "Largest result, in elements, that is stored.")

    def apply(self, model: Model) -> PassResult:
        views, agreed = constants(model)
        facts = views[0]
        builder = Builder(model)
        folded = 0
        for node in list(model.graph):
            if node.op_type == "Constant" and node.domain == "":
                folded += self._lift(node, builder)
                continue
            if all(o in agreed for o in node.outputs) and self._worth(node, facts):
                for output in node.outputs:
                    array = agreed[output]
                    dtype = facts[output].dtype or ir.DataType.from_numpy(array.dtype)
                    _become(output, ir.Tensor(np.asarray(array, dtype=dtype.numpy()), dtype=dtype), builder)
                folded += 1
        neutral = sum(_remove_neutral(node, views, model) for node in list(model.graph))
        removed = remove_unused(model)
        notes = [
            f"{folded} nodes folded, {neutral} no-op nodes removed, {removed} unused nodes and initializers dropped"
        ]
        return PassResult(
            bool(folded or neutral or removed),
            folded + neutral,
            notes if folded or neutral or removed else ["nothing to fold"],
        )

    def _lift(self, node: ir.Node, builder: Builder) -> int:
        value = node.outputs[0]
        tensor = constant_tensor(value)
        if tensor is None or value.is_graph_output():
            return 0
        _become(value, tensor, builder)
        return 1

    def _worth(self, node: ir.Node, facts: Facts) -> bool:
        if any(o.is_graph_output() for o in node.outputs):
            return False
        return all(
            not facts[o].grown and (a := facts[o].value) is not None and a.size <= self.max_elements
            for o in node.outputs
        )


def _become(value: ir.Value, tensor: ir.TensorProtocol, builder: Builder) -> None:
    """Let an initializer take the place and the name of `value`; equal small ones are shared."""
    if tensor.size <= SHARED_ELEMENTS and tensor.dtype != ir.DataType.STRING:
        new = builder.constant(tensor.numpy(), value.name or "constant", tensor.dtype)
    else:
        new = builder.initializer(tensor, value.name or "constant")
    rename_or_bypass(builder.graph, value, new)


def _remove_neutral(node: ir.Node, views: list[Facts], model: Model) -> int:
    """Remove `x + 0`, `x * 1`, or a Slice, Expand or Reshape to the shape of x; returns the number of nodes removed."""
    if node.domain == "" and node.op_type in ("Slice", "Expand", "Reshape") and not node.outputs[0].is_graph_output():
        return _remove_same_shape(node, views, model)
    if node.domain != "" or node.op_type not in ("Add", "Mul") or node.outputs[0].is_graph_output():
        return 0
    for keep, drop in ((0, 1), (1, 0)):
        data, side = node.inputs[keep], node.inputs[drop]
        neutral = 0 if node.op_type == "Add" else 1
        if (
            data is not None
            and views[0][data].value is None
            and all(_neutral(view, data, side, node.outputs[0], neutral) for view in views)
            and any(view[side].value is not None for view in views)
        ):
            rename_or_bypass(model.graph, node.outputs[0], data)
            return 1
    return 0


def _neutral(view: Facts, data: ir.Value, side: ir.Value | None, result: ir.Value, neutral: int) -> bool:
    """Whether `side` changes nothing under the sizes of `view`.

    Where a view was too large to evaluate, the other views decide.
    """
    value, shape = view[side].value, view[data].shape
    if shape is None or shape != view[result].shape:
        return False
    if value is None:
        return math.prod(view[side].shape or ()) > view.limit
    return value.size > 0 and bool(np.all(value == neutral))


def _remove_same_shape(node: ir.Node, views: list[Facts], model: Model) -> int:
    data, result = node.inputs[0], node.outputs[0]
    if data is None or views[0][data].value is not None:
        return 0
    for view in views:
        steps = view[node.inputs[4]].value if len(node.inputs) > 4 and node.inputs[4] is not None else None
        if (
            view[data].shape is None
            or view[data].shape != view[result].shape
            or (steps is not None and np.any(steps != 1))
        ):
            return 0
    rename_or_bypass(model.graph, result, data)
    return 1
