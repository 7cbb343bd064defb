"""What the quantization schemes share: folding the factors, and the weights after folding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.products import Product
from onnxtools.calibration.run import Calibration, Findings
from onnxtools.calibration.statistics import Gram, Observer
from onnxtools.numerics.formats import Format, scaled
from onnxtools.passes.qdq import QdqBuilder
from onnxtools.passes.quantize.groups import Group, decoded, gptq, matrix, rounded

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scheme:
    """One way to quantize; subclasses say what to observe and what to conclude from it.

    Attributes:
        form: format of the weights.
        tokens: number of calibration tokens.
        keep: where GPTQ's weights are stored; None rounds to the nearest.
        weights: all weights that are quantized.
    """

    form: Format
    tokens: int
    keep: Calibration | None
    weights: frozenset[ir.Value]

    def watch(self, groups: Sequence[Group]) -> dict[ir.Value, tuple[Observer, ...]]:
        """Observers of each group's activation; with GPTQ the last one is the Gram matrix."""
        raise NotImplementedError

    def conclude(self, groups: Sequence[Group], seen: dict[ir.Value, tuple[Any, ...]]) -> Findings:
        """The small arrays that `fold` and `emit` need, by key.

        `<group>.<node>` is (SNR of the weight in dB, relative error of the output) of each product.
        """
        raise NotImplementedError

    def emit(self, build: QdqBuilder, group: Group, found: Findings) -> dict[str, str]:
        """Add the Q/DQ nodes of a group; returns the range of the weight scales by node name."""
        raise NotImplementedError

    def may_fold(self, group: Group, groups: Sequence[Group]) -> bool:
        """Whether the factors of `group` can be folded while the layer of `groups` is calibrated.

        The weight that would take them may have been rounded with an earlier layer. Its codes then stay, and the scales
        of its rows are divided instead, with the same effect. A weight with a single scale cannot be divided like this.
        """
        if group.fold is None:
            return False
        return not self.is_late(group, groups) or self.rows_have_scales or self.keep is None

    def is_late(self, group: Group, groups: Sequence[Group]) -> bool:
        """Whether the factors go into a quantized weight of a layer before the layer of `groups`."""
        target = group.fold.weight if group.fold is not None else None
        return target in self.weights and not any(
            product.weight is target for other in groups for product in other.products
        )

    @property
    def rows_have_scales(self) -> bool:
        """Whether each output channel has a scale of its own."""
        raise NotImplementedError

    def fold(self, groups: Sequence[Group], found: Findings) -> None:
        """Divide each activation by its factors, and multiply the weights that read it."""
        keys = {
            product.weight: f"{group.index}.{product.node.name}.scale" for group in groups for product in group.products
        }
        for group in groups:
            factors = found.get(f"{group.index}.factors")
            if factors is None or group.fold is None:
                continue
            group.fold.apply(factors)
            for product in group.products:
                product.weight.const_value = scaled(product.tensor, factors, product.axis)
            target = group.fold.weight
            if f"{group.index}.late" in found and target is not None and (scale := found.get(keys[target])) is not None:
                rows = group.fold.producers(factors).astype(np.float32)
                found[keys[target]] = scale / (rows[:, None] if scale.ndim == 2 else rows)

    def folded(self, product: Product, group: Group, groups: Sequence[Group], found: Findings) -> Array:
        """The weight after folding, float32 [N, K].

        It is multiplied by its group's factors, and its rows are divided by the factors that a group of `groups` folds
        into it.
        """
        weight, factors = matrix(product), found.get(f"{group.index}.factors")
        if factors is not None:
            weight = (weight * factors).astype(np.float32)
        divisors = np.ones(len(weight), np.float32)
        for other in groups:
            folded_factors = found.get(f"{other.index}.factors")
            if folded_factors is not None and other.fold is not None and other.fold.weight is product.weight:
                divisors = divisors * other.fold.producers(folded_factors).astype(np.float32)
        return weight / divisors[:, None]

    def rounded(
        self, weight: Array, scale: Array, block: int, product: Product, gram: Gram | None, factors: Array | None
    ) -> Array:
        """The weight after quantization, float32 [N, K]; GPTQ's codes are stored for `codes`."""
        if gram is None or self.keep is None:
            return rounded(weight, self.form, scale, block)
        inputs = gram.value if factors is None else gram.value / np.outer(factors, factors)
        codes = gptq(weight, inputs, self.form, scale, block)
        self.keep.store(product.weight.name or "", codes if product.axis == 1 else np.ascontiguousarray(codes.T))
        return decoded(codes, scale, block)

    def codes(self, product: Product) -> ir.TensorProtocol | None:
        """GPTQ's weight in the stored type; None without GPTQ."""
        return self.keep.stored(product.weight.name or "", self.form.dtype) if self.keep is not None else None


def shown(scale: Array) -> str:
    """The range of scales, for people."""
    return f"{float(scale.min()):.3g} to {float(scale.max()):.3g}" if scale.size > 1 else f"{float(scale):.3g}"
