"""Cuts a graph where few values are alive, so that it can be run piece by piece.

A node is *heavy* when it looks up the token embedding, reads hidden states, is a product with a stored weight, or comes
after such a node. Every other node (masks, positions, shapes) is cheap and is computed again in each segment that needs
it. Between two segments only values of heavy nodes are passed on. The graph is cut wherever few floating-point values
are alive and a product came before: in a decoder after attention and after the MLP, where only the residual stream is
alive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxtools.analysis.cache import may_be_past
from onnxtools.analysis.facts import token_input
from onnxtools.analysis.products import Product, weight_products
from onnxtools.base.errors import JobError
from onnxtools.ir.model import Model
from onnxtools.ir.query import constant_tensor, is_op


@dataclass(frozen=True)
class Segment:
    """A run of nodes that is executed as one graph.

    Attributes:
        heavy: the heavy nodes of this segment alone, in graph order.
        nodes: these and the cheap nodes that they need, in graph order.
        received: values that earlier segments computed.
        kept: values of this or earlier segments that later segments need.
        products: the products with a stored weight among `heavy`.
    """

    heavy: tuple[ir.Node, ...]
    nodes: tuple[ir.Node, ...]
    received: tuple[ir.Value, ...]
    kept: tuple[ir.Value, ...]
    products: tuple[Product, ...]


def segments(model: Model) -> list[Segment]:
    """Returns the segments of the main graph, in order.

    Raises:
        JobError: the graph has no product with a stored weight, has functions or TransformerEngine's operators, or has
            a node with a graph inside.
    """
    if model.ir.functions or any(node.domain == "trt" for node in model.graph):
        raise JobError(f"{model.path}: has functions or TransformerEngine's operators; run `onnxtools convert` first")
    branching = next(
        (
            node
            for node in model.graph
            if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
        ),
        None,
    )
    if branching is not None:
        raise JobError(
            f"{model.path}: node {branching.name!r} ({branching.op_type}) has a graph inside, which calibration does "
            "not cut; inline one branch"
        )
    products = {product.node: product for product in weight_products(model)}
    heavy = _heavy(model, set(products))
    if not heavy:
        raise JobError(f"{model.path}: has no MatMul or Gemm with a stored weight, so there is nothing to calibrate")
    places = {node: index for index, node in enumerate(heavy)}
    last = {
        value: max(places[user] for user, _ in value.uses() if user in places)
        for node in heavy
        for value in node.outputs
        if _has_heavy_user(value, places)
    }
    pieces, start = [], 0
    for stop in _cuts(heavy, last, set(products)):
        part = heavy[start:stop]
        inputs = (value for node in part for value in node.inputs if value is not None)
        received = _unique(value for value in inputs if _place(value, places, start) < start)
        kept = tuple(value for node in heavy[:stop] for value in node.outputs if last.get(value, -1) >= stop)
        pieces.append(
            Segment(
                tuple(part),
                _with_cheap(part, places, model),
                received,
                kept,
                tuple(products[node] for node in part if node in products),
            )
        )
        start = stop
    return pieces


def _has_heavy_user(value: ir.Value, places: dict[ir.Node, int]) -> bool:
    return any(user in places for user, _ in value.uses())


def _heavy(model: Model, products: set[ir.Node]) -> list[ir.Node]:
    heavy: dict[ir.Node, None] = {}
    tokens = token_input(model)
    for node in model.graph:
        sources = [value for value in node.inputs if value is not None]
        embeds = (
            is_op(node, "Gather")
            and constant_tensor(sources[0]) is not None
            and tokens is not None
            and _through_casts(sources[1]) is tokens.value
        )
        if node in products or embeds or any(value.producer() in heavy or _is_hidden(value) for value in sources):
            heavy[node] = None
    return list(heavy)


def _through_casts(value: ir.Value) -> ir.Value:
    node = value.producer()
    return (
        value
        if node is None or not is_op(node, "Cast", "Identity") or node.inputs[0] is None
        else _through_casts(node.inputs[0])
    )


def _is_hidden(value: ir.Value) -> bool:
    """Whether `value` is a graph input of activations: floating-point, and neither a cache nor a mask."""
    name = (value.name or "").lower()
    return (
        value.is_graph_input()
        and value.dtype is not None
        and value.dtype.is_floating_point()
        and not may_be_past(name)
        and "mask" not in name
    )


def _cuts(heavy: list[ir.Node], last: dict[ir.Value, int], products: set[ir.Node]) -> list[int]:
    """Returns the ends of the segments, as indices into `heavy`.

    Few floating-point values are alive after each of them. The last one is the end of the graph.

    Args:
        heavy: the heavy nodes in graph order.
        last: by value, the index of its last heavy user.
        products: the products with a stored weight.
    """
    alive: set[ir.Value] = set()
    counts: list[int] = []
    places = {node: index for index, node in enumerate(heavy)}
    for index, node in enumerate(heavy):
        alive.update(value for value in node.outputs if last.get(value, -1) > index)
        alive = {value for value in alive if last[value] > index}
        # Products that share an input stay in one segment: they are quantized together.
        split = any(places[user] <= index for value in alive for user, _ in value.uses() if user in products)
        counts.append(_MOST_ALIVE + 1 if split else sum(not _is_integer(value) for value in alive))
    chosen = [len(heavy)]
    for limit in sorted({count for count in counts[:-1] if 0 < count <= _MOST_ALIVE}):
        cuts = _cuts_at(counts, limit, heavy, products)
        # Allow one more live value only if it makes the largest segment 8 times smaller: graphs with fused residual
        # norms always carry two.
        if _largest(cuts, heavy, products) * 8 <= _largest(chosen, heavy, products) or (
            chosen == [len(heavy)] and len(cuts) > 1
        ):
            chosen = cuts
    return chosen


_MOST_ALIVE = 4
"""Most floating-point values that may be alive at a cut."""


def _cuts_at(counts: list[int], limit: int, heavy: list[ir.Node], products: set[ir.Node]) -> list[int]:
    """Returns a cut wherever at most `limit` values are alive and both sides have a product."""
    cuts, has_product = [], False
    remaining = sum(node in products for node in heavy)
    for index, node in enumerate(heavy[:-1]):
        has_product, remaining = has_product or node in products, remaining - (node in products)
        if has_product and remaining and counts[index] <= limit:
            cuts.append(index + 1)
            has_product = False
    return [*cuts, len(heavy)]


def _largest(cuts: list[int], heavy: list[ir.Node], products: set[ir.Node]) -> int:
    """Returns the number of products in the largest segment."""
    return max(
        sum(node in products for node in heavy[start:stop]) for start, stop in zip([0, *cuts], cuts, strict=False)
    )


def _is_integer(value: ir.Value) -> bool:
    return is_op(value.producer(), "Shape", "Size") or (value.dtype is not None and not value.dtype.is_floating_point())


def _with_cheap(part: list[ir.Node], places: dict[ir.Node, int], model: Model) -> tuple[ir.Node, ...]:
    """Returns the nodes of `part` and the cheap nodes that they need, in graph order."""
    needed, todo = set(part), list(part)
    while todo:
        for value in todo.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer not in places and producer not in needed:
                needed.add(producer)
                todo.append(producer)
    return tuple(node for node in model.graph if node in needed)


def _place(value: ir.Value, places: Mapping[ir.Node, int], otherwise: int) -> int:
    """Returns the place of the node that computes `value`, or `otherwise`."""
    node = value.producer()
    return otherwise if node is None else places.get(node, otherwise)


def _unique(values: Iterable[ir.Value]) -> tuple[ir.Value, ...]:
    return tuple(dict.fromkeys(values))


def outer_inputs(segment: Segment) -> tuple[list[ir.Value], list[ir.Value]]:
    """Returns the graph inputs and the constants that the nodes of `segment` read."""
    inner = {value for node in segment.nodes for value in node.outputs} | set(segment.received)
    others = _unique(
        value for node in segment.nodes for value in node.inputs if value is not None and value not in inner
    )
    inputs = [value for value in others if value.is_graph_input()]
    constants = [value for value in others if not value.is_graph_input() and constant_tensor(value) is not None]
    return inputs, constants
