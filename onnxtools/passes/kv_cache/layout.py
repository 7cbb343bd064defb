"""Conversion between the exporter's layout of queries, keys and values and [batch, heads, sequence, channels]."""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxtools.analysis.attention import Attention, Operand
from onnxtools.analysis.axes import Atom, leaves
from onnxtools.analysis.facts import Tokens
from onnxtools.base.errors import JobError
from onnxtools.ir.edit import Builder

_ORDER = ("batch", "heads", "sequence", "channels")


def to_bnsh(build: Builder, operand: Operand, prefix: str) -> ir.Value:
    """`operand.value` as [batch, heads, sequence, channels].

    Raises:
        JobError: an axis mixes roles, or batch and sequence lie behind a merged axis.
    """
    value = operand.value
    axes = [leaves(axis) for axis in operand.layout]
    empty = [i for i, axis in enumerate(axes) if not axis]
    if empty:
        value = build.op("Squeeze", [value, build.constant(empty, "axes")], f"{prefix}/Squeeze")
        axes = [axis for axis in axes if axis]
    roles = [_roles(axis, operand) for axis in axes]
    if any(len(parts) > 1 for parts in roles):
        value = build.op("Reshape", [value, build.constant(_split_target(roles), "split_heads")], f"{prefix}/Split")
    order = [role for parts in roles for role, _ in parts]
    perm = sorted(range(len(order)), key=lambda i: _ORDER.index(order[i]))
    if "heads" not in order:
        value = build.op("Unsqueeze", [value, build.constant([len(order)], "axes")], f"{prefix}/Unsqueeze")
        order.append("heads")
        perm = sorted(range(len(order)), key=lambda i: _ORDER.index(order[i]))
    if perm != list(range(len(order))):
        value = build.op("Transpose", [value], f"{prefix}/Transpose", perm=perm)
    if len(order) > 4:
        target = [0, operand.head_count, -1, operand.head_size]
        value = build.op("Reshape", [value, build.constant(target, "kv_shape")], f"{prefix}/Merge")
    return value


def from_bnsh(build: Builder, tokens: Tokens, value: ir.Value, block: Attention, prefix: str) -> ir.Value:
    """The product [batch, heads, sequence, channels] in the layout that the rest of the graph expects.

    Raises:
        JobError: the output interleaves heads and channels, or mixes batch and sequence with heads.
    """
    groups = [_output_roles(axis, block) for axis in block.output_layout]
    order = [role for group in groups for role in group]
    single = [role for role in _ORDER if role not in order]
    if len(set(order)) < len(order) or any(_constant_size(role, block) != 1 for role in single):
        raise JobError(
            f"the output {block.output.name!r} of attention interleaves heads and channels; no standard layout does"
        )
    if single:  # the exporter had no axis for a single head or channel
        value = build.op(
            "Squeeze", [value, build.constant([_ORDER.index(role) for role in single], "axes")], f"{prefix}/Squeeze"
        )
    axes = [role for role in _ORDER if role in order]
    perm = [axes.index(role) for role in order]
    if perm != list(range(len(perm))):
        value = build.op("Transpose", [value], f"{prefix}/Transpose", perm=perm)
    if all(len(group) == 1 for group in groups):
        return value
    target: list[int] = []
    for position, group in enumerate(groups):
        if all(role in ("heads", "channels") for role in group):
            target.append(math.prod(_constant_size(role, block) or 1 for role in group))
        else:
            target.append(0 if len(group) == 1 and order.index(group[0]) == position else -1)
    if target.count(-1) < 2:
        return build.op("Reshape", [value, build.constant(target, "merge_heads")], f"{prefix}/Reshape")
    return build.op(
        "Reshape", [value, _computed_target(build, tokens, groups, target, block, prefix)], f"{prefix}/Reshape"
    )


def _constant_size(role: str, block: Attention) -> int | None:
    return {"heads": block.query.head_count, "channels": block.value.head_size}.get(role)


def _computed_target(
    build: Builder, tokens: Tokens, groups: list[list[str]], target: list[int], block: Attention, prefix: str
) -> ir.Value:
    """A computed Reshape target, such as [batch * heads, sequence, channels].

    Batch and sequence are read from the token ids.
    """
    parts = []
    for group, size in zip(groups, target, strict=True):
        if group in (["batch"], ["sequence"]):
            axis = tokens.batch_axis if group == ["batch"] else tokens.axis
            parts.append(build.op("Shape", [tokens.value], f"{prefix}/{group[0]}", start=axis, end=axis + 1))
        else:
            parts.append(build.constant([size], "size"))
    if (
        sum(size == -1 and group not in (["batch"], ["sequence"]) for group, size in zip(groups, target, strict=True))
        > 1
    ):
        raise JobError(
            f"the output {block.output.name!r} of attention mixes batch and sequence with heads; export with [batch, "
            "sequence, hidden] outputs"
        )
    return build.op("Concat", parts, f"{prefix}/shape", axis=0)


def _roles(axis: list[Atom], operand: Operand) -> list[tuple[str, int]]:
    """The (role, size) parts of one axis, outermost first; neighbouring atoms of the same role are one part."""
    parts: list[tuple[str, int]] = []
    heads, channels = leaves(operand.heads), leaves(operand.channels)
    for atom in axis:
        role = (
            "batch"
            if atom is operand.batch
            else "sequence"
            if atom is operand.sequence
            else "heads"
            if atom in heads
            else "channels"
        )
        if role == "channels" and atom not in channels:
            raise JobError(f"an axis of {operand.value.name!r} is neither batch, sequence, heads nor channels")
        size = atom.size
        if parts and parts[-1][0] == role:
            parts[-1] = (role, parts[-1][1] * size)
        else:
            parts.append((role, size))
    return parts


def _split_target(roles: list[list[tuple[str, int]]]) -> list[int]:
    """Reshape target with one axis per role: 0 copies a dynamic axis in place, -1 stands for one that moved."""
    target: list[int] = []
    for index, parts in enumerate(roles):
        for role, size in parts:
            dynamic = role in ("batch", "sequence")
            target.append(size if not dynamic else 0 if len(target) == index else -1)
    if target.count(-1) > 1:
        raise JobError(
            "keys or values have batch and sequence behind a merged axis; export with [batch, sequence, ...] "
            "activations"
        )
    return target


def _output_roles(axis: list[Atom], block: Attention) -> list[str]:
    query = block.query
    heads = leaves(query.heads)
    roles: list[str] = []
    for atom in leaves(axis):
        role = (
            "batch"
            if atom is query.batch
            else "sequence"
            if atom is query.sequence
            else "heads"
            if atom in heads
            else "channels"
        )
        if not roles or roles[-1] != role:
            roles.append(role)
    return roles
