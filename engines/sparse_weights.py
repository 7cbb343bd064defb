"""Which weights are 2:4 sparse along the axis that a matrix product sums over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from onnxtools.model import Model
from onnxtools.products import weight_products
from onnxtools.sparsity import count_2_4


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
        more = f" and {len(self.dense) - 3} more" if len(self.dense) > 3 else ""
        dense = f"; dense: {', '.join(self.dense[:3])}{more}" if self.dense and self.sparse else ""
        return f"{self.sparse} of {self.total} weights are 2:4{dense}"

    def as_json(self) -> dict[str, Any]:
        return {"sparse": self.sparse, "total": self.total, "dense": self.dense}


def check_sparsity(model: Model) -> Sparsity:
    """Read every weight of a matrix product once, a slab at a time."""
    found = Sparsity()
    for weight, axis in dict.fromkeys((product.weight, product.axis) for product in weight_products(model)):
        tensor = weight.const_value
        if tensor is not None and is_sparse(tensor, axis):
            found.sparse += 1
        else:
            found.dense.append(weight.name or "")
    return found


def is_sparse(tensor: ir.TensorProtocol, axis: int) -> bool:
    """Whether every group of four along `axis` has at least two zeros; types below one byte are not looked into."""
    if tensor.dtype.bitwidth < 8:
        return False
    return count_2_4(tensor, axis).is_2_4
