"""Which products could take 2:4 sparse kernels, which took one, and why not, where that can be known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import onnx_ir as ir

from onnxtools.analysis.products import Product, weight_products
from onnxtools.engines.build.audit import EngineLayer
from onnxtools.ir.model import Model
from onnxtools.numerics.sparsity import count_2_4

_LARGE = 256
"""NVIDIA's developers: sparse kernels are faster where both K and N are larger than this (NVIDIA/TensorRT issue
3849).
"""


@dataclass(frozen=True)
class SparseLayer:
    """A product of activations with a stored weight.

    Attributes:
        node, op: its name and operator; weight: name of the stored weight; dtype: as it is stored.
        k, n: how many elements are summed over, and how many outputs there are.
        is_2_4: whether two of each four neighbours along K are zero.
        reason: why it cannot be sparse, or what speaks against it; empty where nothing does.
        kernel: `sparse` or `dense` as the engine has it; empty where the engine was not read back or does not name the
        node.
    """

    node: str
    op: str
    weight: str
    dtype: str
    k: int
    n: int
    is_2_4: bool
    reason: str
    kernel: str = ""


@dataclass(frozen=True)
class Sparsity:
    """The products of a graph, in graph order."""

    layers: tuple[SparseLayer, ...]

    @property
    def sparse(self) -> int:
        return sum(layer.is_2_4 for layer in self.layers)

    def __str__(self) -> str:
        dense = [layer.weight for layer in self.layers if not layer.is_2_4]
        more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
        names = f"; dense: {', '.join(dense[:3])}{more}" if dense and self.sparse else ""
        return f"{self.sparse} of {len(self.layers)} products have 2:4 weights{names}"

    def built(self, engine: Sequence[EngineLayer] | None) -> Sparsity:
        """With the kernels of the engine's layers."""
        took: dict[str, bool] = {}
        for layer in engine or ():
            for name in layer.origin:
                took[name] = took.get(name, False) or layer.sparse
        return Sparsity(
            tuple(
                replace(layer, kernel=("dense", "sparse")[took[layer.node]]) if layer.node in took else layer
                for layer in self.layers
            )
        )

    def as_json(self) -> dict[str, Any]:
        return {"sparse": self.sparse, "total": len(self.layers), "layers": [asdict(layer) for layer in self.layers]}


def check_sparsity(model: Model) -> Sparsity:
    """Read every weight of a matrix product once, a slab at a time."""
    read: dict[tuple[ir.Value, int], str] = {}
    found = []
    for product in weight_products(model):
        key = (product.weight, product.axis)
        if key not in read:
            read[key] = _obstacle(product.tensor, product.axis)
        shape = [int(size) for size in product.tensor.shape.numpy()]
        k = shape[product.axis]
        n = product.tensor.size // k if k else 0
        reason = read[key] or _doubt(product, k, n)
        found.append(
            SparseLayer(
                product.node.name or "",
                product.node.op_type,
                product.weight.name or "",
                product.tensor.dtype.name,
                k,
                n,
                not read[key],
                reason,
            )
        )
    return Sparsity(tuple(found))


def _obstacle(tensor: ir.TensorProtocol, axis: int) -> str:
    """Why a weight is not 2:4, or nothing."""
    k = int(tensor.shape.numpy()[axis])
    if tensor.dtype.bitwidth < 8:
        return "types below one byte are not looked into"
    if k % 4:
        return f"K is {k}, no multiple of 4"
    counted = count_2_4(tensor, axis)
    if not counted.groups:
        return f"type {tensor.dtype.name} is not looked into"
    return (
        ""
        if counted.is_2_4
        else f"{counted.groups - counted.sparse_groups} of {counted.groups} groups of four are dense"
    )


def _doubt(product: Product, k: int, n: int) -> str:
    """What users and NVIDIA's developers report of products that could be sparse."""
    if product.quantized:
        return "behind Q/DQ, where users saw no sparse kernel taken (NVIDIA/TensorRT issue 4694)"
    if min(k, n) < _LARGE:
        return f"K or N below {_LARGE}: a dense kernel is faster as a rule (NVIDIA/TensorRT issue 3849)"
    return ""
