"""Mixtures of experts in the form that `export` writes: each expert gathers the rows of the tokens that chose it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxtools.ir.query import is_op


@dataclass(frozen=True)
class Mixture:
    """One mixture of experts.

    Attributes:
        hidden: the tokens, [tokens, hidden].
        chosen: the experts of each token, int64 [tokens, top_k].
        weights: their weights, [tokens, 1, top_k], in the type of `hidden`.
        rows: for each expert, the rows of its tokens, [n, hidden].
        results: for each expert, its results for them, [n, hidden].
        output: the weighted sums, [tokens, 1, hidden].
    """

    hidden: ir.Value
    chosen: ir.Value
    weights: ir.Value
    rows: list[ir.Value]
    results: list[ir.Value]
    output: ir.Value


def mixtures(graph: ir.Graph) -> Iterator[Mixture]:
    """The mixtures of experts of a graph."""
    for node in graph:
        if is_op(node, "ScatterElements") and node.inputs[0] is node.inputs[1]:
            found = _mixture(node)
            if found is not None:
                yield found


def _mixture(inverse: ir.Node) -> Mixture | None:
    """The mixture whose results `inverse` brings back into the order of the choices."""
    places = _made(inverse.inputs[0], "Concat")
    back = _read(inverse.outputs[0], "Gather")
    results = _made(back.inputs[0], "Concat") if back is not None else None
    of_token = _read(back.outputs[0], "Reshape") if back is not None else None
    summed = _read(of_token.outputs[0], "MatMul") if of_token is not None else None
    if places is None or results is None or summed is None or len(places.inputs) != len(results.inputs):
        return None
    weights = summed.inputs[0]
    experts = [_expert(place) for place in places.inputs]
    if weights is None or any(expert is None for expert in experts):
        return None
    found = [expert for expert in experts if expert is not None]
    hidden, chosen = found[0][0], found[0][1]
    if any(expert[0] is not hidden or expert[1] is not chosen for expert in found):
        return None
    made = [result for result in results.inputs if result is not None]
    return Mixture(hidden, chosen, weights, [expert[2] for expert in found], made, summed.outputs[0])


def _expert(place: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(all tokens, the experts of each token, the rows of the expert) of the expert whose choices are at `place`."""
    flat = _made(place, "Reshape")
    hits = _made(flat.inputs[0], "NonZero") if flat is not None else None
    hit = _made(hits.inputs[0], "Equal") if hits is not None else None
    choices = _made(hit.inputs[0], "Reshape") if hit is not None else None
    token = next((use.node for use in place.uses() if is_op(use.node, "Div")), None) if place is not None else None
    rows = _read(token.outputs[0], "Gather") if token is not None else None
    if choices is None or rows is None or choices.inputs[0] is None or rows.inputs[0] is None:
        return None
    return rows.inputs[0], choices.inputs[0], rows.outputs[0]


def _made(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and is_op(node, op_type) else None


def _read(value: ir.Value, op_type: str) -> ir.Node | None:
    """The only reader of `value`, if it is of this type."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and is_op(uses[0].node, op_type) else None
