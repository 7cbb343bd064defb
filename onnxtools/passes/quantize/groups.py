"""Products that share their input: they are quantized with one activation scale and one factor for each channel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts
from onnxtools.analysis.products import Product, weight_products
from onnxtools.base.errors import ModelError
from onnxtools.ir.model import Model
from onnxtools.numerics.compensation import compensated
from onnxtools.numerics.formats import Format, magnitudes, scale_of
from onnxtools.passes.quantize.folding import Fold, Folder
from onnxtools.storage.rows import elements

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Group:
    """Products of one activation.

    Attributes:
        index: position in graph order; the prefix of the group's keys in Findings.
        activation: the value that the products read.
        products: the products, in graph order.
        fold: where a factor for each channel of the activation can be folded; None where it cannot.
        dtype: the type that the products are computed in.
    """

    index: int
    activation: ir.Value
    products: tuple[Product, ...]
    fold: Fold | None
    dtype: ir.DataType

    @property
    def channels(self) -> int:
        """K, the number of channels of the activation."""
        product = self.products[0]
        return int(product.tensor.shape.numpy()[product.axis])


def group(model: Model, chosen: Sequence[Product], facts: Facts) -> list[Group]:
    """The chosen products by activation, in graph order.

    A group has a fold only if it holds every reader of the activation: another reader would see it divided.
    """
    folder = Folder(facts, weight_products(model))
    by_activation: dict[ir.Value, list[Product]] = {}
    for product in chosen:
        by_activation.setdefault(product.activation, []).append(product)
    return [
        Group(
            index,
            value,
            tuple(products),
            folder.find(value, [p.node for p in products]),
            facts[value].dtype or products[0].tensor.dtype,
        )
        for index, (value, products) in enumerate(by_activation.items())
    ]


def matrix(product: Product) -> Array:
    """The weight as float32 [N, K].

    Raises:
        ModelError: an element is infinite or NaN.
    """
    whole = elements(product.tensor).astype(np.float32)
    if not np.isfinite(whole).all():
        raise ModelError(
            f"weight {product.weight.name!r} has infinite or NaN elements; restore it, or leave it out with --exclude"
        )
    return whole if product.axis == 1 else np.ascontiguousarray(whole.T)


def rounded(weight: Array, form: Format, scale: Array, block: int = 0) -> Array:
    """`weight` [N, K] rounded to `form` and back, float32; `scale` has rank 0, [N], or [N, K / block]."""
    return decoded(form.cast(weight / spread(scale, block)), scale, block)


def decoded(codes: Array, scale: Array, block: int = 0) -> Array:
    """Stored values [N, K] as float32; `scale` as in `rounded`."""
    return np.asarray(codes.astype(np.float32) * spread(scale, block))


def spread(scale: Array, block: int = 0) -> Array:
    """The scale as float32 in a shape that broadcasts to [N, K]."""
    wide = np.asarray(scale).astype(np.float32)
    return np.repeat(wide, block, axis=1) if block else wide[:, None] if wide.ndim else wide


def gptq(weight: Array, gram: Array, form: Format, scale: Array, block: int = 0) -> Array:
    """GPTQ's codes of `weight` [N, K] in `form` (arXiv 2210.17323).

    Each column is rounded after the errors of the columns before it are compensated.

    Args:
        gram: X^T X / tokens, [K, K].
        scale: rank 0, [N], or [N, K / block].
    """
    wide = np.asarray(scale).astype(np.float64)
    codes = np.empty(weight.shape, form.dtype.numpy())

    def choose(four: Array, diagonal: Array, column: int) -> Array:
        along = wide[:, column // block] if block else wide
        codes[:, column] = form.cast((four[:, column % 4] / along).astype(np.float32))
        return np.asarray(codes[:, column].astype(np.float64) * along)

    compensated(weight, gram, choose)
    return codes


def signal_to_noise(weight: Array, made: Array) -> float:
    """Signal-to-noise ratio of a quantized weight in dB: 10 log10(sum w^2 / sum (w - q)^2); inf without noise."""
    noise = float(np.square(weight - made, dtype=np.float64).sum())
    return 10 * float(np.log10(np.square(weight, dtype=np.float64).sum() / noise)) if noise else float("inf")


def relative_error(expected: Array, found: Array) -> float:
    """|found - expected| / |expected| in Frobenius norms; |found| where `expected` is zero."""
    wide = expected.astype(np.float64)  # a square may exceed float32
    size, error = float(np.linalg.norm(wide)), float(np.linalg.norm(found - wide))
    return error / size if size else error


def column_amax(products: Iterable[Product]) -> Array:
    """Largest magnitude of each input channel over the weights of all products, float32 [K]."""
    return np.asarray(np.max([magnitudes(product.tensor, 1 - product.axis) for product in products], axis=0))


def stored_scale(weight: Array, form: Format, dtype: ir.DataType, *, per_channel: bool) -> Array:
    """The scale of `weight` [N, K] in `dtype`: rank 0, or [N] with `per_channel`."""
    amax = np.abs(weight).max(axis=1)
    return scale_of(amax if per_channel else amax.max(), form, dtype)
