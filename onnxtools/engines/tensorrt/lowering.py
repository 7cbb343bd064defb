"""Changes of the graph for TensorRT's parser; the ONNX file itself is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx
import onnx_ir as ir

from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute

MX_DEQUANTIZE = "TRT_MXFP8DequantizeLinear"


def lowered(model: Model, *more: Callable[[Model], list[str]]) -> tuple[bytes, list[str]] | None:
    """The serialized graph for TensorRT's parser, and notes on the changes; None if the file can be parsed as it is.

    `more` are changes that one library alone needs; they get a copy of the graph.

    - MXFP8 weights: TensorRT-RTX 1.7 imports no FLOAT8E8M0 initializer. DequantizeLinear-24 with such a scale becomes
      TensorRT's own operator, whose scale is the same bytes as uint8.
    - Attention with `softmax_precision`: the parser refuses the attribute. TensorRT's fused attention computes its
      softmax in fp32 anyway, so only fp32 is dropped.
    - Dimensions that an exporter calls unknown, all by one name: TensorRT would make one size of them.
    External weights stay where they are: parse with the file's path.
    """
    nodes = list(model.graph.all_nodes())
    scales = {
        node.inputs[1].name
        for node in nodes
        if node.op_type == "DequantizeLinear"
        and len(node.inputs) > 1
        and node.inputs[1] is not None
        and _is_e8m0(node.inputs[1])
    }
    softmax = {
        node.name
        for node in nodes
        if node.op_type == "Attention" and attribute(node, "softmax_precision") == ir.DataType.FLOAT
    }
    if not scales and not softmax and not more and not model.unnamed:
        return None
    proto, notes = model.proto(), list[str]()
    if more:
        copy = Model(ir.from_proto(proto), model.path)
        for tensor in copy.external_tensors():
            tensor.base_dir = model.path.parent if model.path is not None else ""
        notes = [note for change in more for note in change(copy)]
        proto = ir.to_proto(copy.ir)
    notes += [*_lower_mx(proto, scales), *_lower_softmax(proto, softmax)]
    del proto.graph.value_info[:]
    return proto.SerializeToString(), notes


def _lower_mx(proto: onnx.ModelProto, scales: set[str | None]) -> Iterator[str]:
    if not scales:
        return
    for initializer in proto.graph.initializer:
        if initializer.name in scales:
            initializer.data_type = onnx.TensorProto.UINT8
    count = 0
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) > 1 and node.input[1] in scales:
            node.op_type, node.domain, count = MX_DEQUANTIZE, "trt", count + 1
    if not any(entry.domain == "trt" for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid("trt", 1))
    yield f"{count} MXFP8 weights handed to TensorRT as {MX_DEQUANTIZE}"


def _lower_softmax(proto: onnx.ModelProto, names: set[str | None]) -> Iterator[str]:
    for node in proto.graph.node:
        if node.op_type == "Attention" and node.name in names:
            attributes = [a for a in node.attribute if a.name != "softmax_precision"]
            del node.attribute[:]
            node.attribute.extend(attributes)
    if names:
        yield (
            f"softmax_precision of {len(names)} Attention nodes dropped: TensorRT's parser refuses it, its attention "
            "computes softmax in fp32"
        )


def _is_e8m0(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT8E8M0
