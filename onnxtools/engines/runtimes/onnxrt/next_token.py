"""What a session on a device finds beside the logits: the greedy token, and the inputs of the step after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.engines.kernels.rewrite import DOMAIN
from onnxtools.ir.edit import Builder
from onnxtools.ir.model import Model

NEXT = "onnxtools.next"
"""An output, [rows, tokens]: the best token, -1 where the logits are NaN, so that a step moves 8 bytes a row to the
host and not the logits. Do not bind it to the memory of input_ids: capturing runs the step twice, and the second run
would read the first one's output.
"""
AHEAD = "onnxtools.ahead"
"""Prefix of the extra outputs of a capturable step: its own next inputs, and the tokens generated so far."""
PAST_TOKENS = f"{AHEAD}.past_tokens"
"""The input beside them: the tokens found before, [rows, slots]."""


def add_next_token(model: Model, *, ahead: bool, kernel: bool) -> None:
    """The output NEXT, and with `ahead` the outputs AHEAD of a graph whose caches are fixed buffers and that has a
    mask.

    AHEAD.attention_mask, AHEAD.position_ids and AHEAD.write_indices are what the next step takes. The mask is 1 on a
    row's first tokens, that of the step among them; the token that the step finds comes after them. AHEAD.tokens is
    PAST_TOKENS with that token in its place.

    Args:
        kernel: our operator NextToken may be used.
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
        found, longer, tokens = build.ops(
            "NextToken", [logits, mask, past], f"{NEXT}/NextToken", outputs=3, domain=DOMAIN
        )
        model.graph.opset_imports[DOMAIN] = 1
    else:
        found = _best(build, logits)
        longer, tokens = _appended(build, mask, past, found)
    _output(model, found, NEXT, [None, None])
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
    bad = build.op(
        "IsNaN", [build.op("Sub", [logit, logit], f"{NEXT}/zero")], f"{NEXT}/bad"
    )  # infinity - infinity is NaN too
    checked = build.op("Where", [bad, build.constant(np.array(-1), f"{NEXT}/none"), best], f"{NEXT}/checked")
    return build.op("Squeeze", [checked, build.constant([-1], f"{NEXT}/axis")], f"{NEXT}/found")


def _appended(build: Builder, mask: ir.Value, past: ir.Value, found: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The mask with one more token, and the tokens with `found` in that place."""

    def op(op_type: str, operands: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
        return build.op(op_type, operands, f"{AHEAD}/{name}", **attributes)

    axis = build.constant([1], f"{AHEAD}/axis")
    slots = op("Squeeze", [op("Shape", [mask], "slots", start=1)], "count")
    place = op(
        "Range",
        [build.constant(np.array(0), f"{AHEAD}/zero"), slots, build.constant(np.array(1), f"{AHEAD}/one")],
        "place",
    )
    length = op("ReduceSum", [mask, axis], "length", keepdims=1)
    longer = op("Cast", [op("LessOrEqual", [place, length], "inside")], "mask", to=ir.DataType.INT64.value)
    one = op("ReduceMax", [found, axis], "token", keepdims=1)  # a prefill finds several, and nobody reads on
    return longer, op("Where", [op("Equal", [place, length], "here"), one, past], "append")
