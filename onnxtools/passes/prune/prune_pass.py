"""2:4 structured sparsity: zero the two smallest of every four weights along the summed axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from onnxtools.analysis.facts import Array
from onnxtools.analysis.products import Product, unreached, weight_products
from onnxtools.analysis.readers import is_embedding, own_weights, readers
from onnxtools.base.errors import NoMatchError, UsageError
from onnxtools.base.options import option
from onnxtools.calibration.calibration_options import Calibrated
from onnxtools.calibration.run import Calibration
from onnxtools.ir.model import Model
from onnxtools.numerics.sparsity import prune_2_4
from onnxtools.passes.prune.calibrated import CalibratedPruner
from onnxtools.passes.selection import Selected, counts_left, head_product
from onnxtools.pipeline.passbase import PassResult
from onnxtools.storage.rows import StreamedTensor

_DTYPES = {
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2,
}  # fmt: skip


@dataclass(frozen=True)
class Prune(Selected, Calibrated):
    """Prune the weights of MatMul, Gemm and Conv to 2:4: by magnitude, or by the activations.

    By magnitude and without fine-tuning this is for speed studies: a 7B model goes from perplexity 5 to 55 (Wanda,
    arXiv 2306.11695, table 3), so do not ship the result. SparseGPT keeps most of the model; measure it with
    `accuracy`.

    Rules:
      - wanda weighs each element with the size of its input channel; sparsegpt also changes the elements that stay, so
        that the outputs change least; both work layer after layer, on the activations of the pruned layers before;
      - groups of 4 run along the axis that is summed over (K), for any rank, transposition or storage order;
      - of equal magnitudes the one with the lower index is zeroed; NaN counts as the largest;
      - weights with readers other than products (a tied embedding) and the language-model head (the product that makes
        a graph output) are not pruned, unless asked;
      - FP8 weights are pruned by their stored magnitude, which has the order of the dequantized one per tensor and
        per output channel.
    """

    name = "prune"
    numerics = "lossy"
    example = "onnxtools prune kv.onnx sparse.onnx"

    method: Literal["magnitude", "wanda", "sparsegpt"] = option(
        "magnitude", "How the two of four are chosen; wanda and sparsegpt need --calib."
    )
    embeddings: bool = option(False, "Prune weights that are also read as an embedding table.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "magnitude" and self.calib is not None:
            raise UsageError("prune: magnitudes need no --calib; leave it out, or say --method wanda or sparsegpt")

    @property
    def rewrites_weights(self) -> bool:
        return self.method != "magnitude"

    def apply(self, model: Model) -> PassResult:
        head, products = head_product(model), list(weight_products(model))
        missed = [
            {"weight": place.weight, "node": place.node, "dtype": "", "shape": "", "left": place.reason}
            for place in unreached(model)
        ]
        if not products and not missed:
            raise NoMatchError(
                f"{model.path}: has no MatMul, Gemm or Conv with a stored weight, so there is nothing to prune; see it "
                "with `onnxtools inspect`"
            )
        selected = {product.node for product in products if not self.reason_excluded(product, head)}
        chosen: list[Product] = []
        table: list[dict[str, Any]] = []
        sharing: dict[ir.Value, list[Product]] = {}
        for product in products:
            sharing.setdefault(product.weight, []).append(product)
        for weight, sharers in sharing.items():
            product = next((p for p in sharers if p.node in selected), sharers[0])
            two_axes = len({p.axis for p in sharers}) > 1
            reason = (
                "summed along two different axes"
                if two_axes
                else self._reason(product, head) or self._shared(weight, selected)
            )
            if not reason:
                chosen += sharers[:1] if self.method == "magnitude" else sharers
            shape = "x".join(str(d) for d in product.tensor.shape.numpy())
            table.append(
                {
                    "weight": weight.name,
                    "node": product.node.name,
                    "dtype": product.tensor.dtype.name,
                    "shape": shape,
                    "left": reason,
                }
            )
        table += missed
        if not chosen:
            raise NoMatchError(f"{model.path}: nothing is pruned: {'; '.join(counts_left(table))}")
        self._prune(model, chosen)
        pruned = [row for row in table if not row["left"]]
        return PassResult(bool(pruned), len(pruned), self._notes(table, pruned), table)

    def _shared(self, weight: ir.Value, selected: set[ir.Node]) -> str:
        """The reason why another reader needs the weight unpruned, or '' if there is none."""
        for reader in readers(weight):
            if reader.node is None:
                return "also an output of the graph"
            if reader.node not in selected and not (self.embeddings and is_embedding(weight)):
                return (
                    "also an embedding table (--embeddings prunes it)"
                    if is_embedding(weight)
                    else f"also read by {reader.node.op_type} {reader.node.name!r}"
                )
        return ""

    def _prune(self, model: Model, chosen: list[Product]) -> None:
        if self.method == "magnitude" or not chosen:
            for product in chosen:
                _prune(product)
            return
        chosen = own_weights(model, chosen)
        with Calibration(model, self, key=repr(self)) as calibration:
            pruner = CalibratedPruner(self.method, chosen)
            pruner.run(calibration)
        if pruner.unseen:
            model.notes.append(
                f"warning: {pruner.unseen} products saw no calibration token and are pruned by magnitude; calibrate on "
                "more texts"
            )

    def _notes(self, table: list[dict[str, Any]], pruned: list[dict[str, Any]]) -> list[str]:
        notes = [f"{len(pruned)} of {len(table)} weights pruned to 2:4 along K by {self.method}"]
        notes += counts_left(table)
        notes = [*self.unmatched(table), *notes]
        if pruned:
            notes.append(
                "warning: magnitude pruning without fine-tuning is for speed studies; accuracy is lost"
                if self.method == "magnitude"
                else "warning: 2:4 without fine-tuning costs accuracy; measure it with `onnxtools accuracy --compare`"
            )
        return notes

    def _reason(self, product: Product, head: ir.Node | None) -> str:
        """Why a weight is not pruned, or '' if it is to be pruned."""
        reason = self.reason_excluded(product, head)
        if reason:
            return reason
        tensor = product.tensor
        if tensor.dtype not in _DTYPES:
            return f"type {tensor.dtype.name} cannot be pruned"
        if self.method != "magnitude" and (
            product.node.op_type == "Conv" or len(tensor.shape) != 2 or tensor.dtype.itemsize < 2 or product.path
        ):
            return f"{self.method} takes matrices in fp32, fp16 or bf16 that a MatMul or Gemm reads directly"
        if self.method != "magnitude" and product.obstacle:
            return product.obstacle
        size = int(tensor.shape.numpy()[product.axis])
        if size % 4:
            return f"K = {size} is no multiple of 4"
        return ""


def _prune(product: Product) -> None:
    """Replace the weight by a tensor that is pruned when it is written; nothing is read now."""
    tensor, axis = product.tensor, product.axis

    def rows(block: Array, start: int) -> Array:
        return prune_2_4(block, axis, out=block)

    pruned = StreamedTensor(
        tensor, rows, dtype=tensor.dtype, name=product.weight.name or "", row_multiple=4 if axis == 0 else 1
    )
    product.weight.const_value = pruned
    product.weight.metadata_props["onnxtools.sparsity"] = "2:4"
