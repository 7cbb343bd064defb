"""Rewrite INT4 products to com.microsoft.MatMulNBits, FP8 ones to GemmFloat8, experts to MoE, for ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.experts import mixtures
from onnxtools.analysis.products import Product, weight_products
from onnxtools.base.options import option
from onnxtools.ir.edit import Builder, remove_unused
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, constant_tensor, is_op
from onnxtools.passes.lower_experts import lower_mixture
from onnxtools.passes.qdq import times
from onnxtools.pipeline.passbase import Pass, PassResult
from onnxtools.storage.lazy import shape_of
from onnxtools.storage.rows import RowTensor, Scratch, StreamedTensor, elements, raw_bytes, read_rows

Array = np.ndarray[Any, Any]

_BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class LowerOrt(Pass):
    """Rewrite INT4 products as MatMulNBits, mixtures of experts as MoE, and with --fp8 FP8 products as GemmFloat8.

    Rules:
      - MatMul or Gemm whose weight is an INT4 initializer behind DequantizeLinear with blocks along K;
      - an INT4 value v is stored as v + 8 in four bits, the operator's default zero point: one bit of each is flipped;
      - the layout is [N, K / block, block / 2]; weights stored as [K, N] are transposed;
      - a mixture of experts with a softmax router and SwiGLU of 16 or 32 bits becomes one MoE; stacks of the weights
        are joined expert by expert while they are written;
      - --fp8: a Gemm of an activation and a weight [N, K] behind FP8 Q/DQ with one scale each, K and N multiples of 16;
      - the result is for ONNX Runtime; build engines from the file in standard operators.

    GemmFloat8 is for CUDA and many tokens at once, as in scoring and prefill (H200, 4096 x 16384: 2048 tokens 313 us,
    fp16 446, plain Q/DQ 558). With few tokens it is slower (16 tokens 117 us, fp16 37), so a decoder keeps its Q/DQ.
    """

    name = "lower-ort"
    numerics = "rounding"
    example = "onnxtools lower-ort int4.onnx int4_ort.onnx"

    fp8: bool = option(False, "FP8 products too, as GemmFloat8: for CUDA, and many tokens at once.")

    def apply(self, model: Model) -> PassResult:
        build, counts = Builder(model), Counter[str]()
        for product in list(weight_products(model)):
            dequantize = _blocks(product)
            if dequantize is not None:
                _rewrite(build, product, dequantize)
                counts["MatMulNBits"] += 1
            elif self.fp8 and _is_fp8(product):
                _to_gemm_float8(build, product)
                counts["GemmFloat8"] += 1
        left = Counter[str]()
        for mixture in list(mixtures(model.graph)):
            reason = lower_mixture(build, mixture)
            counts["MoE"] += not reason
            left[reason] += bool(reason)
        counts += Counter()  # without zeros
        notes = [
            f"{count} {'mixtures of experts' if name == 'MoE' else 'products'} became {name}, for ONNX Runtime alone"
            for name, count in counts.items()
        ]
        if self.fp8 and not counts["GemmFloat8"]:
            notes.append("no Gemm with FP8 Q/DQ of one scale on both sides found")
        notes += [f"{count} mixtures of experts left: {reason}" for reason, count in (left + Counter()).items()]
        if not counts:
            return PassResult(False, 0, [*notes, "no product with an INT4 weight in blocks along K, no experts found"])
        model.graph.opset_imports["com.microsoft"] = 1
        remove_unused(model)
        return PassResult(True, counts.total(), notes)


def _blocks(product: Product) -> ir.Node | None:
    """The DequantizeLinear of an INT4 weight in blocks along K; None where MatMulNBits cannot take the product."""
    if (
        len(product.path) != 1
        or product.tensor.dtype != ir.DataType.INT4
        or len(product.tensor.shape) != 2
        or product.index != 1
        or product.obstacle
    ):
        return None
    node = product.path[0]
    fits = (
        is_op(node, "DequantizeLinear")
        and attribute(node, "block_size", 0) in _BLOCKS
        and attribute(node, "axis", 1) % 2 == product.axis
    )
    return node if fits and len(node.inputs) == 2 and constant_tensor(node.inputs[1]) is not None else None


def _rewrite(build: Builder, product: Product, dequantize: ir.Node) -> None:
    node, tensor, block = product.node, product.tensor, attribute(dequantize, "block_size")
    size, outputs = (int(product.tensor.shape.numpy()[axis]) for axis in (product.axis, 1 - product.axis))
    scales = constant_tensor(dequantize.inputs[1])
    assert scales is not None
    name = product.weight.name or "weight"
    stored = build.initializer(
        _Nibbles(tensor, product.axis, (outputs, size // block, block // 2), name), f"{name}_nbits"
    )
    array = elements(scales)
    wide = array if product.axis == 1 else np.ascontiguousarray(array.T)
    factor = build.initializer(ir.Tensor(wide, dtype=scales.dtype), f"{name}_nbits_scale")
    build.before = node
    result = build.op(
        "MatMulNBits",
        [product.activation, stored, factor],
        f"{node.name}/MatMulNBits",
        domain="com.microsoft",
        dtype=scales.dtype,
        K=size,
        N=outputs,
        bits=4,
        block_size=block,
    )
    _replace(build, node, result)


def _is_fp8(product: Product) -> bool:
    """Whether cublasLt can compute the product in FP8: a Gemm with the weight [N, K] and one scale on each side."""
    node, source = product.node, product.activation.producer()
    if (
        not is_op(node, "Gemm")
        or len(product.path) != 1
        or product.axis != 1
        or product.index != 1
        or attribute(node, "transA", 0)
    ):
        return False
    if (
        attribute(node, "alpha", 1.0) != 1.0
        or attribute(node, "beta", 1.0) != 1.0
        or any(size % 16 for size in product.tensor.shape.numpy())
    ):
        return False
    if (
        source is None
        or not is_op(source, "DequantizeLinear")
        or not is_op(source.inputs[0].producer() if source.inputs[0] else None, "QuantizeLinear")
    ):
        return False
    zero = constant_tensor(source.inputs[2]) if len(source.inputs) > 2 else None
    scales = [constant_tensor(side.inputs[1]) for side in (source, product.path[0])]
    kinds = {product.tensor.dtype, zero.dtype if zero is not None else None}
    return kinds == {ir.DataType.FLOAT8E4M3FN} and all(scale is not None and scale.size == 1 for scale in scales)


def _to_gemm_float8(build: Builder, product: Product) -> None:
    node, source, weight = product.node, product.activation.producer(), product.path[0]
    assert source is not None
    build.before = node
    scales = []
    for side in (source, weight):
        tensor = constant_tensor(side.inputs[1])
        assert tensor is not None
        scales.append(build.constant(tensor.numpy().astype(np.float32).reshape(1), f"{side.inputs[1].name}_fp32"))  # type: ignore[union-attr]
    dtype = weight.outputs[0].dtype or node.outputs[0].dtype or ir.DataType.FLOAT16
    name, inputs = f"{node.name}/GemmFloat8", [source.inputs[0], product.weight, None, *scales]
    result = build.ops("GemmFloat8", inputs, name, domain="com.microsoft", transB=1, dtype=dtype.value)[0]
    result.dtype = dtype
    _replace(build, node, result)


def _replace(build: Builder, node: ir.Node, result: ir.Value) -> None:
    """Replace the output of `node` by `result`, with the alpha, beta and bias of a Gemm applied."""
    bias = node.inputs[2] if is_op(node, "Gemm") and len(node.inputs) > 2 else None
    old = node.outputs[0]
    result = times(build, result, float(attribute(node, "alpha", 1.0)), f"{node.name}/alpha")
    if bias is not None:
        bias = times(build, bias, float(attribute(node, "beta", 1.0)), f"{node.name}/beta")
        result = build.op("Add", [result, bias], f"{node.name}/bias", dtype=old.dtype)
    result.shape = old.shape
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    result.name, old.name = old.name, f"{old.name}__replaced"
    assert node.graph is not None
    node.graph.remove(node, safe=True)


class _Nibbles(RowTensor):
    """An INT4 weight [N, K] or [K, N] as uint8 [N, K / block, block / 2], with 8 added to each element.

    `axis` is the axis of K in the source.
    """

    __slots__ = ("_axis",)

    def __init__(self, source: ir.TensorProtocol, axis: int, shape: tuple[int, ...], name: str) -> None:
        super().__init__(shape, ir.DataType.UINT8, name, [source])
        self.row_multiple = 1 if axis == 1 else shape[0]  # a transposition needs all rows
        self._axis = axis

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> Array:
        packed = _packed(self.sources[0], start, stop) if self._axis == 1 else _transposed(self.sources[0])
        return np.bitwise_xor(packed, np.uint8(0x88)).reshape(stop - start, *shape_of(self)[1:])


def _packed(tensor: ir.TensorProtocol, start: int, stop: int) -> Array:
    """Rows `start` to `stop` of an INT4 matrix as bytes, uint8 [rows, columns / 2]."""
    rows, columns = shape_of(tensor)
    if isinstance(tensor, ir.ExternalTensor):
        flat = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            ir.DataType.UINT8,
            shape=ir.Shape((rows, columns // 2)),
            name=tensor.name or "",
            base_dir=tensor.base_dir,
        )
        return read_rows(flat, start, stop)
    if isinstance(tensor, StreamedTensor):
        return np.frombuffer(raw_bytes(tensor.rows(start, stop)), np.uint8).reshape(stop - start, columns // 2)
    return np.frombuffer(tensor.tobytes(), np.uint8).reshape(rows, columns // 2)[start:stop]


def _transposed(tensor: ir.TensorProtocol) -> Array:
    """The transpose of an INT4 matrix [rows, columns] as bytes, uint8 [columns, rows / 2]."""
    rows, columns = shape_of(tensor)
    packed = _packed(tensor, 0, rows)
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, columns)
    turned = np.ascontiguousarray(nibbles.T)
    return np.asarray(turned[:, 0::2] | turned[:, 1::2] << 4)
