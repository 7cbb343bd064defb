"""Inputs of a graph for checks: by rule where nobody gives any, or from a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.cache import may_be_past, positions, settle_sizes
from onnxtools.analysis.facts import analyse, dim_name, dim_terms, is_ids_like, is_past_length, stand_ins, token_input
from onnxtools.base.errors import JobError
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, constant_tensor, is_op

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]

BATCH, SEQUENCE = 2, 16
FAR = 4096
"""Positions from here on are looked at too: rotary angles that were rounded are wrong there first."""
MAX_BYTES = 1 << 30
"""Inputs larger than this are not made up."""


@dataclass(frozen=True)
class Probe:
    """Inputs of one comparison.

    Attributes:
        title: what is special about them; empty for the plain ones.
        real: booleans [batch, sequence], True where a token is real; None where all are.
    """

    title: str
    feeds: Feeds
    real: Array | None = None

    def of_real(self, array: Array) -> Array:
        """What of an output belongs to real tokens: [tokens, ...] of [batch, sequence, ...] or [batch, heads, sequence,
        ...].
        """
        if self.real is None:
            return array
        if array.shape[:2] == self.real.shape:
            return array[self.real]
        if array.ndim == 4 and (array.shape[0], array.shape[2]) == self.real.shape:
            return array.swapaxes(1, 2)[self.real]
        return array


def probes(
    model: Model, batch: int = BATCH, sequence: int = SEQUENCE, seed: int = 0, rows: int | None = None
) -> tuple[list[Probe], list[str]]:
    """Plain inputs; the same with a left-padded row, and at positions from 4096 on, where the model has such inputs.
    And what could not be made, a line each.

    Args:
        rows: token ids are drawn from the first so many rows of the table.
    Raises:
        JobError: an input without a type or shape, or too large.
    """
    plain = random_feeds(model, batch, sequence, seed, rows)
    tokens = token_input(model)
    found, notes = [Probe("", plain)], []
    if tokens is not None and vocabulary(tokens.value) is None:
        notes.append(f"the vocabulary is unknown: {tokens.value.name} holds the ids 0 and 1 alone")
    if (padded := _padded(model, plain)) is not None:
        found.append(padded)
    if (far := _far(model, plain)) is not None:
        found.append(far)
    return found, notes


_LARGEST, _TOTAL, _OPERATIONS = 512 << 20, 8 << 30, 5e10
"""Bytes of one value and of all, and operations in products with weights, that a check which nobody asked for may cost:
some seconds.
"""


def sizes_of(model: Model, feeds: Feeds) -> dict[str, int]:
    """Symbolic dimensions of the inputs, as `feeds` have them."""
    return {
        dim_name(value, axis): int(feeds[value.name].shape[axis])
        for value in model.graph.inputs if value.name and value.name in feeds
        for axis, dim in enumerate(value.shape or ()) if not isinstance(dim, int) and axis < feeds[value.name].ndim
    }  # fmt: skip


def too_costly(model: Model, feeds: Feeds) -> str:
    """Why a run on `feeds` would cost more than a check may; empty where it would not, as far as the graph tells."""
    facts = analyse(model, stand_ins(model) | sizes_of(model, feeds), limit=1 << 16)
    sizes = [
        4 * math.prod(shape)
        for node in model.graph
        for value in node.outputs
        if (shape := facts[value].shape) is not None
    ]
    tokens = token_input(model)
    count = feeds[tokens.value.name or ""].size if tokens is not None and tokens.value.name in feeds else 1
    operations = 2 * count * sum(tensor.size for value, tensor in model.weights() if len(tensor.shape) > 1)
    if max(sizes, default=0) > _LARGEST or sum(sizes) > _TOTAL:
        return f"its values would take {sum(sizes) / 1e9:.1f} GB"
    return f"it would take {operations:.1e} operations" if operations > _OPERATIONS else ""


def _named(model: Model, part: str, feeds: Feeds, also: ir.DataType | None = None) -> str | None:
    """The input [batch, sequence] of integers, or of the type `also`, that is called so."""
    values = (
        v
        for v in model.graph.inputs
        if is_ids_like(v) or (v.dtype == also and v.shape is not None and len(v.shape) == 2)
    )
    return next((v.name for v in values if v.name in feeds and part in (v.name or "").lower()), None)


def _padded(model: Model, plain: Feeds) -> Probe | None:
    """The last row begins with padding: its mask is 0 there, and its positions are counted from the first real token,
    as transformers does.
    """
    mask, place = _named(model, "mask", plain, ir.DataType.BOOL), _named(model, "position", plain)
    tokens = token_input(model)
    rows, length = plain[mask].shape if mask is not None else (0, 0)
    if (
        mask is None
        or tokens is None
        or plain[mask].shape != plain[tokens.value.name or ""].shape
        or rows < 2
        or length < 3
    ):
        return None  # a mask over the slots of a static cache says where, not whether, a token is
    real = np.ones((rows, length), bool)
    real[-1, : length // 3] = False
    feeds = {**plain, mask: real.astype(plain[mask].dtype)}
    if place is not None and plain[place].shape == real.shape:
        feeds[place] = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(plain[place].dtype)
    return Probe("padded", feeds, real)


def _far(model: Model, plain: Feeds) -> Probe | None:
    """Positions from 4096 on, or the last that the model has."""
    place = _named(model, "position", plain)
    if place is None:
        return None
    limit, last = positions(model), int(plain[place].max())
    first = FAR if limit is None else min(FAR, limit - 1 - last)
    return (
        Probe(f"positions from {first}", {**plain, place: plain[place] + np.array(first, plain[place].dtype)})
        if first > 0
        else None
    )


def long_probe(model: Model, seed: int = 0) -> Probe | None:
    """One row of more than 4096 tokens, for a graph that counts positions itself; None where it has an input for them,
    a fixed length or fewer positions.
    """
    tokens = token_input(model)
    counted = not any(is_ids_like(value) and "position" in (value.name or "").lower() for value in model.graph.inputs)
    if tokens is None or not counted or any(isinstance(dim, int) for dim in tokens.value.shape or ()):
        return None
    limit = positions(model)
    length = FAR + SEQUENCE if limit is None else min(FAR + SEQUENCE, limit)
    return Probe(f"{length} tokens", random_feeds(model, 1, length, seed)) if length > SEQUENCE else None


def random_feeds(
    model: Model, batch: int = BATCH, sequence: int = SEQUENCE, seed: int = 0, rows: int | None = None
) -> Feeds:
    """Inputs by rule: token ids all over the vocabulary (or its first `rows`), positions 0.., causal 4-D masks, other
    masks that keep all, empty or zero caches, normal floats.
    """
    settle_sizes(model)
    generator = np.random.default_rng(seed)
    return {value.name or "": _feed(value, batch, sequence, generator, rows) for value in model.graph.inputs}


def _feed(value: ir.Value, batch: int, sequence: int, generator: np.random.Generator, rows: int | None) -> Array:
    if value.shape is None or value.dtype in (None, ir.DataType.UNDEFINED):
        raise JobError(f"input {value.name!r} has no recorded type or shape; give data with --inputs")
    if value.dtype == ir.DataType.STRING:
        raise JobError(f"input {value.name!r} takes texts, which are not made up; give data with --inputs")
    shape = [_dim(dim, axis, value, batch, sequence) for axis, dim in enumerate(value.shape)]
    if math.prod(shape) * value.dtype.bitwidth > 8 * MAX_BYTES or min(shape, default=0) < 0:
        raise JobError(
            f"input {value.name!r} of shape {shape} has more than {MAX_BYTES >> 30} GiB; give data with --inputs, or "
            "say --no-check"
        )
    name = (value.name or "").lower()
    dtype = np.dtype(np.float32) if value.dtype == ir.DataType.BFLOAT16 else value.dtype.numpy()
    if may_be_past(name):
        return np.zeros(shape, dtype)  # also static caches, whose slots are masked
    if "position" in name and is_ids_like(value):
        along = np.arange(shape[1], dtype=dtype) if shape[1] == sequence else np.arange(shape[0], dtype=dtype)[:, None]
        return np.broadcast_to(along, shape).copy()
    if "mask" in name:
        if value.dtype == ir.DataType.BOOL and len(shape) == 4:
            causal = np.triu(np.ones(shape[-2:], dtype=bool), shape[-1] - shape[-2] + 1)
            return np.broadcast_to(causal if _true_hides(value) else ~causal, shape).copy()
        if value.dtype.is_floating_point() and len(shape) == 4:
            return np.broadcast_to(np.triu(np.full(shape[-2:], -10000.0), shape[-1] - shape[-2] + 1), shape).astype(
                dtype
            )
        return (
            np.ones(shape, dtype=dtype)
            if value.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
            else np.zeros(shape, dtype=dtype)
        )
    if value.dtype in (ir.DataType.INT64, ir.DataType.INT32):
        return _ids(vocabulary(value) or 2, rows, shape, generator).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def _true_hides(mask: ir.Value) -> bool:
    """Whether True takes a key out (NeMo: Where(mask, -10000, scores)) or keeps it (the Attention operator, Where(mask,
    scores, ...)).
    """
    for node, index in mask.uses():
        if node.op_type == "Attention":
            return False
        if node.op_type == "Where" and index == 0:
            chosen = node.inputs[1]
            while chosen is not None and is_op(chosen.producer(), "Cast", "CastLike"):
                chosen = chosen.producer().inputs[0]  # type: ignore[union-attr]
            fill = constant_tensor(chosen)
            return fill is not None and fill.size == 1
        if node.op_type == "Not":
            return not _true_hides(node.outputs[0])
        if node.op_type in ("Unsqueeze", "Identity", "Expand", "Cast", "Slice", "Reshape"):
            return _true_hides(node.outputs[0])
    return True


def _ids(size: int, rows: int | None, shape: list[int], generator: np.random.Generator) -> Array:
    """Token ids, no two alike where the vocabulary has as many."""
    size, count = min(size, rows or size), math.prod(shape)
    return (
        generator.permutation(size)[:count] if count <= size <= 1 << 20 else generator.integers(0, size, count)
    ).reshape(shape)


def _dim(dim: int | ir.SymbolicDim, axis: int, value: ir.Value, batch: int, sequence: int) -> int:
    if isinstance(dim, int):
        return dim
    terms = dim_terms(dim.value or "")
    if len(terms) > 1:  # optimum's `past_sequence_length + sequence_length`
        return sum(term if isinstance(term, int) else _size(term, axis, batch, sequence) for term in terms)
    return _size(dim.value or "", axis, batch, sequence)


def _size(name: str, axis: int, batch: int, sequence: int) -> int:
    name = name.lower()
    if is_past_length(name):
        return 0
    if "batch" in name or (not name and axis == 0):
        return batch
    return batch if axis == 0 and "seq" not in name else sequence


_ON_THE_WAY = {
    "Reshape",
    "Cast",
    "Identity",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Slice",
    "Clip",
    "Transpose",
    "Expand",
    "Max",
    "Min",
}
"""Operators through which token ids go on to the table."""


def vocabulary(ids: ir.Value) -> int | None:
    """Rows of the smallest table that `ids` index, through reshapes, casts and the like; None where they index none."""
    waiting, seen, rows = [ids], {ids}, []
    while waiting:
        for node, index in waiting.pop().uses():
            if is_op(node, "Gather") and index == 1:
                rows.append(_rows(node.inputs[0], node.attributes.get_int("axis", 0)))
            elif index == 0 and node.op_type in _ON_THE_WAY and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                waiting.append(node.outputs[0])
    return min((size for size in rows if size is not None), default=None)


def _rows(table: ir.Value | None, axis: int) -> int | None:
    """Of a table along `axis`, as its own shape or the stored weight behind it says."""
    while table is not None:
        tensor = constant_tensor(table)
        shape = tensor.shape.numpy() if tensor is not None else table.shape
        if shape is not None and -len(shape) <= axis < len(shape) and isinstance(size := shape[axis], int):
            return size
        node = table.producer()
        if tensor is not None or not is_op(node, "Cast", "Identity", "DequantizeLinear", "Transpose") or node is None:
            return None
        if node.op_type == "Transpose":
            order = attribute(node, "perm", None)
            axis = -1 - axis if order is None else order[axis]
        table = node.inputs[0]
    return None


def read_feeds(path: Path) -> Feeds:
    """Inputs from an .npz file or from Polygraphy's JSON (the first entry of a list of feeds).

    Raises:
        JobError: the file cannot be read.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        from polygraphy.json import load_json

        data = load_json(str(path))
        first = data[0] if isinstance(data, list) else data
        return {name: np.asarray(array) for name, array in first.items()}
    except Exception as error:
        detail = " ".join(str(error).split())[:200]
        raise JobError(f"{path}: no readable inputs ({detail}); write an .npz or a Polygraphy JSON file") from error
