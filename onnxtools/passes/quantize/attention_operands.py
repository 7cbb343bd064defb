"""FP8 for the operands of attention's products: queries, keys, probabilities and values."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.attention import find_attention
from onnxtools.analysis.cache import rotation
from onnxtools.analysis.facts import Facts
from onnxtools.analysis.products import products_behind, weight_products
from onnxtools.base.errors import JobError
from onnxtools.calibration.run import Findings
from onnxtools.calibration.statistics import Largest, Observer, RotationRange
from onnxtools.ir.model import Model
from onnxtools.ir.query import is_op
from onnxtools.numerics.formats import Format, scale_of
from onnxtools.passes.qdq import COMPUTED, QdqBuilder


@dataclass(frozen=True)
class Operand:
    """One input of a product of attention.

    Attributes:
        node: the product, MatMul or Attention.
        index: which input of `node` it is.
        value: that input.
        kind: query, key, value, or probabilities, which lie between 0 and 1 for every text.
        dtype: the type of `value`.
        rotated: channels that rotary embedding rotates, 0 for none.
        neighbours: whether the rotated pairs are (2i, 2i + 1) instead of halves.
    """

    node: ir.Node
    index: int
    value: ir.Value
    kind: str
    dtype: ir.DataType
    rotated: int = 0
    neighbours: bool = False

    def is_quantized(self) -> bool:
        """Whether the input is quantized already: values of a quantized cache are dequantized when they are read."""
        value = self.node.inputs[self.index]
        return value is not None and is_op(value.producer(), "DequantizeLinear")


def operands(model: Model, facts: Facts) -> list[Operand]:
    """The operands of attention's products, in graph order.

    A layer with the Attention operator, whose probabilities are internal, has three; one with MatMul and Softmax has
    four.

    Raises:
        JobError: no attention, or one in an operator that takes no Q/DQ.
    """
    places = [
        (node, index, kind)
        for node, index, kind in _places(model, facts)
        if not is_op(node, *_FUSED, domain="com.microsoft")
    ]
    if not places:
        raise JobError(
            f"{model.path}: has no Attention, or Softmax between MatMuls, to quantize (GroupQueryAttention takes no "
            "Q/DQ); leave --attention out"
        )
    return [
        operand for node, index, kind in places if (operand := _operand(node, index, kind, model, facts)) is not None
    ]


_FUSED = ("GroupQueryAttention", "MultiHeadAttention")


def _places(model: Model, facts: Facts) -> list[tuple[ir.Node, int, str]]:
    """(node, input index, kind) of each operand of attention."""
    places: list[tuple[ir.Node, int, str]] = []
    for node in model.graph:
        if is_op(node, "Attention") or is_op(node, *_FUSED, domain="com.microsoft"):
            places += [
                (node, index, kind) for index, kind in enumerate(("query", "key", "value")) if index < len(node.inputs)
            ]
    for block in find_attention(model, facts):
        qk, pv = block.product_qk, block.product_pv
        places += [(qk, 0, "query"), (qk, 1, "key"), (pv, 0, "probabilities"), (pv, 1, "value")]
    return places


def score_products(model: Model, facts: Facts) -> set[ir.Node]:
    """Nodes of the products with stored weights that compute queries or keys; a packed QKV product is one of them.

    Empty where attention is of a kind that `_places` does not know.
    """
    products = {product.node for product in weight_products(model)}
    with contextlib.suppress(JobError):  # attention of another kind
        places = _places(model, facts)
        return {
            source
            for node, index, kind in places
            if kind in ("query", "key")
            for source in products_behind(node.inputs[index], products)
        }
    return set()


def _operand(node: ir.Node, index: int, kind: str, model: Model, facts: Facts) -> Operand | None:
    value = node.inputs[index]
    assert value is not None
    dtype = facts[value].dtype
    if dtype is None or dtype not in COMPUTED:
        return None
    shape = facts[value].shape
    turned = (
        rotation(value, facts, model)
        if kind in ("query", "key") and shape is not None and len(shape) == 4
        else (0, False)
    )
    return Operand(node, index, value, kind, dtype, *turned)


def _observer(operand: Operand) -> Observer:
    return RotationRange(operand.rotated, operand.neighbours) if operand.rotated else Largest()


@dataclass(frozen=True)
class AttentionScheme:
    """One scale for each operand; queries and keys by the envelope of their rotation, like keys in the cache."""

    form: Format
    operands: Sequence[Operand]

    @property
    def nodes(self) -> set[ir.Node]:
        """The nodes that compute the observed values."""
        return {node for operand in self.operands if (node := operand.value.producer()) is not None}

    def watch(self, values: set[ir.Value]) -> dict[ir.Value, tuple[Observer, ...]]:
        """Observers of the operands among `values`."""
        observed = (operand for operand in self.operands if operand.value in values and operand.kind != "probabilities")
        return {operand.value: (_observer(operand),) for operand in observed}

    def conclude(self, seen: dict[ir.Value, tuple[Any, ...]]) -> Findings:
        """`attention.<value name>`: the largest magnitude of each observed operand, rank 0."""
        return {
            f"attention.{operand.value.name}": np.array(np.max(seen[operand.value][-1].amax))
            for operand in self.operands
            if operand.value in seen
        }

    def emit(self, build: QdqBuilder, found: Findings, operand: Operand) -> dict[str, Any]:
        """Add the Q/DQ nodes of one operand; returns its row of the result table."""
        amax = np.array(1.0) if operand.kind == "probabilities" else found[f"attention.{operand.value.name}"]
        scale = scale_of(amax, self.form, operand.dtype)
        build.build.before = operand.node
        name = f"{operand.node.name}/{operand.kind}"
        operand.node.replace_input_with(operand.index, build.pair(operand.value, self.form, scale, name))
        return {
            "layer": name,
            "weight": "",
            "scheme": f"{self.form.name} attention",
            "scale": f"{float(scale):.3g}",
            "snr_db": None,
            "error": None,
            "left": "",
        }
