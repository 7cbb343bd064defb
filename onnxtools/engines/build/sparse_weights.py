"""Which products could use 2:4 sparse kernels, which use one, and the reason where a product does not."""

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
"""Sparse kernels are faster if both K and N are larger than this (NVIDIA's developers, NVIDIA/TensorRT issue 3849)."""


@dataclass(frozen=True)
class SparseLayer:
    """A product of activations with a stored weight.

    Attributes:
        node: name of the node.
        op: its operator.
        weight: name of the stored weight.
        dtype: type of the stored weight.
        k: number of elements that are summed over.
        n: number of outputs.
        is_2_4: whether two of each four neighbours along K are zero.
        reason: why it cannot be sparse, or what makes a sparse kernel unlikely; empty if nothing does.
        kernel: `sparse` or `dense` as in the engine; empty if the engine was not read back or does not name the node.
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
        """Number of products with 2:4 weights."""
        return sum(layer.is_2_4 for layer in self.layers)

    def __str__(self) -> str:
        dense = [layer.weight for layer in self.layers if not layer.is_2_4]
        more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
        names = f"; dense: {', '.join(dense[:3])}{more}" if dense and self.sparse else ""
        return f"{self.sparse} of {len(self.layers)} products have 2:4 weights{names}"

    def built(self, engine: Sequence[EngineLayer] | None) -> Sparsity:
        """The same products with the kernels that the engine's layers name."""
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
        """The entry `sparsity` of the manifest."""
        return {"sparse": self.sparse, "total": len(self.layers), "layers": [asdict(layer) for layer in self.layers]}


def check_sparsity(model: Model) -> Sparsity:
    """The products of a graph and their 2:4 sparsity; each weight is read once, a slab at a time."""
    obstacles: dict[tuple[ir.Value, int], str] = {}
    layers = []
    for product in weight_products(model):
        key = (product.weight, product.axis)
        if key not in obstacles:
            obstacles[key] = _obstacle(product.tensor, product.axis)
        shape = [int(size) for size in product.tensor.shape.numpy()]
        k = shape[product.axis]
        n = product.tensor.size // k if k else 0
        reason = obstacles[key] or _doubt(product, k, n)
        layers.append(
            SparseLayer(
                product.node.name or "",
                product.node.op_type,
                product.weight.name or "",
                product.tensor.dtype.name,
                k,
                n,
                not obstacles[key],
                reason,
            )
        )
    return Sparsity(tuple(layers))


def _obstacle(tensor: ir.TensorProtocol, axis: int) -> str:
    """Why a weight is not 2:4, or '' if it is."""
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
    """Why a product that could be sparse may get no sparse kernel, as users and NVIDIA's developers report; or ''."""
    if product.quantized:
        return "behind Q/DQ, where users saw no sparse kernel taken (NVIDIA/TensorRT issue 4694)"
    if min(k, n) < _LARGE:
        return f"K or N below {_LARGE}: a dense kernel is faster as a rule (NVIDIA/TensorRT issue 3849)"
    return ""
