"""QuantizeLinear and DequantizeLinear around products, as ONNX Runtime computes and TensorRT fuses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.products import Product
from onnxtools.ir.edit import Builder
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, constant_tensor, is_op, stored_dtype
from onnxtools.numerics.formats import Format, magnitudes, quantized, scale_of

Array = np.ndarray[Any, Any]

COMPUTED = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
"""Types that a product may be computed in."""


class QdqBuilder:
    """Adds the nodes of one graph."""

    def __init__(self, model: Model) -> None:
        self.build = Builder(model)

    def pair(self, value: ir.Value, form: Format, scale: Array, name: str) -> ir.Value:
        """`value` through QuantizeLinear and DequantizeLinear with one scale."""
        return self.dequantized(self.quantized(value, form, scale, name), form, scale, name)

    def quantized(self, value: ir.Value, form: Format, scale: Array, name: str) -> ir.Value:
        zero = self._zero_point(form, scale, name)
        attributes: dict[str, Any] = {"output_dtype": form.dtype.value} if not zero else {}
        made = self.build.op(
            "QuantizeLinear",
            [value, self._scale(scale, name), *zero],
            f"{name}/QuantizeLinear",
            dtype=form.dtype,
            **attributes,
        )
        made.shape = value.shape
        return made

    def dequantized(self, stored: ir.Value, form: Format, scale: Array, name: str) -> ir.Value:
        inputs = [stored, self._scale(scale, name), *self._zero_point(form, scale, name)]
        made = self.build.op("DequantizeLinear", inputs, f"{name}/DequantizeLinear")
        made.dtype, made.shape = ir.DataType.from_numpy(scale.dtype), stored.shape
        return made

    def _zero_point(self, form: Format, scale: Array, name: str) -> list[ir.Value]:
        """Zero, which says the type too; of INT8 from opset 21 on none, and the type is an attribute.

        ONNX Runtime 1.32 moves a QuantizeLinear over a Reshape and loses its zero point, and with it the type: it then
        refuses the graph.
        """
        if form.dtype == ir.DataType.INT8 and self.build.model.opset >= 21:
            return []
        return [self.build.constant(np.zeros(scale.shape, form.dtype.numpy()), f"{name}_zero_point", form.dtype)]

    def _scale(self, scale: Array, name: str) -> ir.Value:
        return self.build.constant(scale, f"{name}_scale", ir.DataType.from_numpy(scale.dtype))

    def weight(
        self, product: Product, form: Format, scale: Array, block: int = 0, codes: ir.TensorProtocol | None = None
    ) -> None:
        """Store the weight as `form` behind a DequantizeLinear; what else reads the weight keeps it as it is.

        Args:
            scale: as of `formats.quantized`, in the weight's own type.
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
        made = self.build.op(
            "DequantizeLinear", [stored, scales], f"{name}/DequantizeLinear", dtype=product.tensor.dtype, **attributes
        )
        made.shape = product.weight.shape
        reader.replace_input_with(index, made)

    def activation(self, value: ir.Value, products: Sequence[Product], form: Format, scale: Array) -> None:
        """Let `products` read `value` rounded to `form`."""
        self.build.before = _first(products)
        rounded = self.pair(value, form, scale, f"{value.name}/{form.dtype.name.lower()}")
        for product in products:
            product.node.replace_input_with(1 - product.index, rounded)

    def activation_per_token(
        self, value: ir.Value, products: Sequence[Product], form: Format, dtype: ir.DataType
    ) -> None:
        """Let `products` read `value` rounded with a scale for each token, which is computed in the graph.

        The tokens are divided by their scale, rounded with the constant scale 1, and the products multiplied by the
        scale: so Q and DQ have constant scales, which TensorRT demands, and the product stays one of integers.
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
        """The result of a product times `scale`, before its bias is added."""
        bias = node.inputs[2] if is_op(node, "Gemm") and len(node.inputs) > 2 else None
        self.build.before = None  # the graph is sorted when all is done
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
    """`value` times a number, such as the alpha or beta of a Gemm; no node for 1."""
    dtype = stored_dtype(value)
    if factor == 1 or dtype is None:
        return value
    made = build.op(
        "Mul", [value, build.constant(np.array(factor, dtype.numpy()), name, dtype)], f"{name}/Mul", dtype=dtype
    )
    made.shape = value.shape
    return made


def _first(products: Sequence[Product]) -> ir.Node:
    """The one that comes first in the graph: products of a group lie in graph order."""
    return products[0].node


def weight_scale(product: Product, form: Format, *, per_channel: bool, block: int = 0) -> Array:
    """Scale by the largest magnitude: one, of each output channel, or of each block; read a slab at a time."""
    amax = magnitudes(product.tensor, product.axis, block)
    return scale_of(amax if per_channel or block else amax.max(), form, product.tensor.dtype)


def is_quantized(product: Product) -> bool:
    """Whether the weight or the activation already goes through Q/DQ."""
    return (
        product.quantized
        or is_op(product.activation.producer(), "DequantizeLinear")
        or constant_tensor(product.activation) is not None
    )
