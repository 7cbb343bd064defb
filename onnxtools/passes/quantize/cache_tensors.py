"""The KV cache in INT8 or FP8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.cache import cache_inputs, kind_of, rotation
from onnxtools.analysis.facts import Facts
from onnxtools.base.errors import JobError
from onnxtools.calibration.run import Findings
from onnxtools.calibration.statistics import Observer, RotationRange
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, is_op
from onnxtools.numerics.formats import FP8, INT8, Format, scale_of
from onnxtools.passes.qdq import COMPUTED, QdqBuilder

MICROSOFT = "com.microsoft"
_SLOTS = {"key": (3, 1, 12), "value": (4, 2, 13)}
"""GroupQueryAttention, by kind: index of the past input, of the present output, and of the scale input."""


@dataclass(frozen=True)
class Cache:
    """One cache of one layer.

    Attributes:
        past: the graph's input.
        present: the graph's output, which holds past and new tokens.
        node: Concat, TensorScatter or GroupQueryAttention.
        kind: `key` or `value`.
        dtype: the type of `past`.
        rotated: channels of keys that rotary embedding rotates, 0 for none.
        neighbours: whether the rotated pairs are (2i, 2i + 1) instead of halves.
    """

    past: ir.Value
    present: ir.Value
    node: ir.Node
    kind: str
    dtype: ir.DataType
    rotated: int = 0
    neighbours: bool = False

    @property
    def new(self) -> ir.Value:
        """The new keys or values that a Concat or TensorScatter adds to the cache."""
        value = self.node.inputs[1]
        assert value is not None
        return value


def caches(model: Model, facts: Facts) -> list[Cache]:
    """The caches of a graph, in the order of its inputs.

    Raises:
        JobError: there are none, or they are quantized already.
    """
    entries = [entry for value in model.graph.inputs if (entry := _cache(value, facts, model)) is not None]
    stored = next((value for value in cache_inputs(model) if value.dtype not in COMPUTED), None)
    if not entries and stored is not None:
        raise JobError(
            f"{model.path}: its cache {stored.name!r} is {stored.dtype} already; start from the model in its own "
            "precision"
        )
    if not entries:
        raise JobError(
            f"{model.path}: has no KV cache to quantize; run `onnxtools add-kv-cache`, or export with --kv-cache "
            "concat, scatter or gqa"
        )
    quantized = next((cache for cache in entries if cache.past.dtype not in COMPUTED), None)
    if quantized is not None:
        raise JobError(
            f"{model.path}: its cache {quantized.past.name!r} is {quantized.past.dtype} already; start from the model "
            "in its own precision"
        )
    return entries


def _cache(past: ir.Value, facts: Facts, model: Model) -> Cache | None:
    if past.shape is None or len(past.shape) != 4:
        return None
    for node, index in past.uses():
        if is_op(node, "Concat", "TensorScatter") and index == 0 and node.outputs[0].is_graph_output():
            kind = _kind(node.outputs[0], past.name or "")
            rotated, neighbours = rotation(node.inputs[1], facts, model) if kind == "key" else (0, False)
            return Cache(past, node.outputs[0], node, kind, past.dtype or ir.DataType.FLOAT, rotated, neighbours)
        if is_op(node, "GroupQueryAttention", domain=MICROSOFT) and index in (3, 4):
            kind = "key" if index == 3 else "value"
            table = facts[node.inputs[7]].shape if len(node.inputs) > 7 and attribute(node, "do_rotary", 0) else None
            rotated = 2 * table[1] if table is not None and kind == "key" else 0
            return Cache(
                past,
                node.outputs[_SLOTS[kind][1]],
                node,
                kind,
                past.dtype or ir.DataType.FLOAT,
                rotated,
                bool(attribute(node, "rotary_interleaved", 0)),
            )
    return None


def _kind(present: ir.Value, name: str) -> str:
    """`key` or `value`: by the input of Attention that reads the cache, else by its name."""
    for reader, index in present.uses():
        if is_op(reader, "Attention") and index in (1, 2):
            return ("key", "value")[index - 1]
    return kind_of(name)


@dataclass(frozen=True)
class KvScheme:
    """One scale for each cache.

    The scale of keys comes from the largest pair of channels that rotary embedding rotates into each other, so that it
    holds at every position and not only at those of the calibration texts.
    """

    form: Format
    caches: Sequence[Cache]

    @property
    def nodes(self) -> set[ir.Node]:
        """The nodes that compute the observed values."""
        return {cache.node for cache in self.caches}

    def watch(self, values: set[ir.Value]) -> dict[ir.Value, tuple[Observer, ...]]:
        """Observers of the caches among `values`."""
        return {
            cache.present: (RotationRange(cache.rotated, cache.neighbours),)
            for cache in self.caches
            if cache.present in values
        }

    def conclude(self, seen: dict[ir.Value, tuple[Any, ...]]) -> Findings:
        """`kv.<input name>`: the largest magnitude of each observed cache, rank 0."""
        return {
            f"kv.{cache.past.name}": np.array(float(seen[cache.present][0].amax.max()))
            for cache in self.caches
            if cache.present in seen
        }

    def notes(self) -> list[str]:
        """Notes on runtimes that cannot run the result."""
        kinds = {cache.node.op_type for cache in self.caches}
        notes = (
            ["TensorRT updates static caches in fp32, fp16 and bf16 alone: this file is for ONNX Runtime"]
            if "TensorScatter" in kinds
            else []
        )
        if "GroupQueryAttention" in kinds and self.form is FP8:
            notes.append("ONNX Runtime's GroupQueryAttention has an FP8 cache on CUDA alone")
        return notes

    def emit(self, build: QdqBuilder, found: Findings, cache: Cache) -> dict[str, Any]:
        """Quantize one cache; returns its row of the result table."""
        name = cache.past.name or "past"
        if cache.node.op_type == "GroupQueryAttention":
            scale = self._grouped(build, cache, float(found[f"kv.{name}"]))
        else:
            scale = scale_of(found[f"kv.{name}"], self.form, cache.dtype)
            (self._stored if self.form is INT8 else self._converted)(build, cache, scale)
        cache.past.dtype = self.form.dtype
        return {
            "layer": name,
            "weight": "",
            "scheme": f"KV cache {self.form.name}",
            "scale": f"{float(scale.reshape(-1)[0]):.3g}",
            "snr_db": None,
            "error": None,
            "left": "",
        }

    def _stored(self, build: QdqBuilder, cache: Cache, scale: np.ndarray) -> None:
        """Quantize the new keys or values; the node joins them to the quantized cache."""
        node, present = cache.node, cache.present
        readers = list(present.uses())
        build.build.before = node
        node.replace_input_with(1, build.quantized(cache.new, self.form, scale, f"{cache.past.name}/new"))
        present.dtype = self.form.dtype
        self._dequantize_readers(build, present, readers, scale, cache)

    def _converted(self, build: QdqBuilder, cache: Cache, scale: np.ndarray) -> None:
        """Dequantize the cache before the node and quantize the whole cache behind it.

        This is for FP8: ONNX's Concat does not take it, and ONNX Runtime has no FP8 kernel for TensorScatter. Stored
        values pass DequantizeLinear and QuantizeLinear of one scale unchanged.
        """
        node, present = cache.node, cache.present
        readers = list(present.uses())
        build.build.before = node
        node.replace_input_with(0, build.dequantized(cache.past, self.form, scale, f"{cache.past.name}/past"))
        name, present.name = present.name, build.build.names(f"{present.name}/whole")
        build.build.before = readers[0][0] if readers else None
        stored = build.quantized(present, self.form, scale, f"{cache.past.name}/present")
        stored.name = name
        outputs = build.build.graph.outputs
        outputs[list(outputs).index(present)] = stored
        self._dequantize_readers(build, stored, readers, scale, cache)

    def _dequantize_readers(
        self,
        build: QdqBuilder,
        stored: ir.Value,
        readers: Sequence[tuple[ir.Node, int]],
        scale: np.ndarray,
        cache: Cache,
    ) -> None:
        if readers:
            build.build.before = readers[0][0]
            wide = build.dequantized(stored, self.form, scale, f"{cache.past.name}/read")
            for reader, index in readers:
                reader.replace_input_with(index, wide)

    def _grouped(self, build: QdqBuilder, cache: Cache, amax: float) -> np.ndarray:
        """Let GroupQueryAttention quantize its cache; returns the scale, float32 [1]."""
        node = cache.node
        _, output, slot = _SLOTS[cache.kind]
        scale = scale_of(np.array([amax]), self.form, ir.DataType.FLOAT)
        node.resize_inputs(max(len(node.inputs), 14))
        node.replace_input_with(slot, build.build.constant(scale, f"{cache.past.name}_scale"))
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        node.attributes[f"{cache.kind[0]}_quant_type"] = ir.AttrString(f"{cache.kind[0]}_quant_type", "PER_TENSOR")
        node.outputs[output].dtype = self.form.dtype
        return scale
