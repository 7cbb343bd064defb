"""INT4 weights in blocks along K, rounded to nearest, or with AWQ's search for scales and clipping."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.products import Product
from onnxtools.calibration.run import Findings
from onnxtools.calibration.statistics import BlockGram, ChannelRange, Gram, Observer, TokenSample
from onnxtools.numerics.formats import INT4, scale_of
from onnxtools.passes.qdq import QdqBuilder, weight_scale
from onnxtools.passes.quantize.groups import Group, matrix, relative_error, rounded, signal_to_noise
from onnxtools.passes.quantize.scheme import Scheme, shown

Array = np.ndarray[Any, Any]
Grams = tuple[Array, Array]
"""X^T X / tokens of each block of channels, [K / block, block, block].

The first array is of the tokens as they are, the second of the tokens scaled to length 1.
"""

ROWS = 256
"""Number of tokens that the reported error of a layer is measured on."""
_GRID = 20
_CLIPS = tuple(1 - step / _GRID for step in range(_GRID // 2))
"""Candidate fractions of a block's largest magnitude: 1, 0.95, ... 0.55."""


@dataclass(frozen=True)
class Int4Scheme(Scheme):
    """Activation-aware weight quantization (AWQ, arXiv 2306.00978, section 3.2).

    The factor of input channel j is (mean |x_j|)^r. Of 20 values of r between 0 and 1 the one with the least error of
    the outputs is taken. Each block's range is then clipped to the fraction with the least error. Errors are measured
    on the tokens as they are, as in AWQ, and on tokens of equal length, so that the few long tokens (attention sinks)
    neither decide alone nor are given up. The larger of the two errors counts, each relative to rounding to nearest,
    which is the first candidate. Products that compute queries and keys are not clipped, as in AWQ's own code (the
    product of queries and keys multiplies the errors), unless GPTQ compensates for it.

    Attributes:
        blocks: block size of each product's weight, by node.
        unclipped: nodes of the products that compute queries and keys.
    """

    blocks: dict[str, int]
    unclipped: Collection[ir.Node] = ()

    @property
    def rows_have_scales(self) -> bool:
        return True

    def watch(self, groups: Sequence[Group]) -> dict[ir.Value, tuple[Observer, ...]]:
        observers: dict[ir.Value, tuple[Observer, ...]] = {}
        for group in groups:
            grams: tuple[Observer, ...] = (BlockGram(self._block(group)), BlockGram(self._block(group), equal=True))
            observers[group.activation] = (
                ChannelRange(),
                TokenSample(ROWS, self.tokens),
                *grams,
                *([Gram()] if self.keep is not None else []),
            )
        return observers

    def conclude(self, groups: Sequence[Group], seen: dict[ir.Value, tuple[Any, ...]]) -> Findings:
        """Also the factors of each group, and the scales of its weights, float32 [N, K / block]."""
        findings: Findings = {}
        grams = {group.index: (seen[group.activation][2].value, seen[group.activation][3].value) for group in groups}
        for group in groups:
            if self.may_fold(group, groups):
                findings[f"{group.index}.factors"] = self._factors(
                    group, seen[group.activation][0].mean, grams[group.index]
                )
                if self.is_late(group, groups):
                    findings[f"{group.index}.late"] = np.array(1)
        for group in groups:
            _, sample, _, _, *whole = seen[group.activation]
            for product in group.products:
                self._product(
                    product, group, groups, sample.rows, grams[group.index], whole[0] if whole else None, findings
                )
        return findings

    def _block(self, group: Group) -> int:
        """The block size, which is the same for all products of a group: they have the same K."""
        return self.blocks[group.products[0].node.name or ""]

    def _product(
        self,
        product: Product,
        group: Group,
        groups: Sequence[Group],
        rows: Array,
        grams: Grams,
        gram: Gram | None,
        findings: Findings,
    ) -> None:
        factors, block = findings.get(f"{group.index}.factors"), self._block(group)
        weight, inputs = self.folded(product, group, groups, findings), rows
        if factors is not None:
            inputs, cut = (rows / factors).astype(np.float32), factors.reshape(-1, block).astype(np.float32)
            grams = (grams[0] / (cut[:, :, None] * cut[:, None, :]), grams[1] / (cut[:, :, None] * cut[:, None, :]))
        scale = _clipped(weight, grams, product.tensor.dtype, () if product.node in self.unclipped else _CLIPS)
        quantized = self.rounded(weight, scale, block, product, gram, factors)
        key = f"{group.index}.{product.node.name}"
        findings[key] = np.array(
            (signal_to_noise(weight, quantized), relative_error(inputs @ weight.T, inputs @ quantized.T))
        )
        findings[f"{key}.scale"] = scale

    def _factors(self, group: Group, mean: Array, grams: Grams) -> Array:
        """The factors [K] with the least error; the first candidate is 1, rounding to nearest."""
        assert group.fold is not None
        weights = [(matrix(product), product.tensor.dtype) for product in group.products]
        size = np.maximum(mean, 1e-4 * max(float(mean.max()), 1e-30))
        plain, best, least = np.ones(2), np.ones(len(size)), np.inf
        for step in range(_GRID):
            factors = size ** (step / _GRID)
            factors = group.fold.tied(factors / np.sqrt(factors.max() * factors.min()))
            errors = np.zeros(2)
            for weight, dtype in weights:
                wide, block = (weight * factors).astype(np.float32), self._block(group)
                quantized = rounded(wide, INT4, _scale(wide, block, dtype), block) / factors.astype(np.float32)
                errors += [float(_errors(quantized - weight, blocks).sum(dtype=np.float64)) for blocks in grams]
            if step == 0:
                plain = np.maximum(errors, 1e-300)
            if (worse := float((errors / plain).max())) < least:
                best, least = factors, worse
        return best

    def emit(self, build: QdqBuilder, group: Group, found: Findings) -> dict[str, str]:
        scales = {}
        for product in group.products:
            name = product.node.name or ""
            block, scale = self.blocks[name], found.get(f"{group.index}.{name}.scale")
            kind = product.tensor.dtype.numpy()
            if scale is None:
                scale = weight_scale(product, INT4, per_channel=True, block=block)
            else:
                scale = (scale if product.axis == 1 else np.ascontiguousarray(scale.T)).astype(kind)
            build.weight(product, INT4, scale, block, self.codes(product))
            scales[name] = shown(scale)
        return scales


def _errors(difference: Array, blocks: Array) -> Array:
    """Mean square error of the outputs over the tokens, [N, K / block], when the weight [N, K] changes by `difference`.

    Each block of inputs counts by itself: the rounding errors of two blocks are independent, so their effects add up.
    """
    cut = difference.reshape(len(difference), len(blocks), -1).transpose(1, 0, 2)
    # Weights above 1e19 overflow; then no candidate is better than leaving them unchanged.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.einsum("bni,bni->nb", cut @ blocks, cut))


def _clipped(weight: Array, grams: Grams, dtype: ir.DataType, clips: Sequence[float]) -> Array:
    """The scale of each block, float32 [N, K / block]: of the clipped ranges the one with the least error.

    Both errors are relative to those without clipping.
    """
    block = grams[0].shape[-1]
    amax = np.abs(weight.reshape(len(weight), -1, block)).max(axis=2)
    best, least = scale_of(amax, INT4, dtype).astype(np.float32), np.full(amax.shape, np.inf)
    plain: list[Array] = []
    for clip in clips:
        scale = scale_of(amax * np.float32(clip), INT4, dtype).astype(np.float32)
        errors = [_errors(rounded(weight, INT4, scale, block) - weight, blocks) for blocks in grams]
        plain = plain or [np.maximum(error, np.float32(1e-30)) for error in errors]
        with np.errstate(over="ignore", invalid="ignore"):
            worse = np.maximum(*(error / first for error, first in zip(errors, plain, strict=True)))
        better = worse < least
        best, least = np.where(better, scale, best), np.where(better, worse, least)
    return np.asarray(best)


def _scale(weight: Array, block: int, dtype: ir.DataType) -> Array:
    return scale_of(np.abs(weight.reshape(len(weight), -1, block)).max(axis=2), INT4, dtype)


def block_size(size: int, wanted: int | None) -> int:
    """`wanted`, or the largest of 128, 64 and 32, if it divides `size` (K); 0 where none does."""
    return next((block for block in ((wanted,) if wanted else (128, 64, 32)) if size % block == 0), 0)
