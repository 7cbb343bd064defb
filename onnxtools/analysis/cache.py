"""`CacheSpec`: the KV cache as inputs and outputs of a graph, and its sizes, positions and rotation."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.facts import Facts, analyse, is_past_length
from onnxtools.analysis.positions import table_rows
from onnxtools.base.dtypes import BY_NAME
from onnxtools.base.errors import JobError
from onnxtools.ir.description import described
from onnxtools.ir.edit import Builder
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, is_op

Dim = int | str | ir.SymbolicDim | None
Kind = Literal["key", "value"]
CacheKind = Literal["none", "concat", "scatter", "gqa"]

_PAST, _NEW = "past_key_values", "new_key_values"
_PRESENT = ("present", "present_key_values")
"""Prefixes of the outputs that continue past_key_values: hf and nemo naming of add-kv-cache, and optimum's."""


def is_past(name: str | None) -> bool:
    """Whether an input called `name` is a cache, which a step takes from the step before."""
    return (name or "").startswith(_PAST)


def may_be_past(name: str | None) -> bool:
    """Whether an input may be the cache of any exporter. Such an input gets no random or calibration data."""
    return "past" in (name or "").lower()


def is_foreign_past(name: str | None) -> bool:
    """Whether an input is a cache by the names of any known exporter."""
    return "past_key" in (name or "")


def is_present(name: str | None) -> bool:
    """Whether an output called `name` belongs to the cache."""
    return "key_values" in (name or "") or (name or "").startswith("present.")


def kind_of(name: str | None) -> Kind:
    """Returns "key" or "value", whichever comes last in the cache's name (`past_key_values.0.value` has both)."""
    return "value" if (name or "").rfind("value") > (name or "").rfind("key") else "key"


def present_of(past: str, outputs: Container[str]) -> tuple[str, bool] | None:
    """Finds the output that continues the input `past`.

    Returns:
        Its name, and whether it holds only the new tokens (--policy new); None if there is no such output.
    """
    rest = past.removeprefix(_PAST)
    for prefix in (*_PRESENT, _NEW):
        if prefix + rest in outputs:
            return prefix + rest, prefix == _NEW
    return None


def cache_inputs(model: Model) -> list[ir.Value]:
    """Returns the graph's inputs that are caches, in graph order."""
    return [value for value in model.graph.inputs if is_past(value.name)]


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of the cache of a graph.

    Attributes:
        past: name of its input.
        present: name of the output that continues it, if any.
        axis: the axis of tokens.
        shape: the input's sizes; a dynamic one is a name or None.
        dtype: element type.
        slots: fewest slots of a dynamic length that the operator takes: a window of ONNX Runtime GenAI has no shorter
            cache. Slots beyond the past hold anything.
    """

    past: str
    present: str | None
    axis: int
    shape: tuple[Dim, ...]
    dtype: ir.DataType
    slots: int = 0


@dataclass(frozen=True)
class CacheSpec:
    """The KV cache of a graph. Only this module examines the names of cache inputs and outputs.

    Attributes:
        kind: `concat`: outputs are longer than inputs; `scatter`, `gqa`: buffers of a fixed length that are written in
            place.
        naming: `hf`: past_key_values.N.key / present.N.key; `nemo`: past_key_values.N.decoder.key /
            present_key_values.N.decoder.key.
        policy: `concat`: outputs hold the whole cache; `new`: only the new tokens (new_key_values.N.key).
        layout: `bnsh` [batch, kv_heads, sequence, head_dim]; `sbnh` [sequence, batch, kv_heads, head_dim].
        batch: size or name of the batch axis.
        layers, heads, head_dim, dtype: of all caches; 0 or None if layers differ or the value is unknown.
        length: slots of a cache of fixed length, else None.
        tensors: the tensors of the graph that `find` examined.
    """

    kind: CacheKind = "concat"
    naming: Literal["hf", "nemo"] = "hf"
    policy: Literal["concat", "new"] = "concat"
    layout: Literal["bnsh", "sbnh"] = "bnsh"
    batch: Dim = "batch"
    layers: int = 0
    heads: int = 0
    head_dim: int = 0
    dtype: ir.DataType | None = None
    length: int | None = None
    tensors: tuple[CacheTensor, ...] = ()

    @classmethod
    def find(cls, model: Model) -> CacheSpec | None:
        """Returns the cache of `model`, or None if it has none.

        It also writes sizes into the model's shapes (`settle_sizes`).
        """
        pasts = cache_inputs(model)
        if not pasts:
            return None
        settle_sizes(model)
        outputs = {value.name or "" for value in model.graph.outputs}
        tensors, policies = [], set[bool]()
        for value in pasts:
            present, is_new = present_of(value.name or "", outputs) or (None, False)
            assert value.shape is not None and value.dtype is not None
            shape = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
            axis = token_axis(shape)
            tensors.append(CacheTensor(value.name or "", present, axis, shape, value.dtype, _fewest_slots(value)))
            policies.add(is_new)
        first = tensors[0]
        heads, size = (first.shape[1], first.shape[3]) if len(first.shape) == 4 and first.axis == 2 else (None, None)
        length = first.shape[first.axis] if len(first.shape) > first.axis else None
        fixed = length if isinstance(length, int) else None
        gqa = any(is_op(node, "GroupQueryAttention", domain="com.microsoft") for node in model.graph)
        return cls(
            "gqa" if gqa else "scatter" if fixed is not None else "concat",
            policy="new" if True in policies else "concat",
            layout="bnsh" if first.axis else "sbnh",
            layers=len({t.past.removesuffix(kind_of(t.past)) for t in tensors}),
            heads=heads if isinstance(heads, int) else 0, head_dim=size if isinstance(size, int) else 0,
            dtype=first.dtype, length=fixed, tensors=tuple(tensors),
        )  # fmt: skip

    def feeds(self, rows: int, length: int = 0) -> dict[str, np.ndarray[Any, Any]]:
        """Returns zeros for every cache input, by name.

        Args:
            rows: sequences.
            length: tokens in a cache of dynamic length.

        Returns:
            Arrays of the inputs' types; float32 for bfloat16, which numpy lacks.
        """
        feeds = {}
        for tensor in self.tensors:
            shape = [
                dim if isinstance(dim, int) else max(length, tensor.slots) if is_past_length(str(dim or "")) else rows
                for dim in tensor.shape
            ]
            dtype = np.dtype(np.float32) if tensor.dtype == ir.DataType.BFLOAT16 else tensor.dtype.numpy()
            feeds[tensor.past] = np.zeros(shape, dtype)
        return feeds

    def carried(self) -> list[tuple[CacheTensor, str]]:
        """Returns each tensor with the name of its output.

        Raises:
            JobError: an input of the cache has no output.
        """
        lonely = next((tensor.past for tensor in self.tensors if tensor.present is None), None)
        if lonely is not None:
            raise JobError(
                f"no output matches the cache input {lonely!r}; expected present{lonely.removeprefix(_PAST)}"
            )
        return [(tensor, tensor.present) for tensor in self.tensors if tensor.present is not None]

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `kv_cache` in onnxtools.json."""
        dtypes = {value: key for key, value in BY_NAME.items()}
        return {
            "kind": self.kind, "dtype": dtypes[self.dtype] if self.dtype is not None else None, "layout": self.layout,
            "past": self.names("{n}", "{kind}")[0], "present": self.names("{n}", "{kind}")[1], "length": self.length,
            "layers": self.layers, "heads": self.heads, "head_dim": self.head_dim,
        }  # fmt: skip

    def declare(self, builder: Builder) -> CacheWriter:
        """Returns a writer that adds the tensors to the graph of `builder`."""
        return CacheWriter(self, builder)

    @property
    def axis(self) -> int:
        """The sequence axis of `layout`."""
        return 2 if self.layout == "bnsh" else 0

    def names(self, index: int | str, kind: str) -> tuple[str, str]:
        """Returns the names of the input and output of block `index`; `kind` is "key" or "value"."""
        part = f"{index}.decoder.{kind}" if self.naming == "nemo" else f"{index}.{kind}"
        whole = "present_key_values" if self.naming == "nemo" else "present"
        return f"past_key_values.{part}", f"{whole if self.policy == 'concat' else 'new_key_values'}.{part}"

    def shape(self, heads: int, length: Dim, channels: int) -> list[Dim]:
        """Returns the sizes of one cache tensor in `layout`."""
        return [self.batch, heads, length, channels] if self.layout == "bnsh" else [length, self.batch, heads, channels]


@dataclass(frozen=True)
class CacheWriter:
    """Adds the cache tensors that a `CacheSpec` describes to a graph."""

    spec: CacheSpec
    builder: Builder

    def past(
        self, index: int, kind: str, heads: int, channels: int, dtype: ir.DataType, length: Dim = "past_sequence"
    ) -> ir.Value:
        """Add the cache input of block `index` to the graph and return it."""
        shape = ir.Shape(self.spec.shape(heads, length, channels))
        value = ir.val(self.builder.names(self.spec.names(index, kind)[0]), dtype, shape)
        self.builder.graph.inputs.append(value)
        return value

    def present(
        self,
        value: ir.Value,
        index: int,
        kind: str,
        heads: int,
        channels: int,
        dtype: ir.DataType,
        length: Dim = "total_sequence",
    ) -> ir.Value:
        """Make `value` the cache output of block `index` and return it."""
        value.name = self.builder.names(self.spec.names(index, kind)[1])
        value.shape, value.dtype = ir.Shape(self.spec.shape(heads, length, channels)), dtype
        self.builder.graph.outputs.append(value)
        return value

    def concat(self, past: ir.Value, new: ir.Value, prefix: str) -> ir.Value:
        """Add a Concat of `past` and `new` along the sequence axis."""
        return self.builder.op("Concat", [past, new], f"{prefix}/Concat", axis=self.spec.axis)

    def past_length(self, past: ir.Value, name: str) -> ir.Value:
        """Add a Shape that returns the number of tokens in the cache, int64 [1]."""
        return self.builder.op(
            "Shape", [past], name, dtype=ir.DataType.INT64, shape=[1], start=self.spec.axis, end=self.spec.axis + 1
        )


def token_axis(shape: Sequence[Dim]) -> int:
    """Returns the axis of tokens: the first dynamic one with "past" or "cache" in its name, else 2.

    Axis 2 is that of [batch, heads, tokens, channels].
    """
    named = (axis for axis, dim in enumerate(shape) if isinstance(dim, str) and ("past" in dim or "cache" in dim))
    return next(named, 2)


def _fewest_slots(past: ir.Value) -> int:
    """Returns the window of a GroupQueryAttention that keeps no more than it (`sliding_window_cache`), else 0."""
    windows = [
        int(attribute(node, "local_window_size", 0))
        for node, _ in past.uses()
        if is_op(node, "GroupQueryAttention", domain="com.microsoft") and attribute(node, "sliding_window_cache", 0)
    ]
    return max(windows, default=0)


def settle_sizes(model: Model) -> None:
    """Replace a symbolic head size in the shapes of caches, as ONNX Runtime GenAI writes them, by its number.

    The number follows from the graph: from the nodes that join the cache with new keys or values.
    """
    named = [
        value
        for value in model.graph.inputs
        if value.shape is not None and len(value.shape) == 4 and not isinstance(value.shape[3], int)
    ]
    if not named:
        return
    facts = analyse(model)
    sizes: dict[str, int] = {}
    for past in named:
        for node, index in past.uses():
            size = _head_size(node, index, facts)
            if size is not None:
                presents = [
                    o for o in node.outputs if o.is_graph_output() and o.shape is not None and len(o.shape) == 4
                ]
                for value in (past, *presents):
                    assert value.shape is not None
                    dim = value.shape[3]
                    if isinstance(dim, ir.SymbolicDim) and dim.value:
                        sizes[dim.value] = size
                    value.shape = ir.Shape([*list(value.shape)[:3], size])
    # One name is one size. Behind an unknown layer, the name is the only source.
    for value in (*model.graph.inputs, *model.graph.outputs):
        last = value.shape[3] if value.shape is not None and len(value.shape) == 4 else None
        if value.shape is not None and isinstance(last, ir.SymbolicDim) and last.value in sizes:
            value.shape = ir.Shape([*list(value.shape)[:3], sizes[last.value]])


def _head_size(node: ir.Node, index: int, facts: Facts) -> int | None:
    """Returns the channels of a head, from a node that joins the cache (its input `index`) with new keys or values."""
    dynamic_sizes = set(facts.dims.values())
    if is_op(node, "Concat", "TensorScatter") and index == 0:
        shape = facts[node.inputs[1]].shape
        return shape[3] if shape is not None and len(shape) == 4 and shape[3] not in dynamic_sizes else None
    if is_op(node, "GroupQueryAttention", domain="com.microsoft") and index in (3, 4):
        heads, shared = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
        keys, packed = facts[node.inputs[1]].shape, facts[node.inputs[0]].shape
        if keys is not None and shared:
            return int(keys[-1]) // int(shared)
        return int(packed[-1]) // int(heads + 2 * shared) if packed is not None and heads + shared else None
    return None


def positions(model: Model) -> int | None:
    """Returns the longest sequence in tokens, by the model's description, else by its position tables, else None."""
    info = described(model)
    limit = info["model"].get("max_position_embeddings") if info else table_rows(model)
    return limit if isinstance(limit, int) and limit > 0 else None


def rotation(keys: ir.Value | None, facts: Facts, model: Model) -> tuple[int, bool]:
    """Returns the rotary embedding of `keys` (or queries) [batch, heads, sequence, head_dim].

    The source is the RotaryEmbedding before them, through a cache too, else the model's description.

    Returns:
        The number of rotated channels, and whether pairs are neighbours; (0, False) if unknown.
    """
    node = keys.producer() if keys is not None else None
    while node is not None and is_op(node, "Cast", "Transpose", "Identity", "Concat", "TensorScatter"):
        before = node.inputs[1 if node.op_type in ("Concat", "TensorScatter") else 0]
        node = before.producer() if before is not None else None
    if node is not None and is_op(node, "RotaryEmbedding"):
        shape = facts[node.inputs[0]].shape
        return int(attribute(node, "rotary_embedding_dim", 0) or (shape[-1] if shape else 0)), bool(
            attribute(node, "interleaved", 0)
        )
    info = described(model)
    rope = info["model"].get("rope") if info else None
    dim = rope.get("dim") if isinstance(rope, dict) else None
    if not isinstance(rope, dict) or not isinstance(dim, int) or dim <= 0:
        return 0, False
    return dim, bool(rope.get("interleaved"))
