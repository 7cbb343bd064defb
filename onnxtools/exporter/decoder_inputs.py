"""The inputs of a decoder's graph, and what all layers make of them: positions, masks, lengths, rotary tables.

The mask is explicit and additive, [batch, 1, new tokens, cached tokens]: TensorRT reads `is_causal` as upper-left and
drops `nonpad_kv_seqlen`. Its low value is half the type's lowest number, so that adding a score cannot reach -infinity
and a row without a visible token stays finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxtools.analysis.cache import CacheSpec
from onnxtools.analysis.masks import HALF_LOWEST
from onnxtools.exporter.config import Alibi, LatentAttention, SelfAttention
from onnxtools.exporter.layers import FLOAT, INT64, Layers
from onnxtools.exporter.rope import Rope


@dataclass
class _Inputs:
    """Graph inputs, and their lengths.

    Attributes:
        ids: int64 [batch, sequence].
        mask: int64 [batch, total], or None.
        positions: int64 [batch, sequence], or None.
        write_indices: int64 [batch], for a scatter cache.
        batch: int64 [1], the number of rows.
        new: int64 [1], the number of new tokens of a row.
    """

    ids: ir.Value
    mask: ir.Value | None
    positions: ir.Value | None
    write_indices: ir.Value | None
    batch: ir.Value
    new: ir.Value


class DecoderInputs:
    """The graph's inputs, and the values that all layers share.

    Attributes:
        kind: the form of the cache.
        pasts: keys and values of each layer's cache; empty without a cache.
        positions: int64 [batch, sequence] of the new tokens; None where GroupQueryAttention counts them.
        lengths: of GroupQueryAttention, else None (`_make_lengths`).
    """

    def __init__(self, layers: Layers) -> None:
        self.layers, self.build, self.config, self.options = layers, layers.build, layers.config, layers.options
        self.kind = self.options.kv_cache
        self.cache = CacheSpec(self.kind).declare(self.build)
        # The length of a scatter cache is static, as TensorRT demands.
        self.cache_length = self.options.cache_length or self.config.max_position_embeddings
        self._shared: dict[str, ir.Value] = {}
        self.inputs = self._make_inputs()
        self.pasts = self._make_pasts() if self.kind != "none" else []
        self._first = self.cache.past_length(self.pasts[0][0], "/model/kv/past_length") if self.pasts else self._zero()
        self.positions = self._make_positions()
        self.lengths = self._make_lengths() if self.kind == "gqa" else None
        self._masks = {} if self.kind == "gqa" else self._make_masks()
        self._tables = [self._make_tables(rope, index) for index, rope in enumerate(self.config.ropes)]

    def mask(self, attention: SelfAttention | LatentAttention) -> ir.Value:
        """The additive mask of a layer, in the compute type: [batch or 1, 1 or heads, new, total]."""
        return self._masks[attention.window, attention.alibi]

    def tables(self, rope: Rope) -> tuple[ir.Value, ir.Value]:
        """cos and sin of a rotation, each [positions, rotary dim / 2]."""
        return self._tables[self.config.ropes.index(rope)]

    def rows(self, rope: Rope) -> ir.Value:
        """Row of each new token in `tables`, int64 [batch, sequence]."""
        assert self.positions is not None
        if rope.switch is None:
            return self.positions
        key = f"/model/rope/rows_{self.config.ropes.index(rope)}"
        if key not in self._shared:
            self._shared[key] = self.layers.op("Add", [self.positions, self._long(rope, key)], key)
        return self._shared[key]

    def _long(self, rope: Rope, name: str) -> ir.Value:
        """int64 [1]: the first row of LongRoPE's table, by the longest text of the batch (as in transformers)."""
        op, build, switch = self.layers.op, self.build, rope.switch
        assert switch is not None
        if self.positions is not None:
            longest = op("ReduceMax", [self.positions], f"{name}/longest", keepdims=0)
            is_long = op(
                "GreaterOrEqual", [longest, build.constant(np.array(switch), "rope_switch")], f"{name}/is_long"
            )
        else:
            longest = op("ReduceMax", [self._count()], f"{name}/longest", keepdims=0)
            is_long = op("Greater", [longest, build.constant(np.array(switch), "rope_switch")], f"{name}/is_long")
        return op("Where", [is_long, build.constant([switch], "rope_long"), self._zero()], f"{name}/first")

    # --- inputs ------------------------------------------------------------------------------------------------------

    def _input(self, name: str, *shape: int | str) -> ir.Value:
        value = ir.val(self.build.names(name), INT64, ir.Shape(shape))
        self.build.graph.inputs.append(value)
        return value

    def _make_inputs(self) -> _Inputs:
        lengths: dict[str, int | str] = {"none": "sequence", "scatter": self.cache_length}
        total = lengths.get(self.kind, "total_sequence")
        ids = self._input("input_ids", "batch", "sequence")
        alone = self.options.use_one_input
        mask = None if alone else self._input("attention_mask", "batch", total)
        # GroupQueryAttention counts positions itself, from the mask.
        is_rotated = bool(self.config.ropes) and self.kind != "gqa"
        has_positions = not alone and (is_rotated or self.config.learned_positions)
        positions = self._input("position_ids", "batch", "sequence") if has_positions else None
        write = self._input("write_indices", "batch") if self.kind == "scatter" else None
        batch = self.layers.op("Shape", [ids], "/model/batch", start=0, end=1)
        return _Inputs(
            ids, mask, positions, write, batch, self.layers.op("Shape", [ids], "/model/sequence", start=1, end=2)
        )

    def _make_pasts(self) -> list[tuple[ir.Value, ir.Value]]:
        c, length = self.config, self.cache_length if self.kind == "scatter" else "past_sequence"
        pasts = []
        for n, block in enumerate(c.blocks):
            heads, *channels = block.attention.cache_sizes
            key, value = (
                self.cache.past(n, kind, heads, size, self.layers.dtype, length)
                for kind, size in zip(("key", "value"), channels, strict=True)
            )
            pasts.append((key, value))
        return pasts

    def _zero(self) -> ir.Value:
        return self.build.constant([0], "zero")

    # --- positions and mask -------------------------------------------------------------------------------------------

    def _scalar(self, value: ir.Value, name: str) -> ir.Value:
        return self.layers.op("Squeeze", [value, self._zero()], name)

    def _range(self, start: ir.Value, length: ir.Value, name: str) -> ir.Value:
        """int64 [length]: start, start + 1, ...; `start` and `length` are int64 [1]."""
        first, stop = (
            self._scalar(start, f"{name}/start"),
            self._scalar(self.layers.op("Add", [start, length], name), f"{name}/stop"),
        )
        return self.layers.op("Range", [first, stop, self.build.constant(np.array(1), "step")], name)

    def _make_positions(self) -> ir.Value | None:
        """Positions, int64 [batch, sequence]: the input, or counted from the length of the cache."""
        if self.inputs.positions is not None or self.kind == "gqa":
            return self.inputs.positions
        counted = self._range(self._first, self.inputs.new, "/model/positions")
        shape = self.layers.op("Concat", [self.inputs.batch, self.inputs.new], "/model/positions/shape", axis=0)
        return self.layers.op("Expand", [counted, shape], "/model/positions")

    def _make_masks(self) -> dict[tuple[int | None, Alibi | None], ir.Value]:
        """The mask of every window and bias: a token sees itself and earlier tokens, except padding.

        With a window it sees the last `window` of these.
        """
        op, build, inputs = self.layers.op, self.build, self.inputs
        root = "/model/mask"
        if self.kind == "scatter":
            total = self._first  # the whole buffer; slots behind the new tokens count as future tokens
            assert inputs.write_indices is not None
            start = op("Unsqueeze", [inputs.write_indices, build.constant([1], "axis_1")], f"{root}/start")
            slots = op("Add", [start, self._range(self._zero(), inputs.new, f"{root}/new")], f"{root}/places")
            query = op("Unsqueeze", [slots, build.constant([1, 3], "axes_1_3")], f"{root}/query")
        else:
            total = op("Add", [self._first, inputs.new], f"{root}/total") if self.pasts else inputs.new
            slots = self._range(self._first, inputs.new, f"{root}/new")
            query = op("Unsqueeze", [slots, build.constant([1], "axis_1")], f"{root}/query")
        keys = self._range(self._zero(), total, f"{root}/keys")
        causal = op("LessOrEqual", [keys, query], f"{root}/causal")
        masks: dict[tuple[int | None, Alibi | None], ir.Value] = {}
        for block in self.config.kinds():
            window, alibi = block.attention.window, block.attention.alibi
            if (window, alibi) not in masks:
                visible = self._real(self._near(causal, keys, query, window))
                masks[window, alibi] = self._hidden(visible, window, alibi, keys, slots)
        return masks

    def _near(self, causal: ir.Value, keys: ir.Value, query: ir.Value, window: int | None) -> ir.Value:
        """`causal` and the window."""
        if window is None:
            return causal
        op, root = self.layers.op, f"/model/mask_{window}"
        oldest = op("Sub", [query, self.build.constant([window], "window")], f"{root}/oldest")
        return op("And", [causal, op("Greater", [keys, oldest], f"{root}/near")], f"{root}/window")

    def _real(self, visible: ir.Value) -> ir.Value:
        """`visible` without padding, [batch or 1, 1, new, total]."""
        op, build, mask, root = self.layers.op, self.build, self.inputs.mask, "/model/mask"
        if mask is None:
            axes = build.constant([0, 1], "axes_0_1")
            return visible if self.kind == "scatter" else op("Unsqueeze", [visible, axes], f"{root}/visible")
        if "real" not in self._shared:
            real = op("Cast", [mask], root, to=ir.DataType.BOOL.value)
            self._shared["real"] = op("Unsqueeze", [real, build.constant([1, 2], "axes_1_2")], f"{root}/real")
        return op("And", [visible, self._shared["real"]], f"{root}/visible")

    def _hidden(
        self, visible: ir.Value, window: int | None, alibi: Alibi | None, keys: ir.Value, slots: ir.Value
    ) -> ir.Value:
        """The additive mask: 0, or ALiBi's bias, where `visible`, else a low number."""
        root = "/model/mask" if window is None else f"/model/mask_{window}"
        shown = self.layers.scalar(0.0, "mask_visible") if alibi is None else self._bias(alibi, keys, slots)
        low = self.layers.scalar(HALF_LOWEST[self.layers.dtype], "mask_hidden")
        return self.layers.op("Where", [visible, shown, low], root)

    def _bias(self, alibi: Alibi, keys: ir.Value, slots: ir.Value) -> ir.Value:
        """ALiBi's bias [batch or 1, heads, new, total] in the compute type.

        It is 0 at the token itself, so that near tokens, which matter most, have its smallest errors in fp16.

        Args:
            alibi: the slopes.
            keys: slots of the keys, int64 [total].
            slots: slots of the new tokens, int64 [new], or [batch, new] of a scatter cache.
        """
        op, build, root, mask = self.layers.op, self.build, "/model/alibi", self.inputs.mask
        flat = self.kind != "scatter"
        if alibi.counts == "slots" or mask is None:
            places, own = keys, slots
        else:
            places = op("CumSum", [mask, build.constant(np.array(1), "step")], f"{root}/places")
            own = op("Gather" if flat else "GatherElements", [places, slots], f"{root}/own", axis=1)
        slopes = np.asarray(alibi.slopes, np.float32).reshape(1, -1, 1, 1)
        if alibi.bf16:
            slopes = slopes.astype(ml_dtypes.bfloat16).astype(np.float32)

        def biased(value: ir.Value, axes: list[int], name: str) -> ir.Value:
            """slope x position, fp32 [batch or 1, heads, ...]."""
            wide = op("Unsqueeze", [value, build.constant(axes, "axes")], f"{root}/{name}")
            wide = op("Cast", [wide], f"{root}/{name}", to=FLOAT.value)
            return op("Mul", [wide, build.constant(slopes, "alibi_slopes")], f"{root}/{name}/bias")

        def axes(value: ir.Value, last: bool) -> list[int]:
            batched = value is not keys and not (value is slots and flat)
            inner = [1, 2] if last else [1, 3]
            return inner if batched else ([0, 1, 2] if last else [0, 1, 3])

        of_keys, of_own = biased(places, axes(places, True), "keys"), biased(own, axes(own, False), "queries")
        if alibi.bf16:
            of_keys = op("Cast", [of_keys], f"{root}/keys/bf16", to=ir.DataType.BFLOAT16.value)
            of_keys = op("Cast", [of_keys], f"{root}/keys/rounded", to=FLOAT.value)
        bias = op("Sub", [of_keys, of_own], root)
        if alibi.scale != 1:
            bias = op("Mul", [bias, self.layers.scalar(alibi.scale, "alibi_scale", FLOAT)], f"{root}/scaled")
        return self.layers.cast(bias, self.layers.dtype, root)

    def _count(self) -> ir.Value:
        """Real tokens of each row, int64 [batch]."""
        if "count" not in self._shared:
            mask = self.inputs.mask
            assert mask is not None
            axis = self.build.constant([1], "axis_1")
            self._shared["count"] = self.layers.op("ReduceSum", [mask, axis], "/model/kv/count", keepdims=0)
        return self._shared["count"]

    def _make_lengths(self) -> tuple[ir.Value, ir.Value]:
        """GroupQueryAttention's seqlens_k [batch] (last valid position) and total_sequence_length [], both int32."""
        op, mask = self.layers.op, self.inputs.mask
        assert mask is not None
        last = op("Sub", [self._count(), self.build.constant(np.array(1), "step")], "/model/kv/last")
        total = self._scalar(op("Shape", [mask], "/model/kv/total", start=1, end=2), "/model/kv/total")
        int32 = ir.DataType.INT32.value
        return op("Cast", [last], "/model/kv/seqlens_k", to=int32), op(
            "Cast", [total], "/model/kv/total_sequence_length", to=int32
        )

    def _make_tables(self, rope: Rope, index: int) -> tuple[ir.Value, ir.Value]:
        """cos and sin of a rotation; all its layers share them."""
        dtype, name = self.layers.dtype, f"model.rope_{index}" if index else "model.rope"
        arrays = (
            table.astype(np.float32).astype(dtype.numpy()) for table in rope.tables(self.config.max_position_embeddings)
        )
        cos, sin = (
            self.build.initializer(ir.Tensor(array, dtype=dtype), f"{name}.{kind}")
            for array, kind in zip(arrays, ("cos", "sin"), strict=True)
        )
        if self.kind != "gqa" or rope.switch is None:
            return cos, sin
        # GroupQueryAttention counts rows from the top of its tables, so it gets the part of short or of long texts.
        op, build = self.layers.op, self.build
        first = self._long(rope, f"/{name}")
        last = build.constant([rope.switch + self.config.max_position_embeddings], "rope_rows")
        end = op("Where", [op("Greater", [first, self._zero()], f"/{name}"), last, first], f"/{name}/end")
        end = op("Max", [end, build.constant([rope.switch], "rope_short")], f"/{name}/end")
        return op("Slice", [cos, first, end, self._zero()], f"/{name}/cos"), op(
            "Slice", [sin, first, end, self._zero()], f"/{name}/sin"
        )

    def last_token(self) -> ir.Value:
        """int64 [batch, 1]: index of each row's last real token among the new tokens."""
        op, mask, new = self.layers.op, self.inputs.mask, self.inputs.new
        one = self.build.constant([1], "axis_1")
        if mask is None:
            shape = op("Concat", [self.inputs.batch, one], "/model/last/shape", axis=0)
            return op("Expand", [op("Sub", [new, one], "/model/last"), shape], "/model/last")
        if self.inputs.write_indices is not None:
            start = op("Unsqueeze", [self.inputs.write_indices, one], "/model/last/start")
            places = op("Add", [start, self._range(self._zero(), new, "/model/last/new")], "/model/last/places")
            real = op("GatherElements", [mask, places], "/model/last", axis=1)
        else:
            end = self.build.constant([np.iinfo(np.int64).max], "end")
            real = op("Slice", [mask, op("Neg", [new], "/model/last"), end, one], "/model/last")
        # With gqa padding is on the right, so a count is enough, and a captured graph copies nothing from the host.
        if self.kind == "gqa":
            count = op("Sub", [op("ReduceSum", [real, one], "/model/last/count", keepdims=1), one], "/model/last/count")
            return op("Max", [count, self._zero()], "/model/last")
        # The largest index of a real token; 0 where a row has none.
        indices = op("Mul", [real, self._range(self._zero(), new, "/model/last/indices")], "/model/last")
        return op("ReduceMax", [indices, one], "/model/last", keepdims=1)

    def last_rows(self, tokens: ir.Value, width: int, what: str = "") -> ir.Value:
        """[batch * sequence, width] reduced to each row's last real token, [batch, width]; `what` is for names."""
        op, build, name = self.layers.op, self.build, f"/model/last/{what or width}"
        if "last" not in self._shared:
            self._shared["last"] = op(
                "Unsqueeze", [self.last_token(), build.constant([2], "axis_2")], "/model/last/index"
            )
        target = op("Concat", [self.inputs.batch, build.constant([1, width], "last_shape")], f"{name}/target", axis=0)
        index = op("Expand", [self._shared["last"], target], f"{name}/index")
        picked = op("GatherElements", [self.shaped(tokens, (width,), f"{name}/rows"), index], f"{name}/picked", axis=1)
        return op("Reshape", [picked, build.constant([-1, width], "tokens_shape")], f"{name}/tokens")

    def shaped(self, value: ir.Value, sizes: tuple[int, ...], name: str) -> ir.Value:
        """[tokens, ...] as [batch, sequence, *sizes]; all layers share the computed target."""
        key = "/model/shape/" + "x".join(map(str, sizes))
        if key not in self._shared:
            self._shared[key] = self.layers.op(
                "Concat", [self.inputs.batch, self.inputs.new, self.build.constant(list(sizes), "sizes")], key, axis=0
            )
        return self.layers.op("Reshape", [value, self._shared[key]], name)

    def heads_shape(self, heads: int) -> ir.Value:
        """int64 [4]: batch, heads, sequence, 1."""
        key = f"/model/shape/heads_{heads}"
        if key not in self._shared:
            sizes = [self.inputs.batch, self.build.constant([heads], "sizes"), self.inputs.new]
            self._shared[key] = self.layers.op("Concat", [*sizes, self.build.constant([1], "axis_1")], key, axis=0)
        return self._shared[key]

    # --- the cache ---------------------------------------------------------------------------------------------------

    def present(self, value: ir.Value, n: int, kind: str) -> ir.Value:
        """Make `value` the "key" or "value" of layer `n` in the cache that the graph returns."""
        length = self.cache_length if self.kind == "scatter" else "total_sequence"
        heads, *channels = self.config.blocks[n].attention.cache_sizes
        size = channels[0] if kind == "key" else channels[1]
        return self.cache.present(value, n, kind, heads, size, self.layers.dtype, length)

    def cached(self, key: ir.Value, value: ir.Value, n: int, name: str) -> tuple[ir.Value, ir.Value]:
        """The cache of layer `n` with the new keys and values [batch, heads, sequence, channels] of each.

        It also becomes an output of the graph. Without a cache these are the new ones themselves.
        """
        if not self.pasts:
            return key, value
        whole = []
        for kind, past, new in zip(("key", "value"), self.pasts[n], (key, value), strict=True):
            if self.kind == "concat":
                joined = self.cache.concat(past, new, f"{name}/{kind}")
            else:
                inputs = [past, new, self.inputs.write_indices]
                joined = self.layers.op("TensorScatter", inputs, f"{name}/{kind}", axis=-2, mode="linear")
            whole.append(self.present(joined, n, kind))
        return whole[0], whole[1]
