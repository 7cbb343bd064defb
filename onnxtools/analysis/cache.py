"""The KV cache as inputs and outputs of a graph: names, shapes, axes. Shared by `add-kv-cache` and `export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from onnxtools.analysis.facts import Facts, analyse
from onnxtools.analysis.positions import table_rows
from onnxtools.ir.description import described
from onnxtools.ir.edit import Builder
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, is_op

Dim = int | str | ir.SymbolicDim | None
Kind = Literal["key", "value"]


@dataclass(frozen=True)
class KvCache:
    """Declares the cache tensors of a graph.

    Attributes:
        naming: `hf`: past_key_values.N.key / present.N.key; `nemo`: past_key_values.N.decoder.key / present_key_values.N.decoder.key.
        policy: `concat`: outputs hold the whole cache; `new`: only the new tokens (new_key_values.N.key).
        layout: `bnsh` [batch, kv_heads, sequence, head_dim]; `sbnh` [sequence, batch, kv_heads, head_dim].
        batch: size or name of the batch axis.
    """

    builder: Builder
    batch: Dim = "batch"
    naming: Literal["hf", "nemo"] = "hf"
    policy: Literal["concat", "new"] = "concat"
    layout: Literal["bnsh", "sbnh"] = "bnsh"

    @property
    def axis(self) -> int:
        """The sequence axis."""
        return 2 if self.layout == "bnsh" else 0

    def names(self, index: int, kind: str) -> tuple[str, str]:
        """Input and output of block `index`."""
        part = f"{index}.decoder.{kind}" if self.naming == "nemo" else f"{index}.{kind}"
        whole = "present_key_values" if self.naming == "nemo" else "present"
        return f"past_key_values.{part}", f"{whole if self.policy == 'concat' else 'new_key_values'}.{part}"

    def shape(self, heads: int, length: Dim, channels: int) -> list[Dim]:
        return [self.batch, heads, length, channels] if self.layout == "bnsh" else [length, self.batch, heads, channels]

    def past(self, index: int, kind: str, heads: int, channels: int, dtype: ir.DataType, length: Dim = "past_sequence") -> ir.Value:
        """Add the input."""
        shape = ir.Shape(self.shape(heads, length, channels))
        value = ir.val(self.builder.names(self.names(index, kind)[0]), dtype, shape)
        self.builder.graph.inputs.append(value)
        return value

    def present(self, value: ir.Value, index: int, kind: str, heads: int, channels: int, dtype: ir.DataType, length: Dim = "total_sequence") -> ir.Value:
        """Make `value` the output."""
        value.name = self.builder.names(self.names(index, kind)[1])
        value.shape, value.dtype = ir.Shape(self.shape(heads, length, channels)), dtype
        self.builder.graph.outputs.append(value)
        return value

    def concat(self, past: ir.Value, new: ir.Value, prefix: str) -> ir.Value:
        """Past, then new, along the sequence."""
        return self.builder.op("Concat", [past, new], f"{prefix}/Concat", axis=self.axis)

    def past_length(self, past: ir.Value, name: str) -> ir.Value:
        """Tokens in the cache, shape [1]."""
        return self.builder.op("Shape", [past], name, dtype=ir.DataType.INT64, shape=[1], start=self.axis, end=self.axis + 1)


def settle_sizes(model: Model) -> None:
    """Write the head size of caches into their shapes where it is called by a name, as ONNX Runtime GenAI does; the graph knows it."""
    named = [value for value in model.graph.inputs if value.shape is not None and len(value.shape) == 4 and not isinstance(value.shape[3], int)]
    if not named:
        return
    facts = analyse(model)
    known: dict[str, int] = {}
    for past in named:
        for node, index in past.uses():
            size = _head_size(node, index, facts)
            if size is not None:
                presents = [o for o in node.outputs if o.is_graph_output() and o.shape is not None and len(o.shape) == 4]
                for value in (past, *presents):
                    assert value.shape is not None
                    dim = value.shape[3]
                    if isinstance(dim, ir.SymbolicDim) and dim.value:
                        known[dim.value] = size
                    value.shape = ir.Shape([*list(value.shape)[:3], size])
    for value in (*model.graph.inputs, *model.graph.outputs):  # one name is one size; behind a layer that is not known nothing else is
        last = value.shape[3] if value.shape is not None and len(value.shape) == 4 else None
        if value.shape is not None and isinstance(last, ir.SymbolicDim) and last.value in known:
            value.shape = ir.Shape([*list(value.shape)[:3], known[last.value]])


def _head_size(node: ir.Node, index: int, facts: Facts) -> int | None:
    """Channels of a head, off what joins the cache with new keys or values."""
    known = set(facts.dims.values())
    if is_op(node, "Concat", "TensorScatter") and index == 0:
        shape = facts[node.inputs[1]].shape
        return shape[3] if shape is not None and len(shape) == 4 and shape[3] not in known else None
    if is_op(node, "GroupQueryAttention", domain="com.microsoft") and index in (3, 4):
        heads, shared = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
        keys, packed = facts[node.inputs[1]].shape, facts[node.inputs[0]].shape
        if keys is not None and shared:
            return int(keys[-1]) // int(shared)
        return int(packed[-1]) // int(heads + 2 * shared) if packed is not None and heads + shared else None
    return None


def positions(model: Model) -> int | None:
    """Tokens that a sequence may have, as far as the model says: its exporter, else its tables of positions."""
    info = described(model)
    found = info["model"].get("max_position_embeddings") if info else table_rows(model)
    return found if isinstance(found, int) and found > 0 else None


def rotation(keys: ir.Value | None, facts: Facts, model: Model) -> tuple[int, bool]:
    """How rotary embedding turned `keys` (or queries) [batch, heads, sequence, head_dim]: rotated channels, and whether pairs are neighbours.

    Of the RotaryEmbedding before them, through a cache too; else of what the model says of itself; (0, False) where nothing is known.
    """
    node = keys.producer() if keys is not None else None
    while node is not None and is_op(node, "Cast", "Transpose", "Identity", "Concat", "TensorScatter"):
        before = node.inputs[1 if node.op_type in ("Concat", "TensorScatter") else 0]
        node = before.producer() if before is not None else None
    if node is not None and is_op(node, "RotaryEmbedding"):
        shape = facts[node.inputs[0]].shape
        return int(attribute(node, "rotary_embedding_dim", 0) or (shape[-1] if shape else 0)), bool(attribute(node, "interleaved", 0))
    info = described(model)
    rope = info["model"].get("rope") if info else None
    dim = rope.get("dim") if isinstance(rope, dict) else None
    return (dim, False) if isinstance(dim, int) and dim > 0 else (0, False)
