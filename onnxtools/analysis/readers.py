"""The readers of a stored weight: one weight may have several products and other readers.

A pass may change a stored weight in place only if all its readers need the change. `own_weights` gives a product that
shares its weight an initializer of its own, and copies of the nodes between. The bytes are shared until a pass changes
them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxtools.analysis.products import Product
from onnxtools.ir.edit import Builder
from onnxtools.ir.model import Model
from onnxtools.ir.query import attributes_of, constant_tensor, is_op

_PASSED_ON = {
    "Cast", "CastLike", "Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "QuantizeLinear",
    "DequantizeLinear",
    "TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear",
}  # fmt: skip
"""Operators whose output is still the weight in their first input."""


@dataclass(frozen=True)
class Reader:
    """A use of a weight.

    Attributes:
        node: the reading node; None if the weight, possibly through such operators, is an output of the graph.
        index: the index of the node's input; 0 for a graph output.
        value: the value that the node reads.
    """

    node: ir.Node | None
    index: int
    value: ir.Value


def readers(weight: ir.Value) -> list[Reader]:
    """Returns all readers of `weight`, through casts, transpositions, reshapes and Q/DQ, in subgraphs too."""
    uses: list[Reader] = []
    waiting, seen = [weight], {weight}
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            uses.append(Reader(None, 0, value))
        for node, index in value.uses():
            if index == 0 and node.op_type in _PASSED_ON and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                waiting.append(node.outputs[0])
            elif not (index == 0 and node.op_type in _PASSED_ON):
                uses.append(Reader(node, index, value))
    return uses


def stored_weight(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Returns the stored tensor behind `value`, through casts, transpositions, reshapes and Q/DQ; None if computed."""
    while value is not None:
        if (tensor := constant_tensor(value)) is not None:
            return tensor
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _PASSED_ON and node.inputs else None
    return None


_LOOKS_UP = ("Gather", "GatherElements", "GatherND")


def is_embedding(weight: ir.Value) -> bool:
    """Whether the weight is also a table that a Gather looks up, possibly through casts, reshapes and Q/DQ."""
    return any(reader.index == 0 and is_op(reader.node, *_LOOKS_UP) for reader in readers(weight))


def is_read_by_alone(weight: ir.Value, nodes: Iterable[ir.Node]) -> bool:
    """Whether each of `nodes` reads `weight` once, and no other node does."""
    expected = list(nodes)
    reading = [reader.node for reader in readers(weight)]
    return len(reading) == len(expected) and set(reading) == set(expected)


def own_weights(model: Model, products: Sequence[Product]) -> list[Product]:
    """Make each product the only reader of its weight, and return the products in the given order.

    A product that shares its weight gets an initializer, and a path, of its own. If only `products` read a weight, the
    first of them keeps it.
    """
    sharing: dict[ir.Value, list[Product]] = {}
    for product in products:
        sharing.setdefault(product.weight, []).append(product)
    build = Builder(model)
    by_node: dict[ir.Node, Product] = {}
    for weight, group in sharing.items():
        alone = is_read_by_alone(weight, [product.node for product in group])
        for index, product in enumerate(group):
            by_node[product.node] = product if alone and index == 0 else _with_own_weight(build, product)
    return [by_node[product.node] for product in products]


def _with_own_weight(build: Builder, product: Product) -> Product:
    """Move the product to a copy of its weight and of the nodes between, and return it."""
    old, tensor = product.weight, product.tensor
    value = build.initializer(copy.copy(tensor), f"{old.name}_of_{product.node.name}")
    value.metadata_props.update(old.metadata_props)
    weight, path = value, list[ir.Node]()
    build.before = product.node
    for node in reversed(product.path):  # from the weight to the product
        output = build.op(
            node.op_type,
            [value, *node.inputs[1:]],
            f"{node.name}_of_{product.node.name}",
            domain=node.domain,
            **attributes_of(node),
        )
        output.type, output.shape = node.outputs[0].type, node.outputs[0].shape
        producer = output.producer()
        assert producer is not None
        path.insert(0, producer)
        value = output
    product.node.replace_input_with(product.index, value)
    return replace(product, weight=weight, path=tuple(path))
