"""Convolutions in FP8 or INT8: one scale for the input, one for each output channel of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.products import Product
from onnxtools.calibration.run import Findings
from onnxtools.calibration.statistics import Histogram, Largest, Observer
from onnxtools.numerics.formats import Format, scale_of
from onnxtools.passes.qdq import QdqBuilder
from onnxtools.passes.quantize.groups import signal_to_noise
from onnxtools.passes.quantize.ranges import Method, largest
from onnxtools.storage.rows import StreamedTensor, elements

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ConvScheme:
    """The convolutions of a graph; like the operands of attention they have one range for each input."""

    form: Format
    products: Sequence[Product]
    method: Method = "max"

    @property
    def nodes(self) -> set[ir.Node]:
        """The convolutions."""
        return {product.node for product in self.products}

    def watch(self, values: set[ir.Value]) -> dict[ir.Value, tuple[Observer, ...]]:
        """Observers of the inputs of the convolutions whose outputs are among `values`."""
        observer = Largest if self.method == "max" else Histogram
        return {p.activation: (observer(),) for p in self.products if p.node.outputs[0] in values}

    def conclude(self, seen: dict[ir.Value, tuple[Any, ...]]) -> Findings:
        """`conv.<node name>`: the largest magnitude of the input, rank 0."""
        return {
            f"conv.{p.node.name}": np.array(self._range(seen[p.activation][-1]))
            for p in self.products
            if p.activation in seen
        }

    def _range(self, observer: Any) -> float:
        return float(observer.amax) if self.method == "max" else largest(observer, self.method, self.form)

    def emit(self, build: QdqBuilder, found: Findings, product: Product) -> dict[str, Any]:
        """Add the Q/DQ nodes of one convolution; returns its row of the result table."""
        node, tensor, form = product.node, product.tensor, self.form
        name, dtype = node.name or "Conv", tensor.dtype
        flat = elements(tensor).astype(np.float32).reshape(int(tensor.shape.numpy()[0]), -1)
        scale = scale_of(np.abs(flat).max(axis=1, initial=0), form, dtype)
        codes = _codes(tensor, form, scale.astype(np.float32))
        build.weight(product, form, scale, codes=codes)
        build.build.before = node
        activation = scale_of(found[f"conv.{name}"], form, dtype)
        node.replace_input_with(0, build.pair(product.activation, form, activation, f"{name}/input"))
        stored = form.cast(flat / scale.astype(np.float32)[:, None]).astype(np.float32)
        snr = signal_to_noise(flat, stored * scale.astype(np.float32)[:, None])
        return {
            "layer": name, "weight": product.weight.name or "", "scheme": f"{form.name} convolution",
            "scale": f"{float(scale.min()):.3g} to {float(scale.max()):.3g}", "snr_db": round(float(snr), 2),
            "error": None, "left": "",
        }  # fmt: skip


def _codes(tensor: ir.TensorProtocol, form: Format, scale: Array) -> StreamedTensor:
    """The weight [outputs, ...] in `form`, each output by its own scale."""

    def rows(part: Array, start: int) -> Array:
        along = scale[start : start + len(part)].reshape(-1, *[1] * (part.ndim - 1))
        return form.cast(part.astype(np.float32) / along)

    return StreamedTensor(tensor, rows, dtype=form.dtype, name=tensor.name or "")
