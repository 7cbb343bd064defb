"""Which products a pass works on: selected by name; the language-model head only on request."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from onnxtools.analysis.products import Product, weight_products
from onnxtools.analysis.readers import stored_weight
from onnxtools.base.options import option
from onnxtools.ir.model import Model
from onnxtools.ir.query import is_op
from onnxtools.pipeline.passbase import Pass

LM_HEAD = "language-model head (--lm-head takes it)"
ROUTER = "router of experts (--include takes it)"


@dataclass(frozen=True)
class Selected(Pass):
    """A pass that works on chosen products."""

    include: tuple[str, ...] = option((), "Only weights or nodes whose name matches this pattern (* and ?).")
    exclude: tuple[str, ...] = option((), "Leave weights or nodes whose name matches this pattern.")
    lm_head: bool = option(False, "The language-model head too.")

    def reason_excluded(self, product: Product, head: ir.Node | None) -> str:
        """Why the options exclude `product`, or '' if they do not."""
        names = [name for name in (product.weight.name, product.node.name) if name]
        if self.include and not _matches(names, self.include):
            return "not included"
        if _matches(names, self.exclude):
            return "excluded"
        if not product.tensor.size:
            return "no elements"
        if is_router(product.node) and not self.include:
            return ROUTER
        return LM_HEAD if product.node is head and not self.lm_head else ""

    def unmatched(self, table: Sequence[dict[str, str]]) -> list[str]:
        """Warnings where --include or a pattern of --exclude matched nothing.

        Args:
            table: rows of the pass's result, with the keys `left`, `weight`, and `layer` or `node`.
        """
        warnings = []
        if self.include and all(row["left"] == "not included" for row in table):
            warnings.append(f"warning: nothing matches --include {' '.join(self.include)}")
        for pattern in self.exclude:
            if table and not any(
                _matches([row.get("layer") or row.get("node") or "", row["weight"]], (pattern,)) for row in table
            ):
                warnings.append(f"warning: nothing matches --exclude {pattern}")
        return warnings


def counts_left(table: Sequence[dict[str, Any]]) -> list[str]:
    """Returns how many rows of a pass's result are left for each reason, a text each."""
    return [f"{count} left: {reason}" for reason, count in Counter(row["left"] for row in table if row["left"]).items()]


def _matches(names: list[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


_BETWEEN = {
    "Reshape",
    "Cast",
    "Add",
    "Identity",
    "Transpose",
    "Mul",
    "Div",
    "Squeeze",
    "Unsqueeze",
    "Gather",
    "Slice",
    "Tanh",
}


_BEFORE_CHOICE = {"Softmax", "Sigmoid", "Add", "Cast", "Reshape", "Where", "Squeeze", "Unsqueeze"}


def is_router(product: ir.Node) -> bool:
    """Whether a product scores experts: a TopK chooses from it. Near scores decide there, so small errors are large."""
    reached = [product]
    for node in reached:
        for reader, _ in node.outputs[0].uses():
            if is_op(reader, "TopK"):
                return True
            if reader.op_type in _BEFORE_CHOICE and reader not in reached:
                reached.append(reader)
    return False


def head_product(model: Model) -> ir.Node | None:
    """The language-model head: the product behind a graph output; None where the model has none.

    Casts, reshapes and a bias may lie between them. A model without an embedding table, such as a single layer, has no
    head.
    """
    if not any(is_op(node, "Gather") and stored_weight(node.inputs[0]) is not None for node in model.graph):
        return None
    products = {product.node: product for product in weight_products(model)}
    for output in model.graph.outputs:
        node = output.producer()
        while node is not None and node not in products and node.op_type in _BETWEEN:
            node = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), None)
        if node is not None and node in products:
            return node
    return None
