"""The builder's last message, kept in memory that outlives a crash of the builder's process, and the report of a crash.

The module also says which graphs are built in a process of their own. TensorRT-RTX 1.7.1 ends without a message: with
SIGSEGV on graphs with an If (silero-vad 6.2.3), and with SIGFPE where norms read FP8 products of one fp32 input (OLMo
2; in fp16 it builds). Nothing else in language models has caused this.
"""

from __future__ import annotations

import signal
from typing import Any

import onnx_ir as ir

from onnxtools.engines.build.traps import label
from onnxtools.ir.model import Model
from onnxtools.ir.query import graphs_inside, is_op

SIZE = 512
"""Bytes of the shared memory, the terminating zero included."""
_ORDINARY = {
    "Abs", "Add", "And", "Attention", "Cast", "CastLike", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv",
    "Cos", "CumSum", "DequantizeLinear", "Div", "Dropout", "Equal", "Erf", "Exp", "Expand", "Gather", "Gelu", "Gemm",
    "Greater", "GreaterOrEqual", "Identity", "IsNaN", "LayerNormalization", "Less", "LessOrEqual", "Log", "MatMul",
    "Max", "Min", "Mul", "Neg", "Not", "Or", "Pow", "QuantizeLinear", "RMSNormalization", "Range", "Reciprocal",
    "ReduceMax", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "RotaryEmbedding", "ScatterND",
    "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "SplitToSequence", "SequenceAt", "Sqrt", "Squeeze", "Sub",
    "Swish", "Tanh", "TensorScatter", "Transpose", "Trilu", "Unsqueeze", "Where",
}  # fmt: skip
_room: Any = None


def keep_in(room: Any) -> None:
    """Keep messages in `room`, a `multiprocessing` array of `SIZE` bytes that this process shares with its parent."""
    global _room
    _room = room


def say(text: str) -> None:
    """Keep a message of the builder, cut to `SIZE` - 1 bytes; nothing happens without `keep_in`."""
    if _room is not None:
        _room.value = text.encode(errors="replace")[: SIZE - 1]


def unusual_node(model: Model) -> str:
    """The label of the first node with a subgraph, else of the first that language models lack or that has crashed.

    Returns "" if there is none.
    """
    nodes = [node for node in model.nodes_everywhere() if node.op_identifier() not in model.ir.functions]
    inner = (node for node in nodes if any(True for _ in graphs_inside(node)))
    unusual = (node for node in nodes if node.op_type not in _ORDINARY and node.domain in ("", "ai.onnx"))
    suspect = next(inner, None) or next(unusual, None) or next(filter(_is_norm_of_quantized, nodes), None)
    return label(suspect) if suspect is not None else ""


def _is_norm_of_quantized(node: ir.Node) -> bool:
    product = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if not is_op(node, "RMSNormalization", "LayerNormalization") or product is None or product.op_type != "Gemm":
        return False
    weight = product.inputs[1].producer() if product.inputs[1] is not None else None
    return weight is not None and weight.op_type == "DequantizeLinear"


def epitaph(model: Model, title: str, code: int, words: str) -> str:
    """One line for a process that ended with `code` (negative: a signal) while it built `model`.

    Args:
        title: name of the builder.
        words: the builder's last message, or "".
    """
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    parsing, _, node = words.partition("Parsing node: ")
    where = (
        f"at node {node}"
        if node and not parsing
        else f"after it said {words!r}"
        if words
        else "before it said anything"
    )
    unusual = unusual_node(model)
    suspect = (
        f"; the likely cause is {unusual}: `onnxtools fold-constants` may remove it, or run the graph in ONNX Runtime"
        if unusual
        else ""
    )
    return f"{model.path}: {title} crashed ({name}) {where}{suspect}"
