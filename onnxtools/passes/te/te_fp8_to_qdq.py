"""TransformerEngine's FP8 custom operators to standard QuantizeLinear / DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts, constants
from onnxtools.base.errors import JobError
from onnxtools.base.options import option
from onnxtools.ir.edit import Builder, remove_unused, rename_or_bypass, replace_keeping_name
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, constant_tensor, is_op
from onnxtools.numerics.formats import FP8, quantized
from onnxtools.pipeline.passbase import Pass, PassResult

Q, DQ = "TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear"
_FP8 = ir.DataType.FLOAT8E4M3FN
_NOTHING = "no TransformerEngine FP8 operator and no FP8-quantized constant weight found"
_DENORMAL = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class TeFp8ToQdq(Pass):
    """`trt::TRT_FP8QuantizeLinear` / `TRT_FP8DequantizeLinear` become ONNX Q/DQ in FLOAT8E4M3FN.

    Rules:
      - the second input already is a scale in QuantizeLinear's sense (x / scale, q * scale): it is kept as given, even
        if Q and DQ of one pair differ by an ulp;
      - a scale computed from constants is folded; one computed from the data (current scaling) stays dynamic;
      - the zero point is one shared FLOAT8E4M3FN initializer of the scale's shape, never a Cast, never a graph input;
      - x is cast to the scale's type where they differ, as opset < 23 demands;
      - Q of a constant weight is computed now: a stored FLOAT8E4M3FN initializer behind DequantizeLinear
        (`fold_weights`);
      - uint8 weights that feed DQ directly are FP8 bytes: reinterpreted bit for bit.
    """

    name = "te-fp8-to-qdq"
    example = "onnxtools te-fp8-to-qdq te.onnx qdq.onnx"

    fold_weights: bool = option(True, "Store weights as FP8 instead of quantizing them in the graph.")

    def requires(self, model: Model) -> None:
        if model.opset < 19 and any(is_op(node, Q, DQ, domain="trt") for node in model.graph.all_nodes()):
            remedy = (
                "raise it with `onnxtools set-opset IN OUT --version 19`, or in `onnxtools convert` with --opset 19"
            )
            raise JobError(f"FP8 Q/DQ needs opset 19 and the model is at {model.opset}; {remedy}")

    def apply(self, model: Model) -> PassResult:
        if not any(is_op(node, Q, DQ, domain="trt") or is_op(node, "QuantizeLinear") for node in model.graph):
            return PassResult(False, 0, [_NOTHING])
        views, agreed = constants(model)
        rewriter = _Rewriter(model, views[0], agreed)
        nodes = [node for node in model.graph if is_op(node, Q, DQ, domain="trt")]
        for node in nodes:
            rewriter.rewrite(node)
        folded = sum(
            rewriter.fold(node) for node in list(model.graph) if self.fold_weights and is_op(node, "QuantizeLinear")
        )
        if not nodes and not folded:
            return PassResult(False, 0, [_NOTHING])
        remove_unused(model)
        notes = [f"{len(nodes)} TransformerEngine Q/DQ operators made standard", f"{folded} weights stored as FP8"]
        return PassResult(True, len(nodes) + folded, notes + rewriter.notes())

    def ensures(self, model: Model) -> None:
        for node in model.graph.all_nodes():
            if is_op(node, Q, DQ, domain="trt"):
                raise JobError(
                    f"node {node.name!r} ({node.op_type}) lies inside a subgraph, where it cannot be rewritten; inline "
                    "the subgraph first"
                )


class _Rewriter:
    def __init__(self, model: Model, facts: Facts, agreed: dict[ir.Value, Any]) -> None:
        self.model, self.facts, self.agreed = model, facts, agreed
        self.builder = Builder(model)
        self.dynamic = 0
        self.denormal: list[str] = []

    def notes(self) -> list[str]:
        notes = [f"{self.dynamic} scales are computed from the data and stay dynamic"] if self.dynamic else []
        if self.denormal:
            notes.append(
                f"warning: scale of {self.denormal[0]} is denormal ({len(self.denormal)} such); hardware that flushes "
                "denormals divides by zero there"
            )
        return notes

    def rewrite(self, node: ir.Node) -> None:
        """Replace one TransformerEngine node by its standard operator."""
        self.builder.before = node
        if len(node.inputs) < 2 or node.inputs[1] is None:
            raise JobError(
                f"node {node.name!r} ({node.op_type}) has no scale input; re-export the model with TransformerEngine "
                "1.11 or later"
            )
        data, scale = node.inputs[0], self._scale(node)
        zero = self._zero_point(scale)
        op_type = "QuantizeLinear" if node.op_type == Q else "DequantizeLinear"
        wide = self.facts[scale].dtype or ir.DataType.FLOAT
        data = self._as_type(data, wide, node) if op_type == "QuantizeLinear" else self._as_fp8(data)
        new = self.builder.op(
            op_type, [data, scale, zero], node.name or op_type, dtype=_FP8 if op_type == "QuantizeLinear" else wide
        )
        axis = self._axis(node, scale)
        if axis is not None:
            new.producer().attributes["axis"] = ir.AttrInt64("axis", axis)  # type: ignore[union-attr]
        old = node.outputs[0]
        new.shape = old.shape
        self.facts[new] = self.facts[old]
        replace_keeping_name(self.model.graph, old, new)

    def _axis(self, node: ir.Node, scale: ir.Value) -> int | None:
        """The axis of a scale vector; None for a scale of one element."""
        shape, data_shape = self.facts[scale].shape, self.facts[node.inputs[0]].shape
        if not shape or shape == (1,):
            return None
        axis = attribute(node, "axis")
        if axis is None:
            fits = [a for a, d in enumerate(data_shape or ()) if d == shape[0]]
            if len(fits) != 1:
                raise JobError(
                    f"node {node.name!r}: a scale of shape {list(shape)} fits no single axis of "
                    f"{list(data_shape or ())}; add an axis attribute"
                )
            axis = fits[0]
        return int(axis)

    def _scale(self, node: ir.Node) -> ir.Value:
        """The scale as an initializer if it is constant (rank 0 for one element), else the computed value."""
        value = node.inputs[1]
        assert value is not None
        array = self.agreed.get(value)
        if array is None and constant_tensor(value) is not None:
            array = self.facts[value].value
        if array is None:
            self.dynamic += node.op_type == Q
            if self.facts[value].shape is None:
                raise JobError(
                    f"node {node.name!r}: the shape of its scale {value.name!r} is unknown; run onnx shape inference "
                    "first"
                )
            return value
        self._check_scale(node, array)
        array = array.reshape(()) if array.size == 1 else array
        scale = self.builder.constant(array, value.name or f"{node.name}/scale")
        self.facts[scale].shape = array.shape
        return scale

    def _check_scale(self, node: ir.Node, array: Any) -> None:
        numbers = np.asarray(array, dtype=np.float64)
        bad = numbers[~(np.isfinite(numbers) & (numbers > 0))]
        if bad.size:
            kind = "NaN" if np.isnan(bad[0]) else f"{bad[0]:g}"
            raise JobError(
                f"node {node.name!r} ({node.op_type}): its scale is {kind}, so quantization would give NaN or infinity "
                "and TensorRT refuses it; calibrate that tensor again and re-export"
            )
        if numbers.min() < _DENORMAL or (
            array.dtype == np.float16 and numbers.min() < float(np.finfo(np.float16).tiny)
        ):
            self.denormal.append(f"node {node.name!r}")

    def _zero_point(self, scale: ir.Value) -> ir.Value:
        shape = self.facts[scale].shape or ()
        return self.builder.constant(np.zeros(shape, dtype=ml_dtypes.float8_e4m3fn), "fp8_zero_point", _FP8)

    def _as_type(self, data: ir.Value | None, dtype: ir.DataType, node: ir.Node) -> ir.Value | None:
        if self.facts[data].dtype in (None, dtype):
            return data
        return self.builder.op("Cast", [data], f"{node.name}/Cast", dtype=dtype, to=dtype.value)

    def _as_fp8(self, data: ir.Value | None) -> ir.Value | None:
        """`data` as FP8 if it is a uint8 initializer with the FP8 bytes of a checkpoint; other values are unchanged."""
        tensor = constant_tensor(data)
        if data is None or tensor is None or tensor.dtype != ir.DataType.UINT8:
            return data
        return self.builder.initializer(_reinterpret(tensor), f"{data.name}_fp8")

    def fold(self, node: ir.Node) -> bool:
        """Replace QuantizeLinear(constant, constant scale) by an FP8 initializer; returns whether it was possible."""
        zero = constant_tensor(node.inputs[2]) if len(node.inputs) > 2 else None
        weight = stored_weight(node.inputs[0])
        scale = self.facts[node.inputs[1]].value if constant_tensor(node.inputs[1]) is not None else None
        if weight is None or scale is None or zero is None or zero.dtype != _FP8 or attribute(node, "block_size", 0):
            return False
        tensor = constant_tensor(weight)
        assert tensor is not None
        if scale.size > 1 and len(tensor.shape) != 2:
            return False
        channels = attribute(node, "axis", 1) % 2
        stored = quantized(tensor, FP8, scale, 1 - channels)
        rename_or_bypass(self.model.graph, node.outputs[0], self.builder.initializer(stored, f"{weight.name}_fp8"))
        return True


def stored_weight(value: ir.Value | None) -> ir.Value | None:
    """The floating-point constant behind `value`, through widening Casts and Identity."""
    while value is not None and constant_tensor(value) is None:
        node = value.producer()
        if not is_op(node, "Cast", "Identity") or node is None:
            return None
        if node.op_type == "Cast" and attribute(node, "to") != ir.DataType.FLOAT.value:
            return None
        value = node.inputs[0]
    tensor = constant_tensor(value)
    return (
        value if tensor is not None and tensor.dtype.is_floating_point() and tensor.dtype.itemsize in (2, 4) else None
    )


def _reinterpret(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            _FP8,
            shape=ir.Shape(list(tensor.shape.numpy())),
            name=tensor.name or "",
            base_dir=tensor.base_dir,
        )
    return ir.Tensor(tensor.numpy().view(ml_dtypes.float8_e4m3fn), dtype=_FP8, name=tensor.name)
