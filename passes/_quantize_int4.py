"""INT4 weights in blocks along K, rounded to nearest, or with AWQ's search for scales and clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.calibration.run import Findings
from onnxtools.calibration.statistics import ChannelRange, Observer, TokenSample
from onnxtools.products import Product
from onnxtools.quantization.formats import INT4, scale_of, scaled
from onnxtools.quantization.groups import Group, matrix, relative_error, rounded, signal_to_noise
from onnxtools.quantization.qdq import QdqBuilder, weight_scale

Array = np.ndarray[Any, Any]

ROWS = 256
"""Tokens that the search looks at."""
_GRID = 20
_CLIPS = tuple(1 - step / _GRID for step in range(_GRID // 2))
"""Fractions of a block's largest magnitude that are tried: 1, 0.95, ... 0.55."""


@dataclass(frozen=True)
class Int4Scheme:
    """Activation-aware weight quantization (AWQ, arXiv 2306.00978, section 3.2).

    The factor of input channel j is (mean |x_j|)^r, with the r of 20 between 0 and 1 that gives the least error of the
    outputs; then each block's range is clipped to the fraction that gives the least error.

    Attributes:
        blocks: block size of each product's weight, by node.
    """

    blocks: dict[str, int]
    tokens: int

    def watch(self, groups: Sequence[Group]) -> dict[ir.Value, tuple[Observer, ...]]:
        return {group.activation: (ChannelRange(), TokenSample(ROWS, self.tokens)) for group in groups}

    def conclude(self, groups: Sequence[Group], seen: dict[ir.Value, tuple[Any, ...]]) -> Findings:
        """Factors of each group, and the scales of its weights, float32 [N, K / block]."""
        found: Findings = {}
        for group in groups:
            ranges, sample = seen[group.activation]
            factors = self._factors(group, ranges.mean, sample.rows) if group.fold is not None else None
            if factors is not None:
                found[f"{group.index}.factors"] = factors
        for group in groups:
            factors, rows = found.get(f"{group.index}.factors"), seen[group.activation][1].rows
            for product in group.products:
                weight = matrix(product)
                divisors = self._divisors(product, groups, found)
                scale, errors = self._clipped(weight, rows, factors, divisors, self.blocks[product.node.name or ""], product.tensor.dtype)
                found[f"{group.index}.{product.node.name}.scale"] = scale
                found[f"{group.index}.{product.node.name}"] = np.array(errors)
        return found

    def _factors(self, group: Group, mean: Array, rows: Array) -> Array:
        assert group.fold is not None
        weights = [(matrix(product), self.blocks[product.node.name or ""], product.tensor.dtype) for product in group.products]
        size = np.maximum(mean, 1e-4 * max(float(mean.max()), 1e-30))
        best, least = np.ones(len(size)), np.inf
        gram = rows.T @ rows
        for step in range(_GRID):
            factors = size ** (step / _GRID)
            factors = group.fold.tied(factors / np.sqrt(factors.max() * factors.min()))
            error = 0.0
            for weight, block, dtype in weights:
                wide = (weight * factors).astype(np.float32)
                difference = rounded(wide, INT4, _scale(wide, block, dtype), block) / factors.astype(np.float32) - weight
                error += float(np.einsum("nk,nk->", difference @ gram, difference, dtype=np.float64))  # |X D^T|^2
            if error < least:
                best, least = factors, error
        return best

    def _divisors(self, product: Product, groups: Sequence[Group], found: Findings) -> Array | None:
        """What the rows of this weight will be divided by, because a later group's factors are folded into it; [N]."""
        for group in groups:
            factors = found.get(f"{group.index}.factors")
            if factors is not None and group.fold is not None and group.fold.places[0][0] is product.weight:
                own = np.ones(int(product.tensor.shape.numpy()[1 - product.axis]))
                own[np.array(group.fold.channels) if group.fold.channels is not None else slice(None)] = factors
                return own
        return None

    def _clipped(
        self, weight: Array, rows: Array, factors: Array | None, divisors: Array | None, block: int, dtype: ir.DataType
    ) -> tuple[Array, tuple[float, float]]:
        """The scale of each block, [N, K / block]; (SNR in dB, relative output error)."""
        expected = rows @ weight.T
        if factors is not None:
            weight, rows = (weight * factors).astype(np.float32), (rows / factors).astype(np.float32)
        if divisors is not None:
            weight, expected = (weight / divisors[:, None]).astype(np.float32), expected / divisors
        outputs, size = weight.shape
        count = size // block
        grams = np.einsum("tbi,tbj->bij", rows.reshape(-1, count, block), rows.reshape(-1, count, block), optimize=True)
        amax = np.abs(weight.reshape(outputs, count, block)).max(axis=2)
        best, least = scale_of(amax, INT4, dtype), np.full((outputs, count), np.inf)
        for clip in _CLIPS:
            scale = scale_of(amax * clip, INT4, dtype)
            difference = (rounded(weight, INT4, scale, block) - weight).reshape(outputs, count, block).transpose(1, 0, 2)
            error = np.einsum("bni,bni->nb", difference @ grams, difference)
            better = error < least
            best, least = np.where(better, scale, best), np.where(better, error, least)
        made = rounded(weight, INT4, best, block)
        return best.astype(np.float32), (signal_to_noise(weight, made), relative_error(expected, rows @ made.T))

    def fold(self, group: Group, found: Findings) -> None:
        factors = found.get(f"{group.index}.factors")
        if factors is None or group.fold is None:
            return
        group.fold.apply(factors)
        for product in group.products:
            product.weight.const_value = scaled(product.tensor, factors, product.axis)

    def emit(self, build: QdqBuilder, group: Group, found: Findings) -> dict[str, str]:
        shown = {}
        for product in group.products:
            name = product.node.name or ""
            block, scale = self.blocks[name], found.get(f"{group.index}.{name}.scale")
            kind = product.tensor.dtype.numpy()
            if scale is None:
                scale = weight_scale(product, INT4, per_channel=True, block=block)
            else:
                scale = (scale if product.axis == 1 else np.ascontiguousarray(scale.T)).astype(kind)
            build.weight(product, INT4, scale, block)
            shown[name] = f"{float(scale.min()):.3g} to {float(scale.max()):.3g}"
        return shown


def _scale(weight: Array, block: int, dtype: ir.DataType) -> Array:
    return scale_of(np.abs(weight.reshape(len(weight), -1, block)).max(axis=2), INT4, dtype)


def block_size(size: int, wanted: int | None) -> int:
    """`wanted`, or the largest of 128, 64 and 32 that divides K; 0 where none does."""
    return next((block for block in ((wanted,) if wanted else (128, 64, 32)) if size % block == 0), 0)
