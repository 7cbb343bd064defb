"""FP8 for what attention multiplies: queries, keys, probabilities and values."""

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
        kind: query, key, value, or probabilities, which lie between 0 and 1 whatever the text.
        rotated: channels that rotary embedding turns, 0 for none; `neighbours`: in pairs (2i, 2i + 1).
    """

    node: ir.Node
    index: int
    value: ir.Value
    kind: str
    dtype: ir.DataType
    rotated: int = 0
    neighbours: bool = False

    def is_quantized(self) -> bool:
        """By the cache, whose values are dequantized when they are read."""
        value = self.node.inputs[self.index]
        return value is not None and is_op(value.producer(), "DequantizeLinear")


def operands(model: Model, facts: Facts) -> list[Operand]:
    """What attention multiplies, in graph order.

    The Attention operator keeps its probabilities to itself: with it, three operands a layer; with MatMul and Softmax,
    four.

    Raises:
        JobError: no attention, or one in an operator that takes no Q/DQ.
    """
    places = [place for place in _places(model, facts) if not is_op(place[0], *_FUSED, domain="com.microsoft")]
    if not places:
        raise JobError(
            f"{model.path}: has no Attention, or Softmax between MatMuls, to quantize (GroupQueryAttention takes no "
            "Q/DQ); leave --attention out"
        )
    return [made for node, index, kind in places if (made := _operand(node, index, kind, model, facts)) is not None]


_FUSED = ("GroupQueryAttention", "MultiHeadAttention")


def _places(model: Model, facts: Facts) -> list[tuple[ir.Node, int, str]]:
    """Inputs of nodes, and which operand of attention they are."""
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
    """Products with stored weights that queries or keys come from; a packed QKV product is one of them."""
    products = {product.node for product in weight_products(model)}
    with contextlib.suppress(JobError):  # attention of another kind
        places = _places(model, facts)
        return {
            found
            for node, index, kind in places
            if kind in ("query", "key")
            for found in products_behind(node.inputs[index], products)
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


@dataclass(frozen=True)
class AttentionScheme:
    """One scale for each operand; queries and keys by the envelope of their rotation, as keys in the cache."""

    form: Format
    operands: Sequence[Operand]

    @property
    def nodes(self) -> set[ir.Node]:
        """Where what is looked at is made."""
        return {node for operand in self.operands if (node := operand.value.producer()) is not None}

    def watch(self, values: set[ir.Value]) -> dict[ir.Value, tuple[Observer, ...]]:
        """Observers of the operands among `values`."""
        return {
            o.value: (RotationRange(o.rotated, o.neighbours) if o.rotated else Largest(),)
            for o in self.operands
            if o.value in values and o.kind != "probabilities"
        }

    def conclude(self, seen: dict[ir.Value, tuple[Any, ...]]) -> Findings:
        return {
            f"attention.{o.value.name}": np.array(np.max(seen[o.value][-1].amax))
            for o in self.operands
            if o.value in seen
        }

    def emit(self, build: QdqBuilder, found: Findings, operand: Operand) -> dict[str, Any]:
        """The nodes of one operand; its row of the table."""
        amax = np.array(1.0) if operand.kind == "probabilities" else found[f"attention.{operand.value.name}"]
        scale = scale_of(amax, self.form, operand.dtype)
        build.build.before = operand.node
        name = f"{operand.node.name}/{operand.kind}"
        operand.node.replace_input_with(operand.index, build.pair(operand.value, self.form, scale, name))
        return {
            "layer": name, "weight": "", "scheme": f"{self.form.name} attention", "scale": f"{float(scale):.3g}",
            "snr_db": None, "error": None, "left": "",
        }  # fmt: skip
