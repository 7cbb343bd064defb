"""Checks before the builder starts; each refusal names the node and the next step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.base.errors import JobError, UsageError
from onnxtools.engines.build.builder import Reader
from onnxtools.engines.build.gpus import named, ways_on
from onnxtools.engines.build.sparse_weights import Sparsity, check_sparsity
from onnxtools.engines.build.spec import EngineSpec, capability
from onnxtools.engines.build.traps import Graph, check_traps, refuse
from onnxtools.ir.model import Model
from onnxtools.ir.query import FP8_DTYPES, TE_QDQ, attribute, constant_tensor, is_fp8_qdq, is_op, stored_dtype

FP8_CAPABILITY = "8.9"
"""The first compute capability with FP8 tensor cores (Ada)."""


@dataclass
class Preflight:
    """What the checks found that is no reason to stop.

    Attributes:
        notes: lines for people.
        sparsity: the 2:4 products, if sparsity was asked for.
    """

    notes: list[str] = field(default_factory=list)
    sparsity: Sparsity | None = None


def preflight(model: Model, spec: EngineSpec, builder: Reader, *, strong: bool = True) -> Preflight:
    """Check the graph against the specification and the builder.

    Args:
        strong: whether the network will be strongly typed, so that types must be in the graph.

    Raises:
        UsageError: a compute capability that the builder does not know.
        JobError: the graph is not what was asked for, or would be refused or misread; names the node.
    """
    graph, result = Graph(model), Preflight()
    _check_limits(model, spec, builder)
    _check_fp8(graph, spec)
    _check_demands(graph, spec, strong)
    _check_supported(graph, builder)
    check_traps(graph)
    _check_scales(graph)
    _check_zero_points(graph)
    _check_caches(graph)
    if spec.sparsity != "disable":
        result.sparsity = _check_sparsity(model, forced=spec.sparsity == "force" and builder.name == "trtexec")
        result.notes.append(f"sparsity: {result.sparsity}")
    return result


def _check_limits(model: Model, spec: EngineSpec, builder: Reader) -> None:
    limits = builder.limits()
    unknown = [text for text in spec.compute_capability if text not in limits.capabilities]
    if unknown and limits.capabilities:
        raise UsageError(
            f"--compute-capability {named(unknown[0])}: {builder.name} does not build for it; "
            f"{ways_on(limits.capabilities)}"
        )
    if model.opset > limits.opset:
        remedy = f"export it at opset {limits.opset} or older (no pass lowers an opset)"
        raise JobError(f"{model.path}: opset {model.opset}, but {builder.name} reads up to {limits.opset}; {remedy}")
    if model.ir.ir_version > limits.ir_version:
        remedy = f"`onnxtools set-opset IN OUT --ir-version {limits.ir_version}`"
        raise JobError(
            f"{model.path}: IR version {model.ir.ir_version}, but {builder.name} reads up to {limits.ir_version}; run "
            f"{remedy}"
        )


def _check_fp8(graph: Graph, spec: EngineSpec) -> None:
    quantized = any(is_fp8_qdq(node) for node in graph.nodes())
    if spec.fp8 and not quantized:
        raise JobError(
            f"{graph.model.path}: --fp8, but no QuantizeLinear or DequantizeLinear in the graph is FP8;"
            " make one with `onnxtools quantize --fp8`, or `onnxtools convert` a TransformerEngine FP8 export"
        )
    lacking = [text for text in spec.compute_capability if capability(text) < capability(FP8_CAPABILITY)]
    if lacking and (quantized or _holds_fp8(graph)):
        raise JobError(
            f"{graph.model.path}: the graph is FP8, which compute capability {', '.join(lacking)} lacks;"
            f" build for {FP8_CAPABILITY} or newer, or build a graph without FP8"
        )


_DEMANDS = {
    "fp16": ({ir.DataType.FLOAT16}, "onnxtools precision --to fp16"),
    "bf16": ({ir.DataType.BFLOAT16}, "onnxtools precision --to bf16"),
    "int8": ({ir.DataType.INT8, ir.DataType.UINT8}, "onnxtools quantize --int8"),
    "int4": ({ir.DataType.INT4, ir.DataType.UINT4}, "onnxtools quantize --int4-awq"),
}


def _check_demands(graph: Graph, spec: EngineSpec, strong: bool) -> None:
    """Refuse a demanded type that the graph lacks: a strongly typed network has the types of the graph alone."""
    for name, (types, remedy) in _DEMANDS.items():
        if not (strong and getattr(spec, name)):
            continue
        values = [value for value, _ in graph.model.weights()] + [
            value for node in graph.nodes() for value in node.outputs
        ]
        if not any(stored_dtype(value) in types for value in values):
            lacks = f"--{name}, but nothing in the graph is {name.upper()}, and its types are what the engine has"
            raise JobError(f"{graph.model.path}: {lacks}; make it with `{remedy}` from the fp32 model")


def _holds_fp8(graph: Graph) -> bool:
    values = [value for value, _ in graph.model.weights()] + list(graph.model.graph.inputs)
    return any(stored_dtype(v) in FP8_DTYPES for v in values) or any(
        is_op(n, "Cast") and attribute(n, "to") in FP8_DTYPES for n in graph.nodes()
    )


def _check_supported(graph: Graph, builder: Reader) -> None:
    functions = graph.model.ir.functions
    supported: dict[str, bool] = {}
    problems: list[tuple[ir.Node, str]] = []
    for node in graph.nodes():
        if node.op_identifier() in functions:
            continue
        if node.op_type not in supported:
            supported[node.op_type] = builder.supports(node.op_type)
        if not supported[node.op_type]:
            problems.append((node, f"{builder.name}'s parser has no such operator; {_way_on(node)}"))
    refuse(problems)


_REPLACED = ("SplitToSequence", "SequenceAt", "CastLike", "Dropout")
"""Operators that the pass legalize replaces."""


def _way_on(node: ir.Node) -> str:
    """Advice on an operator that the parser does not know."""
    if node.domain == "trt" or node.op_type in _REPLACED:
        return "`onnxtools convert` replaces it"
    if node.domain == "com.microsoft" and node.op_type in ("MatMulNBits", "GemmFloat8"):
        return (
            "it is ONNX Runtime's own, as --lower ort and GenAI's builder make it; build the graph from before, or "
            "quantize that one"
        )
    if node.domain == "com.microsoft":
        return (
            "it is ONNX Runtime's own, as its optimizer and GenAI's builder make it; export the model without them, "
            "or run this one in ONNX Runtime"
        )
    return "write the model without it, give --plugins a library that has it, or run the graph in ONNX Runtime"


def _check_scales(graph: Graph) -> None:
    problems: list[tuple[ir.Node, str]] = []
    for node in graph.nodes():
        if not is_op(node, "QuantizeLinear", "DequantizeLinear") and not is_op(node, *TE_QDQ[:2], domain="trt"):
            continue
        scale = _elements(graph, node.inputs[1])
        if scale is None:
            continue
        with np.errstate(invalid="ignore"):
            bad = scale[~(np.isfinite(scale) & (scale > 0))]
        if bad.size:
            reason = (
                f"its scale is {bad.flat[0]:g}, but TensorRT takes finite scales above 0 only; calibrate and export "
                "again"
            )
            problems.append((node, reason))
    refuse(problems)


def _check_zero_points(graph: Graph) -> None:
    """Refuse asymmetric quantization: TensorRT takes zero points of zero and signed types alone."""
    problems: list[tuple[ir.Node, str]] = []
    for node in graph.nodes():
        if not is_op(node, "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
            continue
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        elements = _elements(graph, zero)
        kind = stored_dtype(zero) or stored_dtype(
            node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
        )
        advice = (
            "quantize the fp32 model symmetrically: `onnxtools quantize --int8`, or ONNX Runtime's quantize_static "
            "with QInt8 and ActivationSymmetric"
        )
        if elements is not None and elements.any():
            problems.append(
                (
                    node,
                    f"its zero point is {elements.reshape(-1)[elements.reshape(-1) != 0][0]:g}, and TensorRT takes "
                    f"zero alone; {advice}",
                )
            )
        elif kind in _UNSIGNED or node.op_type == "DynamicQuantizeLinear":
            problems.append(
                (
                    node,
                    f"it quantizes to {kind.name if kind else 'UINT8'}, and TensorRT has signed integers alone; "
                    f"{advice}",
                )
            )
    refuse(problems)


_UNSIGNED = {ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT4}


def _check_caches(graph: Graph) -> None:
    """Refuse static caches that are no network inputs in fp32, fp16 or bf16.

    Source: IKVCacheUpdateLayer in the TensorRT 11 documentation.
    """
    problems: list[tuple[ir.Node, str]] = []
    for node in graph.nodes():
        cache = node.inputs[0] if is_op(node, "TensorScatter") else None
        if cache is not None and (not cache.is_graph_input() or stored_dtype(cache) not in _CACHE_TYPES):
            problems.append(
                (
                    node,
                    "TensorRT updates a static cache in place only where it is an input in fp32, fp16 or bf16; "
                    "quantize a concat cache instead",
                )
            )
    refuse(problems)


_CACHE_TYPES = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def _elements(graph: Graph, value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """Elements, float32, of a constant or of a value computed from constants; None if they depend on the data."""
    if value is None:
        return None
    tensor = constant_tensor(value)
    elements = tensor.numpy() if tensor is not None else graph.constants.get(value)
    return None if elements is None else np.asarray(elements).astype(np.float32)


def _check_sparsity(model: Model, *, forced: bool) -> Sparsity:
    """The 2:4 products; refuses a graph without any, unless `forced`: trtexec then overwrites the weights itself."""
    result = check_sparsity(model)
    if result.sparse == 0 and not forced:
        first = f"{result.layers[0].weight}: {result.layers[0].reason}" if result.layers else "there is no product"
        raise JobError(
            f"{model.path}: --sparsity, but {result} along the summed axis ({first}); prune them with `onnxtools prune "
            "IN OUT`"
        )
    return result
