"""Reading, checking and mending the network that TensorRT's parser made.

Every function takes the TensorRT module as `trt`: TensorRT and TensorRT-RTX share this interface.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.masks import HALF_LOWEST
from onnxtools.base.errors import JobError
from onnxtools.engines.build.builder import TensorInfo
from onnxtools.ir.model import Model

_NAMES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn", "INT64": "int64",
    "INT32": "int32", "INT8": "int8", "UINT8": "uint8", "BOOL": "bool", "INT4": "int4", "FP4": "float4_e2m1fn",
    "E8M0": "float8_e8m0fnu",
}  # fmt: skip


def dtype_name(dtype: Any) -> str:
    """numpy's (or ml_dtypes') name of a TensorRT data type."""
    return _NAMES.get(dtype.name, str(dtype.name))


def read_io(network: Any) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Inputs and outputs of the network, in order."""

    def info(tensor: Any) -> TensorInfo:
        return TensorInfo(tensor.name, dtype_name(tensor.dtype), tuple(tensor.shape))

    inputs = [info(network.get_input(i)) for i in range(network.num_inputs)]
    return inputs, [info(network.get_output(i)) for i in range(network.num_outputs)]


def check_io(model: Model, inputs: list[TensorInfo], outputs: list[TensorInfo]) -> None:
    """Refuse a network whose names or dtypes are not the graph's.

    Raises:
        JobError: names the tensor and both dtypes.
    """
    graph_inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    for kind, values, infos in (("input", graph_inputs, inputs), ("output", model.graph.outputs, outputs)):
        types = {info.name: info.dtype for info in infos}
        graph_types = {value.name or "": value.dtype for value in values}
        for name in sorted(set(types) ^ set(graph_types)):
            where = "the graph" if name in graph_types else "the parsed network"
            raise JobError(
                f"{model.path}: {kind} {name!r} is only in {where}; simplify the graph around it and report this"
            )
        for name, dtype in graph_types.items():
            if dtype is not None and types[name] != _graph_name(dtype):
                dtypes = f"{_graph_name(dtype)} in the graph but {types[name]} for TensorRT"
                raise JobError(f"{model.path}: {kind} {name!r} is {dtypes}; cast it in the graph")


def _graph_name(dtype: ir.DataType) -> str:
    return str(dtype.numpy().name)


def histogram(network: Any) -> tuple[dict[str, int], dict[str, int]]:
    """(layer type -> count, dtype -> layer outputs) of the network, most frequent first."""
    layers: Counter[str] = Counter()
    precisions: Counter[str] = Counter()
    for layer in map(network.get_layer, range(network.num_layers)):
        layers[layer.type.name] += 1
        outputs = map(layer.get_output, range(layer.num_outputs))
        precisions.update(dtype_name(output.dtype) for output in outputs if output is not None)
    return dict(layers.most_common()), dict(precisions.most_common())


def refuse_shape_inputs(model: Model, network: Any) -> None:
    """Refuse inputs whose values decide shapes: their profiles would need values, not shapes.

    Raises:
        JobError: names the input.
    """
    for tensor in map(network.get_input, range(network.num_inputs)):
        if tensor.is_shape_tensor:
            raise JobError(
                f"{model.path}: the values of input {tensor.name!r} decide shapes; compute them in the graph instead"
            )


def attentions(trt: Any, network: Any) -> list[Any]:
    """The IAttention of every Attention of the network; its attributes read and change the network."""
    layers = []
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layers.append(layer.attention)
    return layers


def mend_attention(trt: Any, network: Any) -> list[str]:
    """Make every Attention buildable with the meaning of ONNX; returns one line for each kind of change.

    - Attention is marked decomposable: without a fused kernel (fp32 has none) TensorRT would refuse it; with one
      nothing changes.
    - Boolean masks become additive masks in the compute dtype, which fused kernels take. Hidden keys get half of the
      lowest finite number, whose exponential is 0; a row with every key hidden becomes the mean of the values.
    Each change is read back from the network.

    Raises:
        JobError: a change did not hold.
    """
    decomposed, additive = [], []
    for attention in attentions(trt, network):
        if not attention.decomposable:
            attention.decomposable = True
            decomposed.append(attention)
        if attention.mask is not None and attention.mask.dtype == trt.DataType.BOOL:
            attention.mask = _additive(trt, network, attention)
            additive.append(attention)
    for attention in attentions(trt, network):
        name, query = attention.name, attention.get_input(0).dtype
        if not attention.decomposable or (attention.mask is not None and attention.mask.dtype != query):
            raise JobError(
                f"node {name!r} (Attention): TensorRT loses its mended mask; run `onnxtools decompose-attention`"
            )
    mends = [f"{len(decomposed)} Attention nodes marked decomposable"] if decomposed else []
    return mends + ([f"{len(additive)} boolean attention masks made additive"] if additive else [])


def _additive(trt: Any, network: Any, attention: Any) -> Any:
    """where(mask, 0, lowest / 2) in the dtype of the queries."""
    mask, dtype = attention.mask, attention.get_input(0).dtype
    shape = (1,) * len(mask.shape)
    half = dtype.name == "HALF"
    lowest = HALF_LOWEST[ir.DataType.FLOAT16 if half else ir.DataType.FLOAT]

    def constant(value: float) -> Any:
        array = np.full(shape, value, dtype=np.float16 if half else np.float32)
        tensor = network.add_constant(shape, array).get_output(0)
        return tensor if tensor.dtype == dtype else network.add_cast(tensor, dtype).get_output(0)

    return network.add_select(mask, constant(0.0), constant(lowest)).get_output(0)
