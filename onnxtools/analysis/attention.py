"""Finds attention in a graph by its structure: a Softmax between two matrix products. Names play no part.

For each block this module follows the reshapes and transposes of the exporter back to the point where queries, keys
and values still have separate batch, sequence, head and channel axes. It also lists the operators between the two
products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxtools.analysis.axes import LAYOUT_OPS, Atom, Layout, LayoutError, follow, leaves, regroup, start
from onnxtools.analysis.facts import Facts
from onnxtools.base.errors import JobError
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, is_op

_UNARY = {"Cast", "Identity", "QuantizeLinear", "DequantizeLinear", "Tanh", "Clip", "Dropout", "Relu", "Sigmoid"}
_BINARY = {"Mul", "Div", "Add", "Sub", "Where", "Max", "Min"}
_AFTER_SOFTMAX = {
    "Cast", "Identity", "QuantizeLinear", "DequantizeLinear", "Dropout", "Reshape", "Transpose", "Mul", "Where",
    "Unsqueeze", "Squeeze", "Slice",
}  # fmt: skip
"""A Slice takes the attention sinks off."""


@dataclass
class Operand:
    """Queries, keys or values of one block.

    Attributes:
        value: the value at the cut: batch and sequence have axes of their own, and heads are not yet repeated.
        layout: atoms of each axis of `value`.
        batch, sequence: their atoms.
        heads, channels: the atoms that make up the head and the channel axis.
        replay: elementwise nodes between the cut and the matrix product, in order, each with the index of its data
            input.
        repeat: copies of each head after the cut (grouped queries).
        repeat_first: copies lie outside the heads (0,1,0,1) instead of inside (0,0,1,1).
    """

    value: ir.Value
    layout: Layout
    batch: Atom
    sequence: Atom
    heads: list[Atom]
    channels: list[Atom]
    replay: list[tuple[ir.Node, int]]
    repeat: int = 1
    repeat_first: bool = False

    @property
    def head_count(self) -> int:
        """Heads at the cut, before they are repeated."""
        return math.prod(atom.size for atom in self.heads)

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return math.prod(atom.size for atom in self.channels)


@dataclass
class Attention:
    """One attention block: its operands, and the operators from scores to probabilities to output.

    Attributes:
        softmax: the Softmax.
        product_qk: the MatMul of queries and keys.
        product_pv: the MatMul of probabilities and values.
        query, key, value: its operands.
        scores: nodes from `product_qk` to the Softmax, each with the index of its data input.
        probabilities: nodes from the Softmax to `product_pv`, each with the index of its data input.
        output: the last value after `product_pv` that is only a rearrangement of it.
        output_layout: atoms of each axis of `output`.
    """

    softmax: ir.Node
    product_qk: ir.Node
    product_pv: ir.Node
    query: Operand
    key: Operand
    value: Operand
    scores: list[tuple[ir.Node, int]]
    probabilities: list[tuple[ir.Node, int]]
    output: ir.Value = field(init=False)
    output_layout: Layout = field(init=False)


def find_attention(model: Model, facts: Facts) -> list[Attention]:
    """Returns all attention blocks of the main graph, in graph order.

    Args:
        model: the model.
        facts: its facts (`analyse`).

    Raises:
        JobError: a Softmax feeds a matrix product of activations, but the block cannot be traced. The message names the
            Softmax and the reason.
    """
    blocks: list[Attention] = []
    for node in model.graph:
        if is_op(node, "Softmax") and _over_last_axis(node, facts):
            block = _block(node, facts)
            if block is not None:
                blocks.append(block)
    return blocks


def _over_last_axis(node: ir.Node, facts: Facts) -> bool:
    return _is_last(attribute(node, "axis", -1), facts[node.inputs[0]].shape)


def _is_last(axis: int, shape: tuple[int, ...] | None) -> bool:
    return axis == -1 or shape is None or axis == len(shape) - 1


def _block(softmax: ir.Node, facts: Facts) -> Attention | None:
    down = _down_to_product(softmax.outputs[0], facts)
    if down is None:
        return None
    product_pv, probabilities = down
    up = _up_to_product(softmax.inputs[0], facts)
    if up is None and not _between_tokens(softmax, facts):
        return None  # a router over experts, not over tokens
    if up is None:
        raise JobError(
            f"node {softmax.name!r} (Softmax) feeds the product {product_pv.name!r}, but no query-key MatMul was found "
            "before it; is it an Einsum?"
        )
    product_qk, scores = up
    try:
        query = _operand(product_qk.inputs[0], facts, sequence_axis=-2)
        key = _operand(product_qk.inputs[1], facts, sequence_axis=-1)
        value = _operand(product_pv.inputs[1], facts, sequence_axis=-2)
        _share_heads(query, key, value)
        block = Attention(softmax, product_qk, product_pv, query, key, value, scores, probabilities)
        block.output, block.output_layout = _output(product_pv, query, value, facts)
    except LayoutError as error:
        raise JobError(
            f"attention at node {softmax.name!r} (Softmax): {error}; export the model with plain MatMul-Softmax-MatMul "
            "attention"
        ) from None
    return block


def _between_tokens(softmax: ir.Node, facts: Facts) -> bool:
    """Whether the normalized axis has the size of a dynamic dimension: it then runs over keys, not experts."""
    shape = facts[softmax.inputs[0]].shape
    return shape is None or not facts.dims or shape[-1] in facts.dims.values()


def _is_activation(value: ir.Value | None, facts: Facts) -> bool:
    return (
        value is not None
        and not value.is_initializer()
        and facts[value].value is None
        and len(facts[value].shape or ()) >= 3
    )


def _is_product(node: ir.Node | None, facts: Facts) -> bool:
    return node is not None and is_op(node, "MatMul") and all(_is_activation(v, facts) for v in node.inputs)


_Path = tuple[ir.Node, list[tuple[ir.Node, int]]]


def _up_to_product(value: ir.Value | None, facts: Facts) -> _Path | None:
    """Returns the query-key product above `value`, and the nodes from it down to `value`, each with its data input.

    Each value is visited once: `Add(x, x)` has two paths up, and a chain of them exponentially many.
    """
    steps: list[tuple[ir.Value, list[tuple[ir.Node, int]]]] = [(value, [])] if value is not None else []
    seen: set[ir.Value] = set()
    while steps:
        current, below = steps.pop()
        node = current.producer()
        if current in seen or node is None or facts[current].value is not None:
            continue
        seen.add(current)
        if _is_product(node, facts):
            return node, below
        if node.op_type in _UNARY | {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand"}:
            candidates = [0]
        elif node.op_type in _BINARY:
            candidates = [1, 2] if node.op_type == "Where" else list(range(len(node.inputs)))
        elif node.op_type == "Concat" and _is_last(attribute(node, "axis"), facts[node.outputs[0]].shape):
            candidates = [0]  # attention sinks stand beside the keys
        else:
            continue
        for index in reversed(candidates):
            source = node.inputs[index]
            if source is not None:
                steps.append((source, [(node, index), *below]))
    return None


def _down_to_product(value: ir.Value, facts: Facts) -> _Path | None:
    """Returns the probability-value product below `value` and the nodes between, each with its data input."""
    steps: list[tuple[ir.Value, list[tuple[ir.Node, int]]]] = [(value, [])]
    seen: set[ir.Value] = set()
    while steps:
        current, above = steps.pop()
        if current in seen:
            continue
        seen.add(current)
        uses = [(user, index) for user, index in current.uses()]
        for user, index in uses:
            if is_op(user, "MatMul") and index == 0 and _is_product(user, facts):
                return user, above
        for user, index in reversed(uses):
            if user.op_type in _AFTER_SOFTMAX and user.domain == "" and user.outputs:
                steps.append((user.outputs[0], [*above, (user, index)]))
    return None


def _climb(value: ir.Value, facts: Facts) -> list[tuple[ir.Node, int]]:
    """Returns the layout and elementwise nodes above `value` whose other inputs are constants, first to last."""
    chain: list[tuple[ir.Node, int]] = []
    while True:
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return chain
        if node.op_type in LAYOUT_OPS:
            index = 0
            if node.op_type == "Gather" and (
                facts[node.inputs[1]].value is None or facts[node.outputs[0]].shape is None
            ):
                return chain
        elif node.op_type in _UNARY | {"Mul", "Div"}:
            unknown = [i for i, v in enumerate(node.inputs) if v is not None and facts[v].value is None]
            sides = [facts[v].value for i, v in enumerate(node.inputs) if v is not None and i not in unknown]
            if len(unknown) != 1 or any(s is None or s.size != 1 for s in sides):
                return chain
            index = unknown[0]
        else:
            return chain
        source = node.inputs[index]
        if source is None or facts[source].shape is None:
            return chain
        chain.insert(0, (node, index))
        value = source


def _layouts(value: ir.Value, facts: Facts) -> Iterator[tuple[ir.Value, list[tuple[ir.Node, int]], list[Layout]]]:
    """Yields start points above `value`: (source, nodes down to `value`, layout before each node and at the end)."""
    chain = _climb(value, facts)
    for skip in range(len(chain) + 1):
        source = chain[skip][0].inputs[chain[skip][1]] if skip < len(chain) else value
        assert source is not None
        shape = facts[source].shape
        if shape is None:
            continue
        layouts = [start(shape)]
        try:
            for node, _ in chain[skip:]:
                layouts.append(follow(layouts[-1], node, facts) if node.op_type in LAYOUT_OPS else layouts[-1])
        except LayoutError:
            continue
        yield source, chain[skip:], layouts


def _operand(value: ir.Value | None, facts: Facts, sequence_axis: int) -> Operand:
    """Trace one input of a product back to the value whose axes are separate."""
    assert value is not None
    channel_axis = -1 if sequence_axis == -2 else -2
    for source, nodes, layouts in _layouts(value, facts):
        final = layouts[-1]
        sequence = leaves(final[sequence_axis])
        channels = leaves(final[channel_axis])
        lead = [leaf for axis in final[:-2] for leaf in leaves(axis)]
        if len(sequence) != 1 or sequence[0].repeat or any(c.repeat for c in channels) or not lead or lead[0].repeat:
            continue
        batch, rest = lead[0], lead[1:]
        heads = [leaf for leaf in rest if not leaf.repeat]
        copies = [leaf for leaf in rest if leaf.repeat]
        cut = _cut(source, nodes, layouts, batch, sequence[0])
        if cut is None:
            continue
        origin, layout, below = cut
        return Operand(
            origin, layout, batch, sequence[0], heads, channels,
            [(n, i) for n, i in below if n.op_type not in LAYOUT_OPS],
            math.prod(c.size for c in copies), bool(copies) and rest.index(copies[0]) < len(heads) and rest[0].repeat,
        )  # fmt: skip
    raise LayoutError(f"the axes of {value.name!r} cannot be told apart")


def _cut(
    source: ir.Value, nodes: list[tuple[ir.Node, int]], layouts: list[Layout], batch: Atom, sequence: Atom
) -> tuple[ir.Value, Layout, list[tuple[ir.Node, int]]] | None:
    """Returns the first value on the way down with separate batch and sequence axes and no repetition before it."""
    value = source
    for position, layout in enumerate(layouts):
        axes = [leaves(axis) for axis in layout]
        if any(leaf.repeat for axis in axes for leaf in axis):
            return None
        if [batch] in axes and [sequence] in axes:
            return value, layout, nodes[position:]
        if position < len(nodes):
            value = nodes[position][0].outputs[0]
    return None


def _share_heads(query: Operand, key: Operand, value: Operand) -> None:
    """Handle grouped queries without a repetition: the product broadcasts [b, g, r, ...] against [b, g, 1, ...]."""
    for operand in (key, value):
        total = operand.head_count * operand.repeat
        if total == query.head_count:
            continue
        if total == 0 or query.head_count % total:
            raise LayoutError(f"{query.head_count} query heads do not divide into {total} key heads")
        groups = [atom.size for atom in query.heads]
        operand.repeat *= query.head_count // total
        operand.repeat_first = len(groups) > 1 and groups[0] != operand.head_count and groups[-1] == operand.head_count


def _output(product: ir.Node, query: Operand, value: Operand, facts: Facts) -> tuple[ir.Value, Layout]:
    """Returns the last value after the product that is only a rearrangement of it, and its layout.

    The layout consists of (batch, head, sequence, channel) atoms.
    """
    current = product.outputs[0]
    shape = facts[current].shape
    if shape is None:
        raise LayoutError(f"the shape of {current.name!r} is unknown")
    layout: Layout = _product_layout(shape, query, value)
    while True:
        users = [(node, index) for node, index in current.uses()]
        if (
            current.is_graph_output()
            or len(users) != 1
            or users[0][1] != 0
            or users[0][0].op_type not in ("Reshape", "Transpose", "Identity", "Flatten")
        ):
            return current, layout
        node = users[0][0]
        try:
            layout = follow(layout, node, facts)
        except LayoutError:
            return current, layout
        current = node.outputs[0]


def _product_layout(shape: tuple[int, ...], query: Operand, value: Operand) -> Layout:
    pieces: Layout = [[query.batch], [*query.heads], [query.sequence], [*value.channels]]
    return regroup(pieces, shape)
