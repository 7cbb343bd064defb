"""Changes of the graph for TensorRT-RTX 1.7, which lacks operators that TensorRT has; the ONNX file is kept."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.experts import Mixture, mixtures
from onnxtools.analysis.facts import analyse
from onnxtools.ir.edit import Builder, remove_unused, rename_or_bypass
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, is_op


def needs_lowering(model: Model) -> bool:
    """Whether `model` has an operator that `lower_for_rtx` may replace."""
    return any(
        is_op(node, "NonZero") or (is_op(node, "RotaryEmbedding") and attribute(node, "interleaved", 0))
        for node in model.graph
    )


def lower_for_rtx(model: Model) -> list[str]:
    """Change `model` in place; returns notes on the changes.

    - Mixtures of experts: there is no NonZero, so every expert runs all tokens, and those that did not choose it get a
      weight of 0. This is experts / top_k times the work.
    - RotaryEmbedding of neighbouring channels fails in the builder: the channels are sorted before and behind it.
    """
    notes = []
    dense = sum(1 for mixture in list(mixtures(model.graph)) if _make_dense(model, mixture))
    if dense:
        notes.append(f"{dense} mixtures of experts run every expert for every token: TensorRT-RTX has no NonZero")
    turned = _sort_rotations(model)
    if turned:
        notes.append(f"channels of {turned} RotaryEmbedding nodes sorted: TensorRT-RTX cannot build interleaved ones")
    if notes:
        remove_unused(model)
    return notes


def _make_dense(model: Model, mixture: Mixture) -> bool:
    end = mixture.output.producer()
    assert end is not None
    build, name = Builder(model), f"{end.name}/dense"
    build.before = end
    shares = _shares(build, mixture, name)
    total: ir.Value | None = None
    zero = build.op("CastLike", [build.constant(np.zeros((), np.float32), "zero_f32"), mixture.hidden], f"{name}/zero")
    for e, (rows, result, share) in enumerate(zip(mixture.rows, mixture.results, shares, strict=True)):
        ir.convenience.replace_all_uses_with(rows, mixture.hidden)
        # A token that did not choose the expert may overflow in it, and 0 x infinity is not 0.
        is_on = build.op("Greater", [share, zero], f"{name}/{e}/on")
        kept = build.op("Where", [is_on, result, zero], f"{name}/{e}/kept")
        part = build.op("Mul", [kept, share], f"{name}/{e}/part")
        total = part if total is None else build.op("Add", [total, part], f"{name}/{e}/total")
    assert total is not None
    summed = build.op("Unsqueeze", [total, build.constant([1], "axis_1")], name)
    rename_or_bypass(model.graph, mixture.output, summed)
    return True


def _shares(build: Builder, mixture: Mixture, name: str) -> list[ir.Value]:
    """The weight of every expert for each token, [tokens, 1] for each expert."""
    count = len(mixture.rows)
    numbers = build.constant(np.arange(count).reshape(1, 1, -1), "experts")
    column = build.op("Unsqueeze", [mixture.chosen, build.constant([-1], "last_axis")], f"{name}/chosen")
    hits = build.op(
        "CastLike", [build.op("Equal", [column, numbers], f"{name}/hits"), mixture.hidden], f"{name}/hits/cast"
    )
    spread = build.op("MatMul", [mixture.weights, hits], f"{name}/shares")
    flat = build.op("Squeeze", [spread, build.constant([1], "axis_1")], f"{name}/shares/flat")
    sizes = build.constant([1] * count, "share_sizes")
    return list(build.ops("Split", [flat, sizes], f"{name}/shares/split", outputs=count, axis=1))


def _sort_rotations(model: Model) -> int:
    nodes = [node for node in model.graph if is_op(node, "RotaryEmbedding") and attribute(node, "interleaved", 0)]
    facts = analyse(model) if nodes else None
    turned = 0
    for node in nodes:
        assert facts is not None
        shape = facts[node.inputs[0]].shape
        if shape is None or len(shape) != 4:
            continue
        channels = int(shape[3])
        dim = int(attribute(node, "rotary_embedding_dim", 0)) or channels
        order = np.concatenate([np.arange(0, dim, 2), np.arange(1, dim, 2), np.arange(dim, channels)])
        build = Builder(model)
        build.before = node
        index = build.constant(order, "sorted_channels")
        node.replace_input_with(0, build.op("Gather", [node.inputs[0], index], f"{node.name}/sorted", axis=3))
        node.attributes.pop("interleaved")
        inverse = build.constant(np.argsort(order), "channels")
        result = node.outputs[0]
        back = ir.node("Gather", [result, inverse], {"axis": 3}, name=build.names(f"{node.name}/back"))
        back.outputs[0].name = build.names(f"{node.name}/back/output_0")
        model.graph.insert_after(node, back)
        for user, position in list(result.uses()):
            if user is not back:
                user.replace_input_with(position, back.outputs[0])
        turned += 1
    return turned
