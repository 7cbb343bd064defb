"""Raises a model's opset: nodes whose operators changed in between are rewritten to keep their meaning."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from onnxtools.analysis.facts import Facts, analyse
from onnxtools.base.errors import JobError, one_line
from onnxtools.ir.edit import Builder, replace_keeping_name
from onnxtools.ir.model import MAX_IR_VERSION, Model
from onnxtools.ir.query import attribute

MAX_OPSET = 25
"""The newest opset that the tools write."""
_REDUCE = {
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
}


def reach_opset(model: Model, version: int) -> tuple[int, str]:
    """Raise `model` to opset `version` or leave a newer one, and raise its IR version to one that may carry the opset.

    Returns:
        The number of rewritten nodes, and a line for the user.

    Raises:
        JobError: a node has no form of the same meaning; it names the node.
    """
    old = model.opset
    model.ir.ir_version = min(MAX_IR_VERSION, max(model.ir.ir_version or 0, lowest_ir_version(max(old, version))))
    if old >= version:
        return 0, f"opset {old} kept (already at or above {version}; nothing is lowered)"
    if model.ir.functions:
        name = next(iter(model.ir.functions.values())).name
        raise JobError(
            f"the function {name!r} has operators of opset {old} too; run `onnxtools inline-functions` or `onnxtools "
            "convert` first"
        )
    rewritten = _raise_opset(model, version)
    return rewritten, f"opset {old} -> {version}, {rewritten} nodes rewritten"


def _raise_opset(model: Model, version: int) -> int:
    if model.opset < _OLDEST:
        _convert_old(model)
    old = model.opset
    builder, facts, rewritten = Builder(model), analyse(model), 0
    for node in list(model.graph.all_nodes()):
        if node.domain in ("", "ai.onnx"):
            builder.before = node
            rewritten += _upgrade(node, old, version, builder, facts)
    model.ir.opset_imports[""] = version
    return rewritten


_OLDEST = 11
"""The rules here start at this opset."""


def _convert_old(model: Model) -> None:
    """Raise an opset before 11 to 11 by onnx's own converter, which reads the weights.

    Raises:
        JobError: the model is beyond 2 GiB, or the converter has no rule for a node.
    """
    if model.weight_bytes() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise JobError(
            f"opset {model.opset} is raised by onnx's converter, which takes models below 2 GiB; export the model "
            "again with opset 17 or later"
        )
    from onnx import version_converter

    scan = next((node for node in model.graph.all_nodes() if node.op_type == "Scan"), None)
    if scan is not None:
        raise JobError(f"node {scan.name!r} (Scan): opset 9 took its batch away; export the model at opset 17")
    proto = ir.to_proto(model.ir)
    proto.ir_version = max(proto.ir_version, 4)
    onnx.load_external_data_for_model(proto, str(model.path.parent) if model.path is not None else "")
    try:
        converted = version_converter.convert_version(proto, _OLDEST)
    except Exception as error:  # it raises RuntimeError and others, with the node in the text
        raise JobError(
            f"opset {model.opset}: onnx's converter stops at {one_line(error)}; export the model again with opset 17 "
            "or later"
        ) from None
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(converted, name, getattr(proto, name))
    del converted.metadata_props[:]
    converted.metadata_props.extend(proto.metadata_props)
    model.ir = ir.from_proto(converted)
    for node in model.graph.all_nodes():
        if node.op_type == "Resize" and "coordinate_transformation_mode" not in node.attributes:
            _keep_corners(node)
    model.lift_constants()


def _keep_corners(node: ir.Node) -> None:
    """Before opset 11, places were divided by the scale and rounded down; the converter leaves that out."""
    node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", "asymmetric")
    if attribute(node, "mode", "nearest") == "nearest":
        node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "floor")


def lowest_ir_version(opset: int) -> int:
    """Returns the lowest IR version that may carry `opset` (onnx.helper's table)."""
    return onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


def _upgrade(node: ir.Node, old: int, new: int, builder: Builder, facts: Facts) -> int:
    op = node.op_type
    if op == "Split" and old < 18 <= new:
        return _split(node, builder)
    rule = _RULES.get(op)
    if rule is not None and old < _SEMANTICS_CHANGED[op] <= new and (done := rule(node, builder, facts)) is not None:
        return done
    axes_became_input = (old < 18 <= new and op in _REDUCE) or (
        old < 13 and op in ("ReduceSum", "Squeeze", "Unsqueeze")
    )
    if axes_became_input:
        return _attribute_to_input(node, "axes", builder)
    _check_same_meaning(node, old, new)
    return 0


def _attribute_to_input(node: ir.Node, name: str, builder: Builder) -> int:
    values = attribute(node, name)
    if values is None:
        return 0
    del node.attributes[name]
    node.resize_inputs(2)
    node.replace_input_with(1, builder.constant(list(values), f"{node.name}/{name}"))
    return 1


def _split(node: ir.Node, builder: Builder) -> int:
    if attribute(node, "split") is not None:
        return _attribute_to_input(node, "split", builder)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return 0
    # At opset < 18 a Split without sizes cuts equal parts; since 18 the count must be written down.
    node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    return 1


_SEMANTICS_CHANGED = {
    "Softmax": 13, "LogSoftmax": 13, "Hardmax": 13, "BatchNormalization": 14, "GroupNormalization": 21, "Resize": 13,
    "Upsample": 10,
    "GridSample": 20, "Dropout": 12, "DFT": 20, "Clip": 11, "Pad": 11, "RoiAlign": 16,
}  # fmt: skip
"""Operators whose newer version behaves differently, and the first opset of that version."""


def _batch_normalization(node: ir.Node, builder: Builder, facts: Facts) -> int | None:
    """With one output, every version normalizes by the stored statistics. Further outputs exist only in training."""
    return (
        0
        if not any(output.uses() or output.is_graph_output() for output in node.outputs[1:]) and len(node.outputs) == 1
        else None
    )


def _softmax(node: ir.Node, builder: Builder, facts: Facts) -> int | None:
    """Before opset 13, Softmax merged all axes from `axis` (1 by default) on: over the last axis nothing changed.

    Elsewhere the axes are merged by a Flatten, and a Reshape takes them apart again.
    """
    data, axis = node.inputs[0], attribute(node, "axis", 1)
    shape = facts[data].shape
    if axis == -1 or (shape is not None and axis == len(shape) - 1):
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return 1
    if data is None or node.graph is not builder.graph:
        return None
    sizes = builder.op("Shape", [data], f"{node.name}/sizes")
    flat = builder.op("Flatten", [data], f"{node.name}/Flatten", axis=axis)
    merged = builder.op(node.op_type, [flat], f"{node.name}/merged", axis=-1)
    replace_keeping_name(builder.graph, node.outputs[0], builder.op("Reshape", [merged, sizes], f"{node.name}/Reshape"))
    builder.graph.remove(node, safe=True)
    return 1


def _group_normalization(node: ir.Node, builder: Builder, facts: Facts) -> int | None:
    """Opset 21 has a scale and a bias for each channel; before, each group had one."""
    groups, data = attribute(node, "num_groups"), node.inputs[0]
    if data is None or node.graph is not builder.graph:
        return None
    count = builder.constant([groups], "groups")
    channels = builder.op("Shape", [data], f"{node.name}/channels", start=1, end=2)
    each = builder.op("Div", [channels, count], f"{node.name}/each")
    sizes = builder.op("Concat", [count, each], f"{node.name}/sizes", axis=0)
    for index in (1, 2):
        column = builder.op("Unsqueeze", [node.inputs[index], builder.constant([1], "axes")], f"{node.name}/column")
        wide = builder.op("Expand", [column, sizes], f"{node.name}/Expand")
        flat = builder.op("Reshape", [wide, builder.constant([-1], "flat")], f"{node.name}/by_channel")
        node.replace_input_with(index, flat)
    return 1


def _dft(node: ir.Node, builder: Builder, facts: Facts) -> int | None:
    """Opset 20 made the axis an input, and the last axis of the signal its default."""
    axis = np.array(attribute(node, "axis", 1), np.int64)
    node.attributes.pop("axis", None)
    node.resize_inputs(3)
    node.replace_input_with(2, builder.constant(axis, f"{node.name}/axis"))
    return 1


def _roi_align(node: ir.Node, builder: Builder, facts: Facts) -> int | None:
    """Opset 16 moves the corners of a region by half a pixel unless it is told not to."""
    mode = "coordinate_transformation_mode"
    if mode not in node.attributes:
        node.attributes[mode] = ir.AttrString(mode, "output_half_pixel")
    return 1


def _resize(node: ir.Node, builder: Builder, facts: Facts) -> int | None:
    """Opset 13 removed one mode to map coordinates. The others kept their meaning."""
    return 0 if attribute(node, "coordinate_transformation_mode", "half_pixel") != "tf_half_pixel_for_nn" else None


def _grid_sample(node: ir.Node, builder: Builder, facts: Facts) -> int | None:
    """Opset 20 renamed the modes of 2-D grids to linear and cubic."""
    mode = attribute(node, "mode", "bilinear")
    node.attributes["mode"] = ir.AttrString("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))
    return 1


def _dropout(node: ir.Node, builder: Builder, facts: Facts) -> int | None:
    """Opset 12 made the ratio an input. It matters only in training; the mask of before has no equal."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return None
    if "ratio" in node.attributes:
        ratio = np.array(node.attributes.pop("ratio").value, np.float32)
        node.resize_inputs(2)
        node.replace_input_with(1, builder.constant(ratio, f"{node.name}/ratio"))
        return 1
    return 0


_RULES: dict[str, Callable[[ir.Node, Builder, Facts], int | None]] = {
    "BatchNormalization": _batch_normalization, "Softmax": _softmax, "LogSoftmax": _softmax, "Hardmax": _softmax,
    "Resize": _resize,
    "GridSample": _grid_sample, "Dropout": _dropout, "RoiAlign": _roi_align, "DFT": _dft,
    "GroupNormalization": _group_normalization,
}  # fmt: skip
"""Functions that keep a node's meaning in the new version. Result: the number of changed nodes, or None."""


def _check_same_meaning(node: ir.Node, old: int, new: int) -> None:
    try:
        before = onnx.defs.get_schema(node.op_type, old, "")
        after = onnx.defs.get_schema(node.op_type, new, "")
    except onnx.defs.SchemaError:
        raise JobError(
            f"node {node.name!r} ({node.op_type}) is no operator of opset {old} or {new}; is its domain missing?"
        ) from None
    if before.since_version == after.since_version:
        return
    changed = old < _SEMANTICS_CHANGED.get(node.op_type, 0) <= new
    lost = [name for name in node.attributes if name not in after.attributes]
    needed = [name for name, spec in after.attributes.items() if spec.required and name not in node.attributes]
    if changed or lost or needed or after.deprecated:
        what = f"attribute {(lost or needed)[0]!r}" if lost or needed else "meaning"
        raise JobError(
            f"node {node.name!r} ({node.op_type}): its {what} changed between opset {old} and {new} and there is no "
            "rule for it;"
            f" export the model at opset {new}"
        )
