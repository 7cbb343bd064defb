"""Extra outputs of a session on a device: the greedy token, and the inputs of the next step."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.engines.kernels.rewrite import DOMAIN
from onnxtools.ir.edit import Builder
from onnxtools.ir.model import Model

NEXT = "onnxtools.next"
"""An output, int64 [rows, tokens]: the best token, or -1 where the logits are NaN.

With it a step copies 8 bytes per row to the host instead of the logits. Do not bind it to the memory of input_ids:
capturing runs the step twice, and the second run would read the first one's output.
"""
AHEAD = "onnxtools.ahead"
"""Prefix of the extra outputs of a capturable step: its own next inputs, and the tokens generated so far."""
PAST_TOKENS = f"{AHEAD}.past_tokens"
"""The extra input of a capturable step: the tokens generated before it, int64 [rows, slots]."""


def add_next_token(model: Model, *, ahead: bool, kernel: bool) -> None:
    """Add the output NEXT to the graph, and with `ahead` the outputs AHEAD and the input PAST_TOKENS.

    AHEAD.attention_mask, AHEAD.position_ids and AHEAD.write_indices are the inputs of the next step. The mask is 1 on
    the first tokens of a row, including the token of the step; the generated token follows them. AHEAD.tokens is
    PAST_TOKENS with the generated token in its place.

    Args:
        ahead: whether the caches are fixed buffers and steps can run ahead; a graph without a mask gets NEXT alone.
        kernel: whether onnxtools' operator NextToken may be used.
    """
    build = Builder(model)
    logits = next((value for value in model.graph.outputs if value.name == "logits"), model.graph.outputs[0])
    inputs = {value.name: value for value in model.graph.inputs}
    mask = inputs.get("attention_mask")
    if not ahead or mask is None:
        _output(model, _best(build, logits), NEXT, list(logits.shape)[:-1] if logits.shape is not None else None)
        return
    past = ir.Value(name=PAST_TOKENS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([None, None]))
    model.graph.inputs.append(past)
    if kernel and logits.dtype == ir.DataType.FLOAT:
        token, longer, tokens = build.ops(
            "NextToken", [logits, mask, past], f"{NEXT}/NextToken", outputs=3, domain=DOMAIN
        )
        model.graph.opset_imports[DOMAIN] = 1
    else:
        token = _best(build, logits)
        longer, tokens = _appended(build, mask, past, token)
    _output(model, token, NEXT, [None, None])
    _output(model, longer, f"{AHEAD}.attention_mask", [None, None])
    _output(model, tokens, f"{AHEAD}.tokens", [None, None])
    for name in ("position_ids", "write_indices"):
        if name in inputs:
            later = build.op("Add", [inputs[name], build.constant(np.array(1), f"{AHEAD}/one")], f"{AHEAD}/{name}")
            _output(model, later, f"{AHEAD}.{name}", [None] * len(inputs[name].shape or ()))


def _output(model: Model, value: ir.Value, name: str, dims: list[Any] | None) -> None:
    value.name, value.dtype, value.shape = name, ir.DataType.INT64, ir.Shape(dims) if dims is not None else None
    model.graph.outputs.append(value)


def _best(build: Builder, logits: ir.Value) -> ir.Value:
    best = build.op("ArgMax", [logits], f"{NEXT}/best", axis=-1, keepdims=1)
    logit = build.op("GatherElements", [logits, best], f"{NEXT}/logit", axis=-1)
    # infinity - infinity is NaN too
    bad = build.op("IsNaN", [build.op("Sub", [logit, logit], f"{NEXT}/zero")], f"{NEXT}/bad")
    checked = build.op("Where", [bad, build.constant(np.array(-1), f"{NEXT}/none"), best], f"{NEXT}/checked")
    return build.op("Squeeze", [checked, build.constant([-1], f"{NEXT}/axis")], f"{NEXT}/found")


def _appended(build: Builder, mask: ir.Value, past: ir.Value, token: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The mask with one more token per row, and the tokens with `token` in that place."""

    def op(op_type: str, operands: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
        return build.op(op_type, operands, f"{AHEAD}/{name}", **attributes)

    axis = build.constant([1], f"{AHEAD}/axis")
    slots = op("Squeeze", [op("Shape", [mask], "slots", start=1)], "count")
    column = op(
        "Range",
        [build.constant(np.array(0), f"{AHEAD}/zero"), slots, build.constant(np.array(1), f"{AHEAD}/one")],
        "place",
    )
    length = op("ReduceSum", [mask, axis], "length", keepdims=1)
    longer = op("Cast", [op("LessOrEqual", [column, length], "inside")], "mask", to=ir.DataType.INT64.value)
    # A prefill generates several tokens; this output is then not read.
    first = op("ReduceMax", [token, axis], "token", keepdims=1)
    return longer, op("Where", [op("Equal", [column, length], "here"), first, past], "append")
