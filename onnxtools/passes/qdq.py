"""QuantizeLinear and DequantizeLinear around products, as ONNX Runtime computes and TensorRT fuses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.products import Product
from onnxtools.ir.edit import Builder
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, is_op, stored_dtype
from onnxtools.numerics.formats import Format, magnitudes, quantized, scale_of

Array = np.ndarray[Any, Any]

COMPUTED = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
"""Types that a product may be computed in."""


class QdqBuilder:
    """Adds Q/DQ nodes to one graph.

    `name` is the prefix of the new names; a scale is an array of the type that the product is computed in.
    """

    def __init__(self, model: Model) -> None:
        self.build = Builder(model)

    def pair(self, value: ir.Value, form: Format, scale: Array, name: str) -> ir.Value:
        """`value` through QuantizeLinear and DequantizeLinear with one scale (rank 0)."""
        return self.dequantized(self.quantized(value, form, scale, name), form, scale, name)

    def quantized(self, value: ir.Value, form: Format, scale: Array, name: str) -> ir.Value:
        """`value` through QuantizeLinear with one scale (rank 0)."""
        zero = self._zero_point(form, scale, name)
        attributes: dict[str, Any] = {"output_dtype": form.dtype.value} if not zero else {}
        result = self.build.op(
            "QuantizeLinear",
            [value, self._scale(scale, name), *zero],
            f"{name}/QuantizeLinear",
            dtype=form.dtype,
            **attributes,
        )
        result.shape = value.shape
        return result

    def dequantized(self, stored: ir.Value, form: Format, scale: Array, name: str) -> ir.Value:
        """`stored` through DequantizeLinear with one scale (rank 0), in the type of `scale`."""
        inputs = [stored, self._scale(scale, name), *self._zero_point(form, scale, name)]
        result = self.build.op("DequantizeLinear", inputs, f"{name}/DequantizeLinear")
        result.dtype, result.shape = ir.DataType.from_numpy(scale.dtype), stored.shape
        return result

    def _zero_point(self, form: Format, scale: Array, name: str) -> list[ir.Value]:
        """The zero point as a list of at most one input, which also gives the quantized type.

        INT8 from opset 21 on has none, and the type is an attribute: ONNX Runtime 1.32 moves a QuantizeLinear over a
        Reshape, loses its zero point and with it the type, and then refuses the graph.
        """
        if form.dtype == ir.DataType.INT8 and self.build.model.opset >= 21:
            return []
        return [self.build.constant(np.zeros(scale.shape, form.dtype.numpy()), f"{name}_zero_point", form.dtype)]

    def _scale(self, scale: Array, name: str) -> ir.Value:
        return self.build.constant(scale, f"{name}_scale", ir.DataType.from_numpy(scale.dtype))

    def weight(
        self, product: Product, form: Format, scale: Array, block: int = 0, codes: ir.TensorProtocol | None = None
    ) -> None:
        """Store the weight as `form` behind a DequantizeLinear; other readers of the weight keep the original.

        Args:
            scale: as of `formats.quantized`, in the weight's own type.
            block: elements along K that share a scale; 0 for one scale per tensor or output channel.
            codes: the weight in the stored type, where it is not simply rounded to the nearest.
        """
        reader = product.path[-1] if product.path else product.node
        index = 0 if product.path else product.index
        self.build.before = reader
        name = product.weight.name or product.node.name or "weight"
        stored = self.build.initializer(
            codes or quantized(product.tensor, form, scale, product.axis, block), f"{name}_{form.dtype.name.lower()}"
        )
        for key, text in product.weight.metadata_props.items():
            stored.metadata_props[key] = text
        scales = self.build.initializer(ir.Tensor(scale, dtype=product.tensor.dtype), f"{name}_scale")
        attributes: dict[str, Any] = (
            {"axis": product.axis, "block_size": block} if block else {"axis": 1 - product.axis} if scale.ndim else {}
        )
        dequantized = self.build.op(
            "DequantizeLinear", [stored, scales], f"{name}/DequantizeLinear", dtype=product.tensor.dtype, **attributes
        )
        dequantized.shape = product.weight.shape
        reader.replace_input_with(index, dequantized)

    def activation(self, value: ir.Value, products: Sequence[Product], form: Format, scale: Array) -> None:
        """Let `products` read `value` rounded to `form` with one scale (rank 0)."""
        self.build.before = _first(products)
        rounded = self.pair(value, form, scale, f"{value.name}/{form.dtype.name.lower()}")
        for product in products:
            product.node.replace_input_with(1 - product.index, rounded)

    def activation_per_token(
        self, value: ir.Value, products: Sequence[Product], form: Format, dtype: ir.DataType
    ) -> None:
        """Let `products` read `value` rounded with a scale for each token, which is computed in the graph.

        Each token is divided by its scale and rounded with the constant scale 1, and the products are multiplied by the
        token's scale. Q and DQ then have constant scales, which TensorRT demands, and the product stays an integer
        product.
        """
        self.build.before = _first(products)
        op, name = self.build.op, f"{value.name}/per_token"
        tiny = np.array(1e-6, dtype.numpy())  # a token of zeros stays zeros
        amax = op(
            "ReduceMax",
            [op("Abs", [value], f"{name}/Abs"), self.build.constant([-1], "last_axis")],
            f"{name}/ReduceMax",
            keepdims=1,
        )
        top = self.build.constant(np.array(form.top, dtype.numpy()), "quantized_top", dtype)
        scale = op(
            "Div",
            [op("Max", [amax, self.build.constant(tiny, "least_amax", dtype)], f"{name}/Max"), top],
            f"{name}/scale",
        )
        even = op("Div", [value, scale], f"{name}/Div", dtype=dtype)
        rounded = self.pair(even, form, np.array(1, dtype.numpy()), f"{name}/{form.dtype.name.lower()}")
        for product in products:
            product.node.replace_input_with(1 - product.index, rounded)
            self._multiply_behind(product.node, scale)

    def _multiply_behind(self, node: ir.Node, scale: ir.Value) -> None:
        """Multiply the result of a product by `scale` before its bias is added."""
        bias = node.inputs[2] if is_op(node, "Gemm") and len(node.inputs) > 2 else None
        self.build.before = None  # the pass sorts the graph at the end
        if bias is not None:
            bias = times(self.build, bias, float(attribute(node, "beta", 1.0)), f"{node.name}/beta")
            node.resize_inputs(2)
        old = node.outputs[0]
        users = list(old.uses())
        result = self.build.op("Mul", [old, scale], f"{node.name}/rescaled", dtype=old.dtype)
        if bias is not None:
            result = self.build.op("Add", [result, bias], f"{node.name}/bias", dtype=old.dtype)
        result.shape = old.shape
        for user, index in users:
            user.replace_input_with(index, result)
        if old.is_graph_output():
            old.name, result.name = self.build.names(f"{old.name}/unscaled"), old.name
            outputs = self.build.graph.outputs
            outputs[list(outputs).index(old)] = result


def times(build: Builder, value: ir.Value, factor: float, name: str) -> ir.Value:
    """`value` times `factor`, such as the alpha or beta of a Gemm; a factor of 1 adds no node."""
    dtype = stored_dtype(value)
    if factor == 1 or dtype is None:
        return value
    product = build.op(
        "Mul", [value, build.constant(np.array(factor, dtype.numpy()), name, dtype)], f"{name}/Mul", dtype=dtype
    )
    product.shape = value.shape
    return product


def _first(products: Sequence[Product]) -> ir.Node:
    """The node of the first product in the graph: products of a group are in graph order."""
    return products[0].node


def weight_scale(product: Product, form: Format, *, per_channel: bool, block: int = 0) -> Array:
    """The weight's scale by its largest magnitude, in the weight's type; the weight is read a slab at a time.

    One scale (rank 0), or one per output channel [N], or one per block of K, as `formats.quantized` takes it.
    """
    amax = magnitudes(product.tensor, product.axis, block)
    return scale_of(amax if per_channel or block else amax.max(), form, product.tensor.dtype)


def is_quantized(product: Product) -> bool:
    """Whether the weight or the activation already goes through Q/DQ."""
    return product.quantized or is_op(product.activation.producer(), "DequantizeLinear")
