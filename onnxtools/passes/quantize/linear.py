"""Weights and activations in FP8 or INT8, with or without SmoothQuant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.calibration.run import Findings
from onnxtools.calibration.statistics import ChannelRange, Gram, Histogram, Observer, TokenSample
from onnxtools.numerics.formats import scale_of
from onnxtools.passes.qdq import QdqBuilder, weight_scale
from onnxtools.passes.quantize.groups import Group, column_amax, relative_error, signal_to_noise, stored_scale
from onnxtools.passes.quantize.ranges import Method, largest
from onnxtools.passes.quantize.scheme import Scheme, shown

Array = np.ndarray[Any, Any]

ROWS = 64
"""Number of tokens that a layer's error is measured on."""


@dataclass(frozen=True)
class LinearScheme(Scheme):
    """Weights and activations in one format.

    Attributes:
        alpha: SmoothQuant's migration strength; None leaves the channels as they are.
        per_token: activations get a scale for each token, computed in the graph.
        per_channel: weights get a scale for each output channel.
        method: how the range of an activation is found.
    """

    alpha: float | None
    per_token: bool
    per_channel: bool
    method: Method

    @property
    def rows_have_scales(self) -> bool:
        return self.per_channel

    def watch(self, groups: Sequence[Group]) -> dict[ir.Value, tuple[Observer, ...]]:
        extra: list[type[Histogram] | type[Gram]] = [
            *([Histogram] if self.method != "max" else []),
            *([Gram] if self.keep is not None else []),
        ]
        return {
            group.activation: (ChannelRange(), TokenSample(ROWS, self.tokens), *(kind() for kind in extra))
            for group in groups
        }

    def conclude(self, groups: Sequence[Group], seen: dict[ir.Value, tuple[Any, ...]]) -> Findings:
        """Also the range of each activation after smoothing, and its factors."""
        findings: Findings = {}
        for group in groups:
            ranges, _, *observers = seen[group.activation]
            factors = self._factors(group, ranges.amax) if self.may_fold(group, groups) else None
            histogram = next((observer for observer in observers if isinstance(observer, Histogram)), None)
            amax = (
                largest(histogram, self.method, self.form)
                if histogram
                else (ranges.amax / (1 if factors is None else factors)).max()
            )
            findings[f"{group.index}.amax"] = np.asarray(amax, np.float64)
            if factors is not None:
                findings[f"{group.index}.factors"] = factors
                if self.is_late(group, groups):
                    findings[f"{group.index}.late"] = np.array(1)
        for group in groups:
            _, sample, *observers = seen[group.activation]
            gram = next((observer for observer in observers if isinstance(observer, Gram)), None)
            self._products(group, groups, sample.rows, gram, findings)
        return findings

    def _factors(self, group: Group, amax: Array) -> Array | None:
        """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), float64 [K]; 1 for a channel that is always zero.

        SmoothQuant, arXiv 2211.10438, equation 4.
        """
        if self.alpha is None or group.fold is None:
            return None
        weights = column_amax(group.products).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = np.asarray(amax, np.float64) ** self.alpha / weights ** (1 - self.alpha)
        return group.fold.tied(np.where((amax > 0) & (weights > 0), np.clip(factors, 1e-5, 1e5), 1.0))

    def _products(
        self, group: Group, groups: Sequence[Group], rows: Array, gram: Gram | None, findings: Findings
    ) -> None:
        """Add the errors of each product to `findings`, and with GPTQ the scale of its weight."""
        factors = findings.get(f"{group.index}.factors")
        inputs = rows if factors is None else (rows / factors).astype(np.float32)
        coarse = self._activation(inputs, float(findings[f"{group.index}.amax"]), group.dtype)
        for product in group.products:
            weight = self.folded(product, group, groups, findings)
            scale = stored_scale(weight, self.form, product.tensor.dtype, per_channel=self.per_channel)
            quantized = self.rounded(weight, scale, 0, product, gram, factors)
            key = f"{group.index}.{product.node.name}"
            findings[key] = np.array(
                (signal_to_noise(weight, quantized), relative_error(inputs @ weight.T, coarse @ quantized.T))
            )
            if gram is not None:
                findings[f"{key}.scale"] = scale.astype(np.float32)

    def _activation(self, rows: Array, amax: float, dtype: ir.DataType) -> Array:
        """`rows` [tokens, K] as the product will read them: rounded to `form` and back, float32."""
        if self.per_token:
            scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-6) / np.float32(self.form.top)
        else:
            scale = scale_of(np.array(amax), self.form, dtype).astype(np.float32)
        return np.asarray(self.form.cast(rows / scale).astype(np.float32) * scale)

    def emit(self, build: QdqBuilder, group: Group, found: Findings) -> dict[str, str]:
        scales = {}
        for product in group.products:
            name = product.node.name or ""
            stored = found.get(f"{group.index}.{name}.scale")
            scale = (
                weight_scale(product, self.form, per_channel=self.per_channel)
                if stored is None
                else stored.astype(product.tensor.dtype.numpy())
            )
            build.weight(product, self.form, scale, codes=self.codes(product))
            scales[name] = shown(scale)
        activation = group.products[0].activation  # an earlier group may have replaced it
        if self.per_token:
            build.activation_per_token(activation, group.products, self.form, group.dtype)
        else:
            build.activation(
                activation, group.products, self.form, scale_of(found[f"{group.index}.amax"], self.form, group.dtype)
            )
        return scales
