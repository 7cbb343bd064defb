"""Give a full-sequence language model a key/value cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.attention import Attention, Operand, find_attention
from onnxtools.analysis.cache import CacheSpec, Dim, is_foreign_past
from onnxtools.analysis.facts import Facts, Tokens, analyse, token_input
from onnxtools.analysis.opsets import reach_opset
from onnxtools.analysis.positions import shift_positions
from onnxtools.base.dtypes import BY_NAME
from onnxtools.base.errors import JobError, NoMatchError, UsageError
from onnxtools.base.options import option
from onnxtools.ir.edit import Builder, forget_types, remove_unused, rename_or_bypass
from onnxtools.ir.model import Model
from onnxtools.ir.query import has_dynamic_scales
from onnxtools.passes.decompose_attention import DecomposeAttention
from onnxtools.passes.kv_cache.dynamic_shapes import make_dynamic
from onnxtools.passes.kv_cache.layout import from_bnsh, to_bnsh
from onnxtools.passes.kv_cache.locality import (
    check_locality,
    check_positions_follow_past,
    check_same_for_longer,
    restrict_to_new_tokens,
)
from onnxtools.passes.kv_cache.mask import MaskRewriter
from onnxtools.passes.kv_cache.renewal import Renewal
from onnxtools.passes.kv_cache.scores import ScoreReplay
from onnxtools.pipeline.passbase import Pass, PassResult

_ENCODERS = ("encoder_", "decoder_input_ids")
"""Beginnings of the names of inputs that an encoder-decoder alone has."""


@dataclass(frozen=True)
class AddKvCache(Pass):
    """Past keys and values become inputs, present ones outputs; the graph then takes any number of new tokens.

    Rules:
      - attention is found by structure; each block is rebuilt as MatMul, scale, mask, Softmax, MatMul over
        [batch, heads, sequence, channels], so no reshape inside it depends on the exporter's idea of the lengths;
      - the cache holds keys after rotary embedding and before heads are repeated (grouped and multi-query attention);
      - a mask is evaluated; one that hides later tokens, tokens beyond a window and padding is written again for
        position `past + i`; another one is computed for the whole length; a mask input grows to the total length;
      - masks and numbers that change with the length of the text are errors, and so are operators through which tokens
        meet outside attention;
      - positions counted in the graph (Range, sliced tables) start at the past length; `position_ids` inputs stay.
    """

    name = "add-kv-cache"
    numerics = "rounding"
    adds_cache = True
    example = "onnxtools add-kv-cache qdq.onnx kv.onnx"

    policy: Literal["concat", "new"] = option(
        "concat", "Outputs: the whole cache (concat) or only the new keys and values (new)."
    )
    layout: Literal["bnsh", "sbnh"] = option(
        "bnsh", "Cache axes: [batch, heads, sequence, channels] or [sequence, batch, heads, channels]."
    )
    naming: Literal["hf", "nemo"] = option(
        "hf", "past_key_values.N.key / present.N.key, or NeMo's past_key_values.N.decoder.key."
    )
    dtype: Literal["auto", "fp8", "fp16", "bf16", "fp32"] = option(
        "auto", "Element type of the stored cache; auto is the graph's own."
    )
    kv_scale: float = option(1.0, "Scale of an fp8 cache; 1.0 keeps values up to 448 and is not calibrated.")

    def __post_init__(self) -> None:
        if not (self.kv_scale > 0 and math.isfinite(self.kv_scale)):
            raise UsageError(f"add-kv-cache: kv_scale is {self.kv_scale}; it must be a positive number")

    def expand(self) -> list[Pass]:
        """DecomposeAttention runs first: Attention operators become MatMul, Softmax, MatMul with an explicit mask."""
        return [DecomposeAttention(), self]

    def requires(self, model: Model) -> None:
        cached = [v.name or "" for v in model.graph.inputs if is_foreign_past(v.name)]
        if cached:
            raise JobError(f"the model already has a KV cache (input {cached[0]!r}); start from the model without one")
        encoder = next((v.name for v in model.graph.inputs if (v.name or "").startswith(_ENCODERS)), None)
        if encoder is not None:
            raise JobError(
                f"the model is a part of an encoder-decoder (input {encoder!r}); add-kv-cache serves models that only "
                "decode"
            )
        if self.dtype == "fp8" and model.opset < 19:
            raise JobError(
                f"an fp8 cache needs opset 19 and the model is at {model.opset}; run `onnxtools convert IN OUT "
                "--opset19` first"
            )
        if token_input(model) is None:
            raise NoMatchError(
                "no integer input of shape [batch, sequence] (input_ids) was found; a KV cache needs token inputs"
            )

    def apply(self, model: Model) -> PassResult:
        notes = [f"Shape needs opset 15: {reach_opset(model, 15)[1]}"] if model.opset < 15 else []
        _read_lengths_from_ids(model)
        facts = analyse(model)
        blocks = find_attention(model, facts)
        if not blocks:
            einsum = next((node.name for node in model.graph if node.op_type == "Einsum"), None)
            hint = f" (node {einsum!r} is an Einsum: export attention with MatMul)" if einsum else ""
            raise NoMatchError(
                f"no attention (Softmax between two MatMuls of activations) was found{hint}; nothing can be cached"
            )
        check_same_for_longer(model)
        originals = set(model.graph)
        lowering = _Concat(self, model, facts)
        for index, block in enumerate(blocks):
            lowering.rewrite(index, block)
        remove_unused(model)
        restrict_to_new_tokens(
            lowering.grown_inputs(),
            originals,
            lowering.past_1d,
            lowering.total,
            lowering.builder,
        )
        shifted: list[str] = []
        if lowering.static:
            notes += make_dynamic(model, lowering.tokens, lowering.past_1d, lowering.total, originals, lowering.builder)
        else:
            shifted = shift_positions(model, facts, lowering.size, lowering.past, lowering.past_1d, lowering.builder)
        model.graph.sort()
        _name_dimensions(model, lowering.tokens)
        check_locality(model, originals)
        forget_types(output for node in model.graph for output in node.outputs if not output.is_graph_output())
        notes += lowering.notes(blocks)
        if has_dynamic_scales(model):
            notes.append(
                "warning: scales computed from the data (current scaling) see fewer tokens in a step than in a full "
                "run, so results differ"
            )
        if shifted:
            notes.append(
                f"{len(shifted)} internally counted positions start at the past length ({', '.join(shifted[:3])})"
            )
        return PassResult(True, len(blocks), notes)

    def ensures(self, model: Model) -> None:
        check_positions_follow_past(model)


def _tokens(model: Model) -> Tokens:
    tokens = token_input(model)
    assert tokens is not None  # `requires` has checked it
    return tokens


def _length(tokens: Tokens, facts: Facts) -> int:
    shape = facts[tokens.value].shape
    assert shape is not None
    return shape[tokens.axis]


def _read_lengths_from_ids(model: Model) -> None:
    """Let shape arithmetic read batch and sequence from the token ids.

    A mask input will span more than the new tokens, so its shape no longer gives the sequence length.
    """
    facts = analyse(model)
    tokens = _tokens(model)
    shape = facts[tokens.value].shape
    assert shape is not None
    builder = Builder(model)
    for value in model.graph.inputs:
        dims = value.shape
        if value is tokens.value or dims is None or all(isinstance(dim, int) for dim in dims):
            continue
        for user, _ in list(value.uses()):
            if user.op_type == "Shape":
                builder.before = user
                part = slice(user.attributes.get_int("start", 0), user.attributes.get_int("end", len(dims)))
                rename_or_bypass(
                    model.graph,
                    user.outputs[0],
                    _lengths_of(value, range(len(dims))[part], shape, facts, tokens, builder),
                )


def _lengths_of(
    value: ir.Value, axes: range, shape: tuple[int, ...], facts: Facts, tokens: Tokens, builder: Builder
) -> ir.Value:
    """The sizes of `axes` of an input, int64 [len(axes)]; sizes equal to batch or sequence come from the token ids."""
    sizes = facts[value].shape
    assert sizes is not None
    parts = []
    for axis in axes:
        token_axis = (
            tokens.axis
            if sizes[axis] == shape[tokens.axis]
            else tokens.batch_axis
            if sizes[axis] == shape[tokens.batch_axis]
            else None
        )
        source, source_axis = (value, axis) if token_axis is None else (tokens.value, token_axis)
        parts.append(builder.op("Shape", [source], "/model/kv/shape", start=source_axis, end=source_axis + 1))
    return parts[0] if len(parts) == 1 else builder.op("Concat", parts, "/model/kv/shapes", axis=0)


def _name_dimensions(model: Model, tokens: Tokens) -> None:
    """Name the dynamic axes of the token input `batch` and `sequence` in all inputs and outputs of the graph."""
    assert tokens.value.shape is not None
    axes = ((tokens.batch_axis, "batch"), (tokens.axis, "sequence"))
    dims = [(tokens.value.shape[axis], name) for axis, name in axes]
    names = {dim.value: name for dim, name in dims if isinstance(dim, ir.SymbolicDim)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [names.get(d.value, d.value) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            )


class _Concat:
    """The `concat` lowering: present = Concat(past, new). Other lowerings would share `_operand` and the mask."""

    def __init__(self, options: AddKvCache, model: Model, facts: Facts) -> None:
        self.options, self.model, self.facts = options, model, facts
        self.builder = Builder(model)
        self.tokens = _tokens(model)
        self.size = _length(self.tokens, facts)
        shape = self.tokens.value.shape
        assert shape is not None
        self.static = all(isinstance(dim, int) for dim in shape)
        dims: tuple[Dim, Dim] = (
            ("batch", "sequence") if self.static else (shape[self.tokens.batch_axis], shape[self.tokens.axis])
        )
        self.batch_dim, self.sequence_dim = dims
        self.cache = CacheSpec("concat", options.naming, options.policy, options.layout, self.batch_dim).declare(
            self.builder
        )
        self.mask: MaskRewriter | None = None
        self._decoded: dict[ir.Value, ir.Value] = {}
        self.renewal: Renewal
        self.scores: ScoreReplay
        self.past: ir.Value
        self.past_1d: ir.Value
        self.total: ir.Value

    def grown_inputs(self) -> list[ir.Value]:
        """Mask inputs that now span the total length."""
        assert self.mask is not None
        return [value for value in self.model.graph.inputs if value.name in self.mask.inputs]

    def notes(self, blocks: list[Attention]) -> list[str]:
        first = blocks[0].key
        dtype = self.model.graph.inputs[-1].dtype
        heads = f"{first.head_count} kv heads of {first.head_size}"
        lines = [
            f"{len(blocks)} attention blocks found, {heads}, {len(blocks) * 2} cache tensors in {dtype}, layout "
            f"{self.options.layout}"
        ]
        assert self.mask is not None
        lines += self.mask.notes()
        if self.options.dtype == "fp8":
            lines.append(
                f"warning: fp8 cache with the uncalibrated scale {self.options.kv_scale:g}; values beyond "
                f"±{448 * self.options.kv_scale:g} saturate"
            )
        return lines

    # --- one block ---------------------------------------------------------------------------------------------------

    def rewrite(self, index: int, block: Attention) -> None:
        prefix = f"/model/layers.{index}/attn"
        build = self.builder
        build.before = block.softmax if index else next(iter(self.model.graph))
        pasts = [
            self._past_input(index, kind, operand) for kind, operand in (("key", block.key), ("value", block.value))
        ]
        for past, operand in zip(pasts, (block.key, block.value), strict=True):
            self._decoded[past] = self._decode(
                past, self.facts[operand.value].dtype, self._stored_dtype(operand), f"{prefix}/past"
            )
        if index == 0:
            self._lengths(self._decoded[pasts[0]])
        build.before = block.product_pv
        query = self._replay(to_bnsh(build, block.query, f"{prefix}/query"), block.query, f"{prefix}/query")
        keys = self._cached(index, "key", block.key, pasts[0], f"{prefix}/key")
        values = self._cached(index, "value", block.value, pasts[1], f"{prefix}/value")
        transposed = build.op("Transpose", [keys], f"{prefix}/key/Transpose", perm=[0, 1, 3, 2])
        scores = build.op("MatMul", [query, transposed], f"{prefix}/qk/MatMul")
        scores = self.scores.replay(scores, block, f"{prefix}/scores")
        probabilities = build.op("Softmax", [scores], f"{prefix}/Softmax", axis=-1)
        for old, new in ((block.softmax.inputs[0], scores), (block.softmax.outputs[0], probabilities)):
            assert old is not None
            self.renewal.values[old] = new
        for node, data in block.probabilities:
            probabilities = self.renewal.node(probabilities, node, data, f"{prefix}/probabilities")
        context = build.op("MatMul", [probabilities, values], f"{prefix}/pv/MatMul")
        rename_or_bypass(
            self.model.graph, block.output, from_bnsh(build, self.tokens, context, block, f"{prefix}/context")
        )

    def _replay(self, value: ir.Value, operand: Operand, prefix: str) -> ir.Value:
        for node, data in operand.replay:
            value = self.renewal.node(value, node, data, prefix)
        return value

    # --- cache inputs and outputs -------------------------------------------------------------------------------------

    def _stored_dtype(self, operand: Operand) -> ir.DataType:
        dtype = self.facts[operand.value].dtype
        if dtype is None:
            raise JobError(f"the type of {operand.value.name!r} is unknown; run onnx shape inference first")
        return BY_NAME.get(self.options.dtype, dtype)

    def _past_input(self, index: int, kind: str, operand: Operand) -> ir.Value:
        return self.cache.past(index, kind, operand.head_count, operand.head_size, self._stored_dtype(operand))

    def _lengths(self, past: ir.Value) -> None:
        """Add the int64 scalars past and total length, and make the MaskRewriter, which needs them."""
        build = self.builder
        self.past_1d = self.cache.past_length(past, "/model/kv/past_length")
        zero = build.constant([0], "axes_0")
        self.past = build.op("Squeeze", [self.past_1d, zero], "/model/kv/past", dtype=ir.DataType.INT64, shape=[])
        new = build.op(
            "Shape",
            [self.tokens.value],
            "/model/kv/new_length",
            shape=[1],
            start=self.tokens.axis,
            end=self.tokens.axis + 1,
        )
        new = build.op("Squeeze", [new, zero], "/model/kv/new", dtype=ir.DataType.INT64, shape=[])
        self.total = build.op("Add", [self.past, new], "/model/kv/total", dtype=ir.DataType.INT64, shape=[])
        self.mask = MaskRewriter(self.model, self.facts, build, self.tokens, self.past, self.total)
        self.renewal = Renewal(self.facts, build, self.mask)
        self.scores = ScoreReplay(build, self.mask, self.renewal)

    def _cached(self, index: int, kind: str, operand: Operand, past: ir.Value, prefix: str) -> ir.Value:
        """Append new keys or values to the cache; returns [batch, query heads, total, channels] in the graph's type."""
        build = self.builder
        new = to_bnsh(build, operand, prefix)
        if self.options.layout == "sbnh":
            new = build.op("Transpose", [new], f"{prefix}/to_cache", perm=[2, 0, 1, 3])
        dtype, stored = self.facts[operand.value].dtype, self._stored_dtype(operand)
        stored_new = self._encode(new, dtype, stored, prefix)
        # Old and new tokens are joined in the graph's own type: Concat takes no FP8, and both must be rounded alike.
        present = self.cache.concat(
            self._decoded[past], self._decode(stored_new, dtype, stored, f"{prefix}/new"), prefix
        )
        whole = self.options.policy == "concat"
        output = (
            (self._encode(present, dtype, stored, f"{prefix}/present") if stored != dtype else present)
            if whole
            else self._own_value(stored_new, prefix)
        )
        length = "total_sequence" if whole else self.sequence_dim
        output = self.cache.present(output, index, kind, operand.head_count, operand.head_size, stored, length)
        keys = output if whole and stored == dtype else present
        if self.options.layout == "sbnh":
            keys = build.op("Transpose", [keys], f"{prefix}/from_cache", perm=[1, 2, 0, 3])
        return self._repeat(self._replay(keys, operand, prefix), operand, prefix)

    def _encode(self, value: ir.Value, dtype: ir.DataType | None, stored: ir.DataType, prefix: str) -> ir.Value:
        if stored == dtype:
            return value
        if stored != ir.DataType.FLOAT8E4M3FN:
            return self.builder.op("Cast", [value], f"{prefix}/to_stored", to=stored.value)
        return self.builder.op("QuantizeLinear", [value, *self._scale(dtype)], f"{prefix}/QuantizeLinear")

    def _own_value(self, value: ir.Value, prefix: str) -> ir.Value:
        """A value that can take the name of the cache output.

        A graph output, or a value of the original graph, keeps its own name: an Identity is put behind it.
        """
        node = value.producer()
        is_own = node is not None and (node.name or "").startswith(prefix) and not value.is_graph_output()
        return value if is_own else self.builder.op("Identity", [value], f"{prefix}/Identity")

    def _decode(self, value: ir.Value, dtype: ir.DataType | None, stored: ir.DataType, prefix: str) -> ir.Value:
        if stored == dtype or dtype is None:
            return value
        if stored != ir.DataType.FLOAT8E4M3FN:
            return self.builder.op("Cast", [value], f"{prefix}/from_stored", to=dtype.value)
        return self.builder.op("DequantizeLinear", [value, *self._scale(dtype)], f"{prefix}/DequantizeLinear")

    def _scale(self, dtype: ir.DataType | None) -> list[ir.Value]:
        assert dtype is not None
        scale = self.builder.constant(np.array(self.options.kv_scale, dtype=dtype.numpy()), "kv_scale", dtype)
        return [
            scale,
            self.builder.constant(
                np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy()), "fp8_zero_point", ir.DataType.FLOAT8E4M3FN
            ),
        ]

    def _repeat(self, value: ir.Value, operand: Operand, prefix: str) -> ir.Value:
        """Copy each kv head `repeat` times, as grouped-query attention does."""
        if operand.repeat == 1:
            return value
        build = self.builder
        axis = 1 if operand.repeat_first else 2
        value = build.op("Unsqueeze", [value, build.constant([axis], f"axes_{axis}")], f"{prefix}/Unsqueeze")
        copies = [1, 1, 1, 1, 1]
        copies[axis] = operand.repeat
        value = build.op("Expand", [value, build.constant(copies, "kv_repeat")], f"{prefix}/Expand")
        target = [0, operand.head_count * operand.repeat, -1, operand.head_size]
        return build.op("Reshape", [value, build.constant(target, "kv_shape")], f"{prefix}/Repeat")
