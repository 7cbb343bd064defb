"""2:4 pruning by activations: Wanda, and SparseGPT with its update of the weights that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.products import Product
from onnxtools.calibration.run import Calibration, Findings, Layer
from onnxtools.calibration.statistics import ChannelRange, Gram
from onnxtools.numerics.compensation import compensated
from onnxtools.numerics.sparsity import prune_2_4
from onnxtools.passes.quantize.groups import matrix
from onnxtools.storage.rows import StreamedTensor

Array = np.ndarray[Any, Any]


def wanda_rows(tensor: ir.TensorProtocol, norms: Array, axis: int, name: str) -> StreamedTensor:
    """`tensor` with the two smallest |w| |x| of every four along `axis` zeroed (Wanda, arXiv 2306.11695, equation 1).

    Args:
        norms: root mean square of each input channel over the tokens, [K].
        axis: the axis of K in `tensor` [N, K] or [K, N].
    """
    wide = norms.astype(np.float32)

    def rows(part: Array, start: int) -> Array:
        along = wide[start : start + len(part), None] if axis == 0 else wide[None, :]
        pruned = prune_2_4(np.abs(part.astype(np.float32)) * along, axis)
        return np.where(pruned != 0, part, part.dtype.type(0))

    return StreamedTensor(tensor, rows, dtype=tensor.dtype, name=name, row_multiple=4 if axis == 0 else 1)


def sparsegpt(weight: Array, gram: Array) -> Array:
    """Prune `weight` [N, K] to 2:4 and update the weights that stay so that the outputs change least.

    SparseGPT, arXiv 2301.00774, section 3.

    Args:
        gram: X^T X / tokens, [K, K].
    """
    drop: Array = np.zeros((len(weight), 2), np.int64)

    def choose(four: Array, diagonal: Array, column: int) -> Array:
        nonlocal drop
        if column % 4 == 0:
            drop = np.argsort(np.abs(four) / diagonal, axis=1, kind="stable")[:, :2]
        return np.where((drop == column % 4).any(axis=1), 0.0, four[:, column % 4])

    return compensated(weight, gram, choose)


def _inputs(product: Product) -> int:
    return int(product.tensor.shape.numpy()[product.axis])


class CalibratedPruner:
    """Prunes layer after layer; each layer sees the activations of the pruned layers before it.

    Attributes:
        unseen: products that saw no token, as of an expert that no text chose: they are pruned by magnitude.
    """

    def __init__(self, method: str, chosen: list[Product]) -> None:
        self._method = method
        self._by_node = {product.node: product for product in chosen}
        self._pruned: set[ir.Node] = set()
        self.unseen = 0

    def run(self, calibration: Calibration) -> None:
        """Prune the products, layer after layer; findings of the calibration cache are used again."""
        for segment, findings in calibration.findings(lambda layer: self._look(layer, calibration), self._by_node):
            for product in segment.products:  # restore the findings of the calibration cache
                self._apply(product, findings, calibration)

    def _look(self, layer: Layer, calibration: Calibration) -> Findings:
        products = [p for p in layer.products if p.node in self._by_node]
        observer = Gram if self._method == "sparsegpt" else ChannelRange
        observers = {product.activation: (observer(),) for product in products}
        layer.observe(observers)
        findings: Findings = {}
        for index, product in enumerate(products):
            (observed,) = observers[product.activation]
            if not observed.count:
                self.unseen += 1
            if isinstance(observed, ChannelRange):
                norms = np.sqrt(observed.mean_square) if observed.count else np.ones(_inputs(product))
                findings[product.node.name or ""] = norms
            else:
                gram = observed.value if observed.count else np.eye(_inputs(product), dtype=np.float32)
                pruned = sparsegpt(matrix(product), gram)
                stored = (pruned if product.axis == 1 else np.ascontiguousarray(pruned.T)).astype(
                    product.tensor.dtype.numpy()
                )
                calibration.store(product.weight.name or "", stored)
                findings[product.node.name or ""] = np.array(index)
        for product in products:
            self._apply(product, findings, calibration)
        if products:
            layer.run_again()
        return findings

    def _apply(self, product: Product, findings: Findings, calibration: Calibration) -> None:
        norms = findings.get(product.node.name or "")
        if norms is None or product.node in self._pruned:
            return
        self._pruned.add(product.node)
        name, value = product.weight.name or "", product.weight
        if self._method == "wanda":
            value.const_value = wanda_rows(product.tensor, norms, product.axis, name)
        else:
            value.const_value = calibration.stored(name, product.tensor.dtype)
        value.metadata_props["onnxtools.sparsity"] = "2:4"
