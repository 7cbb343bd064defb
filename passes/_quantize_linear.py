"""FP8 and INT8 of weights and activations, with or without SmoothQuant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.calibration.run import Findings
from onnxtools.calibration.statistics import ChannelRange, Histogram, Observer, TokenSample
from onnxtools.quantization.formats import Format, scale_of, scaled
from onnxtools.quantization.groups import Group, column_amax, matrix, relative_error, rounded, signal_to_noise, stored_scale
from onnxtools.quantization.qdq import QdqBuilder, weight_scale
from onnxtools.quantization.ranges import Method, largest

Array = np.ndarray[Any, Any]

ROWS = 64
"""Tokens that a layer's error is measured on."""


@dataclass(frozen=True)
class LinearScheme:
    """Weights and activations in one format.

    Attributes:
        alpha: SmoothQuant's migration strength; None leaves the channels as they are.
        per_token: activations get a scale for each token, computed in the graph.
        per_channel: weights get a scale for each output channel.
        method: how the range of an activation is found.
    """

    form: Format
    alpha: float | None
    per_token: bool
    per_channel: bool
    method: Method
    tokens: int

    def watch(self, groups: Sequence[Group]) -> dict[ir.Value, tuple[Observer, ...]]:
        histogram = (Histogram(),) if self.method != "max" else ()
        return {group.activation: (ChannelRange(), TokenSample(ROWS, self.tokens), *histogram) for group in groups}

    def conclude(self, groups: Sequence[Group], seen: dict[ir.Value, tuple[Any, ...]]) -> Findings:
        """The range of each activation after smoothing, its factors, and the errors of its products."""
        found: Findings = {}
        for group in groups:
            ranges, sample, *histogram = seen[group.activation]
            factors = self._factors(group, ranges.amax)
            amax = largest(histogram[0], self.method, self.form) if histogram else (ranges.amax / (1 if factors is None else factors)).max()
            key = f"{group.index}"
            found[f"{key}.amax"] = np.asarray(amax, np.float64)
            if factors is not None:
                found[f"{key}.factors"] = factors
            rows = sample.rows
            for product in group.products:
                found[f"{key}.{product.node.name}"] = np.array(self._errors(matrix(product), rows, factors, float(amax), group.dtype))
        return found

    def _factors(self, group: Group, amax: Array) -> Array | None:
        """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) (SmoothQuant, arXiv 2211.10438, equation 4); 1 for a channel that is always zero."""
        if self.alpha is None or group.fold is None:
            return None
        weights = column_amax(group.products).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = np.asarray(amax, np.float64) ** self.alpha / weights ** (1 - self.alpha)
        return group.fold.tied(np.where((amax > 0) & (weights > 0), np.clip(factors, 1e-5, 1e5), 1.0))

    def _errors(self, weight: Array, rows: Array, factors: Array | None, amax: float, dtype: ir.DataType) -> tuple[float, float]:
        """(SNR of the weight in dB, relative error of the product's output)."""
        expected = rows @ weight.T
        if factors is not None:
            rows, weight = (rows / factors).astype(np.float32), (weight * factors).astype(np.float32)
        if self.per_token:
            scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-6) / np.float32(self.form.top)
        else:
            scale = scale_of(np.array(amax), self.form, dtype).astype(np.float32)
        rows = self.form.cast(rows / scale).astype(np.float32) * scale
        made = rounded(weight, self.form, stored_scale(weight, self.form, dtype, per_channel=self.per_channel))
        return signal_to_noise(weight, made), relative_error(expected, rows @ made.T)

    def fold(self, group: Group, found: Findings) -> None:
        factors = found.get(f"{group.index}.factors")
        if factors is None or group.fold is None:
            return
        group.fold.apply(factors)
        for product in group.products:
            product.weight.const_value = scaled(product.tensor, factors, product.axis)

    def emit(self, build: QdqBuilder, group: Group, found: Findings) -> dict[str, str]:
        """The nodes; returns the range of weight scales by product."""
        scales = {}
        for product in group.products:
            scale = weight_scale(product, self.form, per_channel=self.per_channel)
            build.weight(product, self.form, scale)
            scales[product.node.name or ""] = f"{float(scale.min()):.3g} to {float(scale.max()):.3g}" if scale.size > 1 else f"{float(scale):.3g}"
        activation = group.products[0].activation  # an earlier group may have put a node behind what made it
        if self.per_token:
            build.activation_per_token(activation, group.products, self.form, group.dtype)
        else:
            build.activation(activation, group.products, self.form, scale_of(found[f"{group.index}.amax"], self.form, group.dtype))
        return scales
