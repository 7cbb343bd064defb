"""Follows each axis of a tensor through Reshape, Transpose and similar operators.

A tensor's layout is a list of axes; an axis is a list of `Atom`s, outermost first, whose sizes multiply to the axis
size. Reshape regroups atoms in row-major order and splits one if it must. Every layout that holds the atom sees the
split, so following a tensor forward also shows how its source's axes are composed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts
from onnxtools.ir.query import attribute


@dataclass(eq=False)
class Atom:
    """An indivisible piece of an axis, until a Reshape splits it into `parts` (outer, inner).

    Attributes:
        size: number of elements.
        repeat: the atom counts copies that Expand, Tile or Gather made, and has no data of its own.
        parts: the two atoms of a split; empty before.
    """

    size: int
    repeat: bool = False
    parts: list[Atom] = field(default_factory=list)

    def leaves(self) -> list[Atom]:
        """Returns the unsplit atoms that the atom consists of, outermost first."""
        return [leaf for part in self.parts for leaf in part.leaves()] if self.parts else [self]

    def split(self, outer: int) -> tuple[Atom, Atom]:
        """Split the atom into one of size `outer` and the rest; `outer` must divide its size."""
        self.parts = [Atom(outer, self.repeat), Atom(self.size // outer, self.repeat)]
        return self.parts[0], self.parts[1]


Layout = list[list[Atom]]


class LayoutError(Exception):
    """The operator mixes axes in a way that cannot be followed."""


def start(shape: Sequence[int]) -> Layout:
    """Returns a new layout of `shape`, with one atom an axis."""
    return [[Atom(size)] for size in shape]


def leaves(atoms: Iterable[Atom]) -> list[Atom]:
    """Returns the unsplit atoms of an axis, outermost first."""
    return [leaf for atom in atoms for leaf in atom.leaves()]


LAYOUT_OPS = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand", "Tile", "Gather"}


def follow(layout: Layout, node: ir.Node, facts: Facts) -> Layout:
    """Returns the layout of the output of `node`, given the layout of its first input.

    Raises:
        LayoutError: `node` is no layout operator, or its effect depends on run-time data.
    """
    op, target = node.op_type, facts[node.outputs[0]].shape
    if target is None:
        raise LayoutError(f"the shape after node {node.name!r} ({op}) is unknown")
    if op == "Transpose":
        return [layout[p] for p in attribute(node, "perm", range(len(layout))[::-1])]
    if op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        return regroup(layout, target)
    if op in ("Expand", "Tile"):
        return _repeat(layout, target)
    if op == "Gather":
        return _gather(layout, node, facts)
    if target == tuple(math.prod(a.size for a in axis) for axis in layout):
        return layout
    raise LayoutError(f"node {node.name!r} ({op}) changes the shape")


def regroup(layout: Layout, target: Sequence[int]) -> Layout:
    """Distribute the atoms of `layout`, in order, over axes of the sizes `target` (row-major Reshape).

    Raises:
        LayoutError: the sizes do not match, or a cut does not divide an atom.
    """
    queue = [leaf for axis in layout for leaf in leaves(axis)]
    result: Layout = []
    for size in target:
        axis: list[Atom] = []
        have = 1
        if size == 1:
            if queue and queue[0].size == 1:
                axis.append(queue.pop(0))
            result.append(axis)
            continue
        while have < size:
            if not queue:
                raise LayoutError("the shapes do not match")
            atom = queue.pop(0)
            need = size // have
            if atom.size > need:
                if atom.size % need or size % have:
                    raise LayoutError(f"an axis of {atom.size} is cut at {need}, which does not divide it")
                atom, rest = atom.split(need)
                queue.insert(0, rest)
            axis.append(atom)
            have *= atom.size
        if have != size:
            raise LayoutError("axes are merged across a boundary")
        result.append(axis)
    if queue and result:
        result[-1].extend(atom for atom in queue if atom.size == 1)
    return result


def _repeat(layout: Layout, target: Sequence[int]) -> Layout:
    padded: Layout = [[] for _ in range(len(target) - len(layout))] + layout
    result: Layout = []
    for axis, size in zip(padded, target, strict=True):
        have = math.prod(atom.size for atom in axis)
        if have == size:
            result.append(axis)
        elif size % have == 0:
            result.append([Atom(size // have, repeat=True), *axis])
        else:
            raise LayoutError("an axis is repeated a fractional number of times")
    return result


def _gather(layout: Layout, node: ir.Node, facts: Facts) -> Layout:
    """Gather as a repetition: indices 0,0,1,1,... (each repeated) or 0,1,0,1,... (tiled)."""
    axis = attribute(node, "axis", 0) % len(layout)
    size = math.prod(a.size for a in layout[axis])
    index = facts[node.inputs[1]].value
    if index is None or index.ndim != 1 or index.size % size:
        raise LayoutError(f"node {node.name!r} (Gather) picks elements")
    times = index.size // size
    copies = Atom(times, repeat=True)
    base = np.arange(size)
    if np.array_equal(index, np.repeat(base, times)):
        new = [*layout[axis], copies]
    elif np.array_equal(index, np.tile(base, times)):
        new = [copies, *layout[axis]]
    else:
        raise LayoutError(f"node {node.name!r} (Gather) picks elements")
    return [*layout[:axis], new, *layout[axis + 1 :]]
