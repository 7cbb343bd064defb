"""Where a factor for each channel of an activation can be folded, so that the graph gains no node.

Dividing the activation by s and multiplying the weights behind it by s changes nothing (SmoothQuant, arXiv 2211.10438,
equation 3). The division goes into the node that makes the activation: the gain and bias of a norm, or the rows of the
product before. Operators that let a factor pass may lie between: an elementwise product, ReLU, reshapes, and attention
for its values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts
from onnxtools.analysis.products import Product
from onnxtools.analysis.readers import is_read_by_alone
from onnxtools.ir.query import attribute, constant_tensor, is_op
from onnxtools.numerics.formats import scaled

Array = np.ndarray[Any, Any]

_NORMS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}
"""Indices of the inputs that hold a norm's gain and bias."""


@dataclass(frozen=True)
class Fold:
    """Weights that take the division.

    Attributes:
        places: initializers and the axis of each that runs along the producer's channels.
        kind: `norm` or `product`.
        channels: index of the producer's channel for each channel of the activation; None where they are the same.
            Channels that share a channel of the producer (grouped-query attention) must have one factor.
        weight: the weight of the product; None for a norm.
    """

    places: tuple[tuple[ir.Value, int], ...]
    kind: str
    channels: tuple[int, ...] | None = None
    weight: ir.Value | None = None

    def tied(self, factors: Array) -> Array:
        """`factors` [channels], with their geometric mean where several channels must share a factor."""
        if self.channels is None:
            return factors
        index = np.array(self.channels)
        logs = np.bincount(index, np.log(factors)) / np.bincount(index)
        return np.asarray(np.exp(logs)[index])

    def producers(self, factors: Array) -> Array:
        """`factors` [channels of the activation] as [channels of the producer]."""
        if self.channels is None:
            return factors
        by_producer = np.ones(max(self.channels) + 1)
        by_producer[np.array(self.channels)] = factors
        return by_producer

    def apply(self, factors: Array) -> None:
        """Divide the weights of the fold by `factors` [channels of the activation]."""
        divisors = self.producers(factors)
        for value, axis in self.places:
            tensor = constant_tensor(value)
            assert tensor is not None
            value.const_value = scaled(tensor, 1 / divisors, axis)


def _has_one_use(value: ir.Value) -> bool:
    """Whether the value is an initializer with a single reader, so that it can be changed."""
    return (
        value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output() and not value.is_graph_input()
    )


class Folder:
    """Finds folds in one graph; `facts` hold the shapes, `products` are its products with stored weights."""

    def __init__(self, facts: Facts, products: Iterable[Product]) -> None:
        self._facts = facts
        self._products = {product.node: product for product in products}

    def find(self, value: ir.Value, users: Sequence[ir.Node]) -> Fold | None:
        """The fold that divides the last axis of `value`, which only `users` read; None where there is none."""
        shape = self._facts[value].shape
        return self._walk(value, set(users), shape[-1]) if shape else None

    def _walk(self, value: ir.Value | None, users: set[ir.Node], size: int) -> Fold | None:
        node = value.producer() if value is not None else None
        if (
            value is None
            or node is None
            or value.is_graph_output()
            or any(user not in users and not is_op(user, "Shape", "Size") for user, _ in value.uses())
        ):
            return None
        if node in self._products:
            product = self._products[node]
            fold = self._of_product(product)  # one channel may be broadcast to `size` behind it
            return fold if fold is not None and int(product.tensor.shape.numpy()[1 - product.axis]) == size else None
        if node.op_type in _NORMS and value is node.outputs[0]:
            return self._of_constants(
                [node.inputs[i] for i in _NORMS[node.op_type] if i < len(node.inputs) and node.inputs[i] is not None],
                size,
            )
        if is_op(node, "Cast", "Identity", "Relu"):
            return self._walk(node.inputs[0], {node}, size)
        if is_op(node, "Reshape"):
            before = self._facts[node.inputs[0]].shape
            if before and before[-1] == size:
                return self._walk(node.inputs[0], {node}, size)
            return self._of_context(node, size)
        if is_op(node, "Add"):
            return self._of_sum(node, size)
        if is_op(node, "Mul"):
            return self._of_elementwise_product(node, size)
        if is_op(node, "GroupQueryAttention", domain="com.microsoft") and value is node.outputs[0]:
            return self._of_values(node, node.inputs[2], size)
        return None

    def _of_constants(self, values: Sequence[ir.Value | None], size: int) -> Fold | None:
        places = []
        for value in values:
            tensor = constant_tensor(value)
            if value is None or tensor is None or not _has_one_use(value) or tuple(tensor.shape.numpy()) != (size,):
                return None
            places.append((value, 0))
        return Fold(tuple(places), "norm") if places else None

    def _of_product(self, product: Product) -> Fold | None:
        """The fold into the rows of the weight and the bias of a Gemm."""
        if (
            not is_read_by_alone(product.weight, [product.node])
            or len(product.tensor.shape) != 2
            or product.quantized
            or product.obstacle
        ):
            return None
        bias = product.node.inputs[2] if is_op(product.node, "Gemm") and len(product.node.inputs) > 2 else None
        places = [(product.weight, 1 - product.axis)]
        if bias is not None:
            tensor = constant_tensor(bias)
            if (
                tensor is None
                or not _has_one_use(bias)
                or tensor.size != product.tensor.shape.numpy()[1 - product.axis]
            ):
                return None
            places.append((bias, len(tensor.shape) - 1))
        return Fold(tuple(places), "product", weight=product.weight)

    def _of_sum(self, node: ir.Node, size: int) -> Fold | None:
        """The fold of a bias behind a norm or a product: both take the factor."""
        for bias_index, data_index in ((0, 1), (1, 0)):
            bias = self._of_constants([node.inputs[bias_index]], size)
            fold = self._walk(node.inputs[data_index], {node}, size) if bias is not None else None
            if bias is not None and fold is not None:
                return Fold((*bias.places, *fold.places), fold.kind, fold.channels, fold.weight)
        return None

    def _of_elementwise_product(self, node: ir.Node, size: int) -> Fold | None:
        """The fold into a gain, or in a gated MLP into the branch without the activation function."""
        if node.inputs[0] is node.inputs[1]:
            return None  # a square (squared ReLU) would take the factor twice
        for value in node.inputs:
            gain = self._of_constants([value], size)
            if gain is not None:
                return gain
        return next(
            (fold for fold in (self._walk(value, {node}, size) for value in node.inputs) if fold is not None), None
        )

    def _of_context(self, node: ir.Node, size: int) -> Fold | None:
        """The fold into the projection of the values, behind a Reshape that flattens [..., heads, head_dim]."""
        inner = node.inputs[0]
        transpose = inner.producer() if inner is not None else None
        if (
            not is_op(transpose, "Transpose")
            or transpose is None
            or list(attribute(transpose, "perm", ())) != [0, 2, 1, 3]
            or len(transpose.outputs[0].uses()) != 1
        ):
            return None
        attention = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
        if not is_op(attention, "Attention") or attention is None or len(attention.outputs[0].uses()) != 1:
            return None
        return self._of_values(attention, attention.inputs[2], size)

    def _of_values(self, attention: ir.Node, value: ir.Value | None, size: int) -> Fold | None:
        """The fold into the product that makes the values of `attention`, through its cache."""
        reader = attention
        while value is not None:
            node = value.producer()
            if node is None:
                return None
            if is_op(node, "Concat", "TensorScatter"):  # the cache holds divided values from then on
                step = node.inputs[1]
            elif is_op(node, "Transpose", "Reshape"):
                if len(value.uses()) != 1:
                    return None
                step = node.inputs[0]
            elif node in self._products:
                fold = (
                    self._of_product(self._products[node]) if all(user is reader for user, _ in value.uses()) else None
                )
                return self._shared(fold, size)
            else:
                return None
            reader, value = node, step
        return None

    def _shared(self, fold: Fold | None, size: int) -> Fold | None:
        """`fold`, with `channels` for value heads that several query heads read."""
        if fold is None:
            return None
        value, axis = next((value, axis) for value, axis in fold.places if value is fold.weight)
        tensor = constant_tensor(value)
        assert tensor is not None
        value_channels = int(tensor.shape.numpy()[axis])
        head = self._head_dim(fold, size, value_channels)
        if head is None:
            return None
        repeat = size // value_channels
        channels = tuple((channel // head // repeat) * head + channel % head for channel in range(size))
        return Fold(fold.places, fold.kind, channels if repeat > 1 else None, fold.weight)

    def _head_dim(self, fold: Fold, size: int, value_channels: int) -> int | None:
        """Channels of one head, from the reshapes behind the product; None where they do not show it."""
        product = next(p for p in self._products.values() if p.weight is fold.weight)
        if size == value_channels:
            return value_channels
        value: ir.Value | None = product.node.outputs[0]
        for _ in range(3):
            shape = self._facts[value].shape
            if shape is not None and len(shape) == 4 and value_channels % shape[-1] == 0 and size % value_channels == 0:
                return int(shape[-1])
            uses = list(value.uses()) if value is not None else []
            value = uses[0][0].outputs[0] if uses else None
        return None
