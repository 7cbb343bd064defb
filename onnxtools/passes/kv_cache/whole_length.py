"""Values of masks, computed for past and new tokens together."""

from __future__ import annotations

import onnx_ir as ir

from onnxtools.analysis.facts import Facts
from onnxtools.analysis.mask_rules import MaskRules
from onnxtools.analysis.masks import MaskError
from onnxtools.ir.edit import Builder
from onnxtools.ir.query import attributes_of, constant_tensor, graphs_inside


class WholeLength:
    """Copies the nodes above a value, with the total length wherever they read the sequence length.

    A mask depends on positions and padding alone, so the copy holds what a full run would, and the last rows of it are
    those of the new tokens.

    Args:
        facts: facts of the model.
        rules: tells which inputs mark padding.
        builder: inserts the copies.
        past: cache length before this step, an int64 scalar of the graph.
        total: cache length after this step, an int64 scalar of the graph.

    Attributes:
        inputs: names of the mask inputs that now span the total length.
        pairs: those of them that have an entry for each pair of tokens.
        square: values that are computed for all pairs of tokens.
    """

    def __init__(self, facts: Facts, rules: MaskRules, builder: Builder, past: ir.Value, total: ir.Value) -> None:
        self.facts, self.rules, self.builder = facts, rules, builder
        self.past, self.total = past, total
        self.inputs: set[str] = set()
        self.pairs: set[str] = set()
        self.square = 0
        self._copies: dict[ir.Value, ir.Value] = {}
        self._lengths: dict[str, ir.Value] = {}

    def value(self, value: ir.Value) -> ir.Value:
        """`value` [..., sequence] as [..., total]; of an axis of queries before it, the rows of the new tokens.

        Raises:
            MaskError: it depends on more than sizes and padding, or the export is static.
        """
        shape = self.facts[value].shape or ()
        if value.is_graph_input() and self._is_mask(value):
            return self.grow_input(value)
        if not self.rules.is_same_for_longer(value):
            raise MaskError("changes with the length of the text, so that earlier tokens depend on later ones")
        for source in self.rules.views.sources(value):
            if not self._is_mask(source):
                raise MaskError(f"depends on the input {source.name!r}")
        if self.rules.size in shape[:-2]:
            raise MaskError(f"has the shape {list(shape)}, which is no mask of keys")
        whole = self._copy(value)
        if shape[-2:-1] != (self.rules.size,):
            return whole
        self.square += 1
        rows = self.builder.constant([-2], "row_axis")
        return self.builder.op(
            "Slice", [whole, self._length("past"), self._length("total"), rows], "/model/mask/new_rows"
        )

    def _is_mask(self, value: ir.Value) -> bool:
        """Whether a graph input marks padding, or has an entry for each pair of tokens."""
        shape = self.facts[value].shape or ()
        return self.rules.views.is_padding(value) or (len(shape) > 2 and shape[-1] == self.rules.size)

    def grow_input(self, value: ir.Value) -> ir.Value:
        """Make the last axis of a mask input the total length, and return the input."""
        shape = list(value.shape or ())
        shape[-1] = ir.SymbolicDim("total_sequence")
        value.shape = ir.Shape(shape)
        self.inputs.add(value.name or "")
        if len(shape) > 2 and shape[-2] != 1:
            self.pairs.add(value.name or "")
        return value

    def _length(self, name: str) -> ir.Value:
        """The length `past` or `total`, int64 [1]."""
        if name not in self._lengths:
            scalar = self.past if name == "past" else self.total
            axes = self.builder.constant([0], "axes_0")
            self._lengths[name] = self.builder.op("Unsqueeze", [scalar, axes], f"/model/mask/{name}")
        return self._lengths[name]

    def _copy(self, value: ir.Value) -> ir.Value:
        if value in self._copies:
            return self._copies[value]
        node = value.producer()
        if constant_tensor(value) is not None:
            self._refuse_static(value)
            return value
        if value.is_graph_input():
            if not self.rules.views.is_padding(value):
                raise MaskError(f"rearranges the input {value.name!r}, which has an entry for each pair of tokens"
                                if self._is_mask(value) else f"depends on the input {value.name!r}")  # fmt: skip
            return self.grow_input(value)
        if node is None or any(graphs_inside(node)):
            raise MaskError(f"comes from {value.name!r}, which has graphs inside" if node else "has no source")
        if node.op_type == "Shape":
            self._copies[value] = self._sizes(node)
            return self._copies[value]
        copies = self.builder.ops(
            node.op_type, [None if v is None else self._copy(v) for v in node.inputs],
            f"/model/mask/{node.op_type}", outputs=len(node.outputs), domain=node.domain, **attributes_of(node),
        )  # fmt: skip
        self._copies.update(zip(node.outputs, copies, strict=True))
        return self._copies[value]

    def _refuse_static(self, value: ir.Value) -> None:
        """Refuse sizes and tables of a static export, which hold its sequence length.

        Raises:
            MaskError: it names the constant.
        """
        fact = self.facts[value]
        whole = fact.value is not None and fact.value.dtype.kind == "i" and (fact.value == self.rules.size).any()
        if not self.facts.dims and (whole or self.rules.size in (fact.shape or ())):
            raise MaskError(f"is computed from {value.name!r}, which holds the static length {self.rules.size}")

    def _sizes(self, node: ir.Node) -> ir.Value:
        """The output of a Shape, with the total length in place of the sequence length."""
        sizes = self.facts[node.inputs[0]].shape
        if sizes is None:
            raise MaskError(f"reads a size by node {node.name!r} (Shape) that is unknown")
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(sizes))
        parts = [self._size(size) for size in sizes[start:end]]
        return parts[0] if len(parts) == 1 else self.builder.op("Concat", parts, "/model/mask/shape", axis=0)

    def _size(self, size: int) -> ir.Value:
        """A size, int64 [1]; its factors of batch and sequence, whose stand-ins are primes, are computed."""
        tokens, build = self.rules.tokens, self.builder
        shape = self.facts[tokens.value].shape
        factors = []
        if size and size % self.rules.size == 0:
            factors.append(self._length("total"))
            size //= self.rules.size
        if size and shape is not None and self.facts.dims and size % shape[tokens.batch_axis] == 0:
            axis = tokens.batch_axis
            factors.append(build.op("Shape", [tokens.value], "/model/mask/batch", start=axis, end=axis + 1))
            size //= shape[axis]
        if size != 1 or not factors:
            factors.append(build.constant([size], "size"))
        product = factors[0]
        for factor in factors[1:]:
            product = build.op("Mul", [product, factor], "/model/mask/size")
        return product
