"""Layouts: following axes through reshapes tells where each element of a numbered array goes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from onnxtools.analysis.axes import Atom, Layout, LayoutError, follow, leaves, regroup, start
from onnxtools.analysis.facts import analyse
from onnxtools.ir.model import Model
from tests.support import FLOAT, Array, info, stored, write

SHAPE = (2, 3, 8)
CHAINS: dict[str, list[tuple[str, list[int]]]] = {
    "split heads": [("Reshape", [2, 3, 4, 2]), ("Transpose", [0, 2, 1, 3])],
    "merge and cut again": [("Reshape", [6, 8]), ("Reshape", [2, 3, 2, 4]), ("Transpose", [2, 0, 1, 3])],
    "sequence first": [("Transpose", [1, 0, 2]), ("Reshape", [3, 8, 2]), ("Transpose", [1, 0, 2])],
    "ones come and go": [("Unsqueeze", [0, 2]), ("Squeeze", [0]), ("Transpose", [3, 0, 1, 2]),
        ("Reshape", [2, 4, 2, 3])],
    "fused qkv": [("Reshape", [2, 3, 2, 2, 2]), ("Transpose", [3, 0, 2, 1, 4]), ("Reshape", [2, 4, 3, 2])],
    "flatten": [("Flatten", [2])],
}  # fmt: skip


def build(path: Path, chain: list[tuple[str, list[int]]]) -> Model:
    nodes, arrays = [], {}
    for index, (op, numbers) in enumerate(chain):
        name = f"h{index}" if index else "x"
        result = f"h{index + 1}" if index + 1 < len(chain) else "y"
        if op == "Transpose":
            nodes.append(helper.make_node(op, [name], [result], perm=numbers))
        elif op == "Flatten":
            nodes.append(helper.make_node(op, [name], [result], axis=numbers[0]))
        else:
            arrays[f"c{index}"] = np.array(numbers)
            nodes.append(helper.make_node(op, [name, f"c{index}"], [result]))
    return Model.load(write(path, nodes, [info("x", list(SHAPE))], [info("y", None, FLOAT)], stored(**arrays)))


def apply(array: Array, op: str, numbers: list[int]) -> Array:
    """The same with numpy."""
    if op == "Transpose":
        return array.transpose(numbers)
    if op == "Unsqueeze":
        return np.expand_dims(array, tuple(numbers))
    if op == "Squeeze":
        return np.squeeze(array, tuple(numbers))
    return array.reshape(numbers if op == "Reshape" else (math.prod(array.shape[: numbers[0]]), -1))


def strides(source: Layout) -> dict[int, int]:
    """How far apart neighbours along each atom lie in the source, by atom."""
    step, found = 1, {}
    for atom in reversed(leaves(atom for axis in source for atom in axis)):
        found[id(atom)] = step
        step *= atom.size
    return found


@pytest.mark.parametrize("chain", CHAINS)
def test_the_final_layout_addresses_every_element(chain: str, tmp_path: Path) -> None:
    model = build(tmp_path / "in.onnx", CHAINS[chain])
    facts, source = analyse(model), start(SHAPE)
    layout, array = source, np.arange(math.prod(SHAPE)).reshape(SHAPE)
    for node, (op, numbers) in zip(list(model.graph), CHAINS[chain], strict=True):
        layout, array = follow(layout, node, facts), apply(array, op, numbers)
    atoms = [leaves(axis) for axis in layout]
    assert tuple(math.prod(atom.size for atom in axis) for axis in atoms) == array.shape
    step = strides(source)
    expected = np.zeros((), dtype=np.int64)
    for axis in atoms:  # offsets along one axis: its atoms, outermost first
        offsets = np.zeros(1, dtype=np.int64)
        for atom in axis:
            offsets = (offsets[:, None] + np.arange(atom.size) * step[id(atom)]).reshape(-1)
        expected = expected[..., None] + offsets
    assert np.array_equal(expected, array)


@pytest.mark.parametrize("target", [(4, 4), (16,), (3, 16), (5, 1), (2, 3, 9)])
def test_shapes_that_do_not_fit_are_errors(target: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError):
        regroup(start(SHAPE), target)


@pytest.mark.parametrize(
    ("op", "shape", "repeats"), [("Expand", [2, 4, 3, 8], 4), ("Expand", [5, 2, 3, 8], 5), ("Tile", [1, 1, 3], 3)]
)
def test_copies_are_marked(op: str, shape: list[int], repeats: int, tmp_path: Path) -> None:
    """Copies carry no data of their own; the rest of the layout is what it was."""
    size = shape if op == "Expand" else [a * b for a, b in zip(SHAPE, shape, strict=True)]
    source = [2, 1, 3, 8] if shape[:2] == [2, 4] else list(SHAPE)
    path = write(
        tmp_path / "in.onnx",
        [helper.make_node(op, ["x", "n"], ["y"])],
        [info("x", source)],
        [info("y", size)],
        stored(n=np.array(shape)),
    )
    model = Model.load(path)
    layout = follow(start(source), model.graph.node(0), analyse(model))
    copies = [atom for axis in layout for atom in leaves(axis) if atom.repeat]
    assert [atom.size for atom in copies] == [repeats]


@pytest.mark.parametrize(
    ("index", "good"),
    [([0, 0, 1, 1, 2, 2], True), ([0, 1, 2, 0, 1, 2], True), ([2, 1, 0], False), ([0, 0, 1, 2], False)],
)
def test_gather_is_followed_only_as_a_repetition(index: list[int], good: bool, tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.onnx",
        [helper.make_node("Gather", ["x", "i"], ["y"], axis=1)],
        [info("x", list(SHAPE))],
        [info("y", [2, len(index), 8])],
        stored(i=np.array(index)),
    )
    model = Model.load(path)
    if not good:
        with pytest.raises(LayoutError):
            follow(start(SHAPE), model.graph.node(0), analyse(model))
        return
    axis = leaves(follow(start(SHAPE), model.graph.node(0), analyse(model))[1])
    assert [(atom.size, atom.repeat) for atom in axis] == (
        [(3, False), (2, True)] if index[1] == 0 else [(2, True), (3, False)]
    )


def test_a_split_is_seen_from_every_layout() -> None:
    atom = Atom(12)
    first: Layout = [[atom]]
    second = regroup(first, (3, 4))
    assert leaves(first[0]) == [second[0][0], second[1][0]]
