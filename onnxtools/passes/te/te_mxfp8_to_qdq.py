"""TransformerEngine's MXFP8 custom operators: constant weights become standard DequantizeLinear-24."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxtools.analysis.facts import analyse
from onnxtools.analysis.opsets import reach_opset
from onnxtools.base.errors import JobError
from onnxtools.base.options import option
from onnxtools.ir.edit import Builder, remove_unused, rename_or_bypass
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, constant_tensor, is_op
from onnxtools.numerics.fp8 import MX_BLOCK, mx_data_rows, mx_scale_rows
from onnxtools.passes.te.te_fp8_to_qdq import stored_weight
from onnxtools.pipeline.passbase import Pass, PassResult
from onnxtools.storage.rows import StreamedTensor

# TransformerEngine 2.6 emitted the dynamic operator under the name of the static one, with a single input.
QUANTIZE = ("TRT_MXFP8DynamicQuantize", "TRT_MXFP8QuantizeLinear")
DEQUANTIZE = "TRT_MXFP8DequantizeLinear"


@dataclass(frozen=True)
class TeMxfp8ToQdq(Pass):
    """`trt::TRT_MXFP8DynamicQuantize` and `TRT_MXFP8DequantizeLinear` of a weight become standard DequantizeLinear.

    The weight is stored as FP8 data with E8M0 scales.

    Rules:
      - the model goes to opset 24, the first whose DequantizeLinear takes E8M0 scales in blocks of 32 along the last
        axis;
      - a quantize of an activation has no standard form (ONNX cannot compute E8M0 scales): kept as it is with
        `keep_mx`, for TensorRT, else an error names it;
      - value_info of the kept operators is removed: TransformerEngine records padded scale shapes, TensorRT's shapes
        are not padded.
    """

    name = "te-mxfp8-to-qdq"
    example = "onnxtools te-mxfp8-to-qdq te.onnx qdq.onnx --keep-mx"

    keep_mx: bool = option(False, "Keep dynamic MXFP8 quantization of activations as TensorRT's custom operators.")

    def apply(self, model: Model) -> PassResult:
        nodes = [node for node in model.graph if is_op(node, *QUANTIZE, domain="trt")]
        if not nodes:
            return PassResult(False, 0, ["no TransformerEngine MXFP8 operator found"])
        dynamic = [node for node in nodes if stored_weight(node.inputs[0]) is None]
        if dynamic and not self.keep_mx:
            raise JobError(
                f"node {dynamic[0].name!r} ({dynamic[0].op_type}) quantizes an activation to MXFP8 at run time, which "
                "standard ONNX cannot express"
                f" ({len(dynamic)} such nodes); use --keep-mx to keep them for TensorRT, or export with FP8 delayed "
                "scaling"
            )
        notes = [reach_opset(model, 24)[1]] if len(dynamic) < len(nodes) else []
        facts = analyse(model)
        builder = Builder(model)
        for node in nodes:
            if node in dynamic:
                self._strip(node)
                continue
            shape = facts[node.inputs[0]].shape
            assert shape is not None
            if shape[-1] % MX_BLOCK:
                raise JobError(
                    f"node {node.name!r}: the last axis of the weight has {shape[-1]} elements, no multiple of "
                    f"{MX_BLOCK}; pad the weight"
                )
            self._fold(node, shape, builder)
        remove_unused(model)
        notes.append(f"{len(nodes) - len(dynamic)} weights stored as MXFP8 (FP8 data, E8M0 scales)")
        if dynamic:
            notes.append(
                f"{len(dynamic)} dynamic quantizations kept as trt:: operators: TensorRT runs them, ONNX Runtime does "
                "not"
            )
        return PassResult(True, len(nodes), notes)

    def _strip(self, node: ir.Node) -> None:
        if node.op_type != QUANTIZE[0]:
            node.op_type = QUANTIZE[0]
        readers = [user for user, _ in node.outputs[0].uses() if is_op(user, DEQUANTIZE, domain="trt")]
        for operator in (node, *readers):  # TensorRT's own defaults fit rank 2 only
            for name, value in (("axis", -1), ("block_size", MX_BLOCK)):
                operator.attributes.setdefault(name, ir.AttrInt64(name, value))
        for output in node.outputs:
            output.type = output.shape = None

    def _fold(self, node: ir.Node, shape: tuple[int, ...], builder: Builder) -> None:
        weight = stored_weight(node.inputs[0])
        tensor = constant_tensor(weight)
        assert weight is not None and tensor is not None
        data = StreamedTensor(tensor, mx_data_rows, dtype=ir.DataType.FLOAT8E4M3FN, name="data")
        scale_shape = (*shape[:-1], shape[-1] // MX_BLOCK)
        scale = StreamedTensor(tensor, mx_scale_rows, dtype=ir.DataType.FLOAT8E8M0, name="scale", shape=scale_shape)
        stored = [
            builder.initializer(data, f"{weight.name}_mxfp8"),
            builder.initializer(scale, f"{weight.name}_mx_scale"),
        ]
        for user, _ in list(node.outputs[0].uses()):
            if not is_op(user, DEQUANTIZE, domain="trt"):
                raise JobError(
                    f"node {user.name!r} ({user.op_type}) uses MXFP8 data without {DEQUANTIZE}; no standard form exists"
                )
            builder.before = user
            to = attribute(user, "output_dtype", ir.DataType.FLOAT.value)
            new = builder.op(
                "DequantizeLinear",
                stored,
                user.name or "DequantizeLinear",
                dtype=ir.DataType(to),
                axis=len(shape) - 1,
                block_size=MX_BLOCK,
                output_dtype=to,
            )
            rename_or_bypass(builder.graph, user.outputs[0], new)
