"""Rewrite operators that exporters leave and TensorRT's parser refuses into operators that every consumer takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxtools.analysis.facts import Facts, analyse, sequence_sizes
from onnxtools.base.errors import JobError
from onnxtools.ir.edit import Builder, remove_unused, rename_or_bypass
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, is_constant_expression, is_op
from onnxtools.pipeline.passbase import Pass, PassResult


@dataclass(frozen=True)
class Legalize(Pass):
    """Use only operators that TensorRT's parser takes.

    Rules:
      - SplitToSequence + SequenceAt (torch.split, torch.chunk) becomes Split; any other use of the sequence is an
        error;
      - CastLike becomes Cast; a Cast to the same type is removed, as are Identity and inference-mode Dropout;
      - reshaping a scalar to one element becomes Unsqueeze, which shape inference follows;
      - `transA`, `transB`, axes and other attributes keep their meaning.
    """

    name = "legalize"
    example = "onnxtools legalize model.onnx legal.onnx"

    def apply(self, model: Model) -> PassResult:
        counts: dict[str, int] = {}
        facts = analyse(model)
        builder = Builder(model)
        for node in list(model.graph):
            rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if rule is not None:
                builder.before = node
                rewrite = rule(node, facts, builder)
                if rewrite:
                    counts[rewrite] = counts.get(rewrite, 0) + 1
        remove_unused(model)
        matches = sum(counts.values())
        notes = [", ".join(f"{count} {kind}" for kind, count in counts.items())] if counts else ["nothing to rewrite"]
        return PassResult(bool(matches), matches, notes)

    def ensures(self, model: Model) -> None:
        for node in model.graph.all_nodes():
            if node.domain == "" and "Sequence" in node.op_type:
                raise JobError(
                    f"node {node.name!r} ({node.op_type}) works on a sequence of tensors, which TensorRT refuses; "
                    "split with constant sizes"
                )


def _identity(node: ir.Node, facts: Facts, builder: Builder) -> str:
    source = node.inputs[0]
    if source is None or (
        node.outputs[0].is_graph_output()
        and (source.is_graph_input() or source.is_initializer() or source.is_graph_output())
    ):
        return ""
    if len(node.outputs) > 1 and node.outputs[1].uses():
        return ""
    rename_or_bypass(builder.graph, node.outputs[0], source)
    return "no-op nodes removed"


def _dropout(node: ir.Node, facts: Facts, builder: Builder) -> str:
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        training = facts[node.inputs[2]].value
        if training is None or training.any():
            return ""  # it drops elements, or may at run time
    return _identity(node, facts, builder)


def _cast(node: ir.Node, facts: Facts, builder: Builder) -> str:
    same = facts[node.inputs[0]].dtype == ir.DataType(attribute(node, "to"))
    return _identity(node, facts, builder) if same else ""


def _cast_like(node: ir.Node, facts: Facts, builder: Builder) -> str:
    like = node.inputs[1]
    target = facts[like].dtype
    if like is None or target is None:
        raise JobError(
            f"node {node.name!r} (CastLike): the type that it casts to is unknown; run onnx shape inference first"
        )
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
            raise JobError(
                f"{where} uses the sequence of {node.name!r} in a way that no Split can replace; export with constant "
                "split sizes"
            )
    if shape is None:
        raise JobError(
            f"node {node.name!r} (SplitToSequence): the shape of {data.name if data else ''!r} is unknown; run onnx "
            "shape inference first"
        )
    sizes = sequence_sizes(node, shape[axis], facts)
    if sizes is None:
        raise JobError(
            f"node {node.name!r} (SplitToSequence) has split sizes that depend on the data; export with constant sizes"
        )
    outputs = _pieces(node, sizes, axis % len(shape), facts, builder)
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


def _pieces(node: ir.Node, sizes: list[int], axis: int, facts: Facts, builder: Builder) -> Sequence[ir.Value]:
    """The pieces as values: outputs of one Split where the sizes are constant, else one Slice per piece.

    The bounds of the Slices are computed at run time.
    """
    data, split = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    name = node.name or "Split"
    vector = split is not None and (split_sizes := facts[split].value) is not None and split_sizes.ndim == 1
    if is_constant_expression(split) and (vector or _static_axis(data, axis)):
        return builder.ops(
            "Split", [data, builder.constant(sizes, f"{name}/split")], name, outputs=len(sizes), axis=axis
        )
    if not vector or split is None:
        raise JobError(
            f"node {node.name!r} (SplitToSequence) cuts an axis of dynamic size into equal parts; export with constant "
            "sizes"
        )
    start = builder.constant([0], "int_0_1d")
    pieces = []
    for index in range(len(sizes)):
        bounds = [builder.constant([i], "piece") for i in (index, index + 1)]
        size = builder.op("Slice", [split, *bounds, builder.constant([0], "axes_0")], f"{name}/size_{index}")
        end = builder.op("Add", [start, size], f"{name}/end_{index}")
        pieces.append(
            builder.op("Slice", [data, start, end, builder.constant([axis], "axis")], f"{name}/piece_{index}")
        )
        start = end
    return pieces


def _static_axis(data: ir.Value | None, axis: int) -> bool:
    """Whether the file records a fixed size for this axis; True also where it records no shape.

    An unrecorded shape follows from the constants that the sizes are computed from.
    """
    if data is None or data.shape is None or axis >= len(data.shape):
        return True
    return isinstance(data.shape[axis], int)


def _reshape_scalar(node: ir.Node, facts: Facts, builder: Builder) -> str:
    target = facts[node.inputs[1]].value
    if facts[node.inputs[0]].shape != () or target is None or target.tolist() not in ([-1], [1]):
        return ""
    new = builder.op(
        "Unsqueeze",
        [node.inputs[0], builder.constant([0], "axes_0")],
        node.name or "Unsqueeze",
        dtype=facts[node.inputs[0]].dtype,
        shape=[1],
    )
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
