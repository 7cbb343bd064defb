"""Which weights are 2:4 sparse along the axis that a matrix product sums over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from onnxtools.graph import attribute, constant_tensor, is_op
from onnxtools.model import Model
from onnxtools.tensors import read_rows, slabs

_SAME_LAYOUT = ("QuantizeLinear", "DequantizeLinear", "Cast", "CastLike", "Identity")
_TE_SAME_LAYOUT = ("TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear")


@dataclass
class Sparsity:
    """Counts over the distinct weights of MatMul, Gemm and Conv nodes.

    Attributes:
        sparse: how many are 2:4 (two of each four neighbours along the reduction axis are zero).
        dense: names of those that are not.
    """

    sparse: int = 0
    dense: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.sparse + len(self.dense)

    def __str__(self) -> str:
        return f"{self.sparse} of {self.total} weights are 2:4"

    def as_json(self) -> dict[str, Any]:
        return {"sparse": self.sparse, "total": self.total, "dense": self.dense}


def check_sparsity(model: Model) -> Sparsity:
    """Read every weight of a matrix product once, a slab at a time (whole-byte dtypes only)."""
    found, seen = Sparsity(), set()
    for node in model.graph.all_nodes():
        weight = _weight(node)
        if weight is None or (weight[0].name, weight[2]) in seen:
            continue
        value, tensor, axis = weight
        seen.add((value.name, axis))
        if is_2_4(tensor, axis):
            found.sparse += 1
        else:
            found.dense.append(value.name or "")
    return found


def is_2_4(tensor: ir.TensorProtocol, axis: int) -> bool:
    """Whether every group of four along `axis` has at least two zeros."""
    from onnxtools import sparsity

    for start, stop in slabs(tensor, multiple=4 if axis == 0 else 1):
        good, groups = sparsity.is_2_4(read_rows(tensor, start, stop), axis)
        if good < groups:
            return False
    return True


def _weight(node: ir.Node) -> tuple[ir.Value, ir.TensorProtocol, int] | None:
    """(value, tensor, reduction axis of the stored tensor) of a node's weight; None where it has none."""
    for index in (1, 0) if is_op(node, "MatMul") else (1,) if is_op(node, "Gemm", "Conv") else ():
        found = _behind(node.inputs[index])
        if found is None or len(found[2]) < 2 or found[1].dtype.bitwidth < 8:
            continue
        value, tensor, axes = found
        if is_op(node, "MatMul"):
            axis = axes[-2 if index == 1 else -1]
        elif is_op(node, "Gemm"):
            axis = axes[1 if attribute(node, "transB", 0) else 0]
        else:
            axis = axes[1]
        return value, tensor, axis
    return None


def _behind(value: ir.Value | None) -> tuple[ir.Value, ir.TensorProtocol, list[int]] | None:
    """The constant behind quantization, casts and transposes, and for each axis of `value` the axis it is stored as."""
    axes: list[int] | None = None
    transposes: list[list[int]] = []
    while value is not None:
        tensor = constant_tensor(value)
        if tensor is not None:
            axes = list(range(len(tensor.shape)))
            for permutation in reversed(transposes):
                axes = [axes[i] for i in permutation or reversed(range(len(axes)))]
            return value, tensor, axes
        node = value.producer()
        if node is None:
            return None
        if is_op(node, "Transpose"):
            transposes.append(list(attribute(node, "perm", [])))
        elif not is_op(node, *_SAME_LAYOUT) and not is_op(node, *_TE_SAME_LAYOUT, domain="trt"):
            return None
        value = node.inputs[0]
    return None
