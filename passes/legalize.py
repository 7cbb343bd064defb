"""Rewrite what exporters leave and TensorRT's parser refuses into operators that every consumer takes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxtools.errors import JobError
from onnxtools.graph import Builder, attribute, is_op, remove_unused, rename_or_bypass
from onnxtools.infer import Facts, analyse, sequence_sizes
from onnxtools.model import Model
from onnxtools.passbase import Pass, PassResult


@dataclass(frozen=True)
class Legalize(Pass):
    """Use only operators that TensorRT's parser takes.

    Rules:
      - model-local functions are inlined;
      - SplitToSequence + SequenceAt (torch.split, torch.chunk) becomes Split; any other use of the sequence is an error;
      - CastLike becomes Cast; a Cast to the type that the value has goes, as do Identity and inference-mode Dropout;
      - reshaping a scalar to one element becomes Unsqueeze, which shape inference follows;
      - `transA`, `transB`, axes and other attributes keep their meaning.
    """

    name = "legalize"
    example = "onnxtools legalize model.onnx legal.onnx"

    def apply(self, model: Model) -> PassResult:
        counts: dict[str, int] = {}
        if model.ir.functions:
            from onnx_ir.passes.common import InlinePass

            counts["functions inlined"] = len(model.ir.functions)
            InlinePass()(model.ir)
        facts = analyse(model)
        builder = Builder(model)
        for node in list(model.graph):
            rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if rule is not None:
                builder.before = node
                done = rule(node, facts, builder)
                if done:
                    counts[done] = counts.get(done, 0) + 1
        remove_unused(model)
        matches = sum(counts.values())
        notes = [", ".join(f"{count} {what}" for what, count in counts.items())] if counts else ["nothing to rewrite"]
        return PassResult(bool(matches), matches, notes)

    def ensures(self, model: Model) -> None:
        for node in model.graph.all_nodes():
            if node.domain == "" and "Sequence" in node.op_type:
                raise JobError(f"node {node.name!r} ({node.op_type}) works on a sequence of tensors, which TensorRT refuses; split with constant sizes")


def _identity(node: ir.Node, facts: Facts, builder: Builder) -> str:
    source = node.inputs[0]
    if source is None or (node.outputs[0].is_graph_output() and (source.is_graph_input() or source.is_initializer() or source.is_graph_output())):
        return ""
    if len(node.outputs) > 1 and node.outputs[1].uses():
        return ""
    rename_or_bypass(builder.graph, node.outputs[0], source)
    return "no-op nodes removed"


def _dropout(node: ir.Node, facts: Facts, builder: Builder) -> str:
    training = facts[node.inputs[2]].value if len(node.inputs) > 2 else None
    return _identity(node, facts, builder) if training is None or not training.any() else ""


def _cast(node: ir.Node, facts: Facts, builder: Builder) -> str:
    same = facts[node.inputs[0]].dtype == ir.DataType(attribute(node, "to"))
    return _identity(node, facts, builder) if same else ""


def _cast_like(node: ir.Node, facts: Facts, builder: Builder) -> str:
    like = node.inputs[1]
    target = facts[like].dtype
    if like is None or target is None:
        raise JobError(f"node {node.name!r} (CastLike): the type that it casts to is unknown; run onnx shape inference first")
    if facts[node.inputs[0]].dtype == target:
        return _identity(node, facts, builder)
    new = builder.op("Cast", [node.inputs[0]], node.name or "Cast", dtype=target, to=target.value)
    rename_or_bypass(builder.graph, node.outputs[0], new)
    return "CastLike made Cast"


def _split_to_sequence(node: ir.Node, facts: Facts, builder: Builder) -> str:
    data = node.inputs[0]
    shape = facts[data].shape
    axis = attribute(node, "axis", 0)
    users = [user for user, _ in node.outputs[0].uses()]
    for user in users:
        if not is_op(user, "SequenceAt") or facts[user.inputs[1]].value is None:
            where = f"node {user.name!r} ({user.op_type})"
            raise JobError(f"{where} uses the sequence of {node.name!r} in a way that no Split can replace; export with constant split sizes")
    if shape is None:
        raise JobError(f"node {node.name!r} (SplitToSequence): the shape of {data.name if data else ''!r} is unknown; run onnx shape inference first")
    sizes = sequence_sizes(node, shape[axis], facts)
    if sizes is None:
        raise JobError(f"node {node.name!r} (SplitToSequence) has split sizes that are computed at run time; export with constant sizes")
    outputs = builder.ops("Split", [data, builder.constant(sizes, f"{node.name}/split")], node.name or "Split", outputs=len(sizes), axis=axis % len(shape))
    squeeze = len(node.inputs) < 2 and not attribute(node, "keepdims", 1)
    for user in users:
        index = facts[user.inputs[1]].value
        assert index is not None
        part = outputs[int(index)]
        if data is not None and data.dtype is not None:
            part.dtype = data.dtype
        if squeeze:
            part = builder.op("Squeeze", [part, builder.constant([axis % len(shape)], "axes")], user.name or "Squeeze")
        rename_or_bypass(builder.graph, user.outputs[0], part)
    return "SplitToSequence made Split"


def _reshape_scalar(node: ir.Node, facts: Facts, builder: Builder) -> str:
    target = facts[node.inputs[1]].value
    if facts[node.inputs[0]].shape != () or target is None or target.tolist() not in ([-1], [1]):
        return ""
    new = builder.op("Unsqueeze", [node.inputs[0], builder.constant([0], "axes_0")], node.name or "Unsqueeze", dtype=facts[node.inputs[0]].dtype, shape=[1])
    rename_or_bypass(builder.graph, node.outputs[0], new)
    return "scalar reshapes made Unsqueeze"


_RULES = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast_like,
    "SplitToSequence": _split_to_sequence,
    "Reshape": _reshape_scalar,
}
