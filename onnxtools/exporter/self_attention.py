"""Attention and its cache: one mask and one set of positions for all layers, four ways to keep keys and values.

The mask is explicit and additive, [batch, 1, new tokens, cached tokens]: TensorRT reads `is_causal` as upper-left and
drops `nonpad_kv_seqlen`. Its low value is half the type's lowest number, so that adding a score cannot reach -infinity
and a row without a visible token stays finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.cache import CacheSpec
from onnxtools.analysis.masks import HALF_LOWEST
from onnxtools.exporter.config import SelfAttention
from onnxtools.exporter.layers import FLOAT, INT64, Layers
from onnxtools.exporter.ort_layers import MICROSOFT, OrtLayers

_Q, _K, _V = "q", "k", "v"


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


class Attention:
    """Makes inputs, mask, positions and caches; each call adds the attention of one layer."""

    def __init__(self, layers: Layers) -> None:
        self.layers, self.build, self.config, self.options = layers, layers.build, layers.config, layers.options
        self.kind = self.options.kv_cache
        self.cache = CacheSpec(self.kind).declare(self.build)
        # The length of a scatter cache is static, as TensorRT demands.
        self.cache_length = self.options.cache_length or self.config.max_position_embeddings
        self._shared: dict[str, ir.Value] = {}
        self.inputs = self._make_inputs()
        self._pasts = self._make_pasts() if self.kind != "none" else []
        self._first = (
            self.cache.past_length(self._pasts[0][0], "/model/kv/past_length") if self._pasts else self._zero()
        )
        self.positions = self._make_positions()
        if self.kind == "gqa":
            self._lengths = self._make_lengths()
        else:
            windows = dict.fromkeys(block.attention.window for block in self.config.blocks)
            self._masks = {window: self._make_mask(window) for window in windows}
        self._tables = self._make_tables()

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
        has_positions = not alone and (self.kind != "gqa" or self.config.rope is None)
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
            a = block.attention
            key, value = (
                self.cache.past(n, kind, a.kv_heads, a.head_dim, self.layers.dtype, length) for kind in ("key", "value")
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

    def _make_mask(self, window: int | None) -> ir.Value:
        """The additive mask [batch or 1, 1, new, total]: a token sees itself and earlier tokens, except padding.

        With a window it sees the last `window` of these.
        """
        op, build, inputs = self.layers.op, self.build, self.inputs
        root = "/model/mask" if window is None else f"/model/mask_{window}"
        if self.kind == "scatter":
            total = self._first  # the whole buffer; slots behind the new tokens count as future tokens
            assert inputs.write_indices is not None
            start = op("Unsqueeze", [inputs.write_indices, build.constant([1], "axis_1")], f"{root}/start")
            places = op("Add", [start, self._range(self._zero(), inputs.new, f"{root}/new")], f"{root}/places")
            query = op("Unsqueeze", [places, build.constant([1, 3], "axes_1_3")], f"{root}/query")
        else:
            total = op("Add", [self._first, inputs.new], f"{root}/total") if self._pasts else inputs.new
            query = op(
                "Unsqueeze",
                [self._range(self._first, inputs.new, f"{root}/new"), build.constant([1], "axis_1")],
                f"{root}/query",
            )
        keys = self._range(self._zero(), total, f"{root}/keys")
        visible = op("LessOrEqual", [keys, query], f"{root}/causal")
        if window is not None:
            oldest = op("Sub", [query, build.constant([window], "window")], f"{root}/oldest")
            visible = op("And", [visible, op("Greater", [keys, oldest], f"{root}/near")], f"{root}/window")
        if inputs.mask is not None:
            real = op("Cast", [inputs.mask], root, to=ir.DataType.BOOL.value)
            real = op("Unsqueeze", [real, build.constant([1, 2], "axes_1_2")], f"{root}/real")
            visible = op("And", [visible, real], f"{root}/visible")
        elif self.kind != "scatter":
            visible = op("Unsqueeze", [visible, build.constant([0, 1], "axes_0_1")], f"{root}/visible")
        low = HALF_LOWEST[self.layers.dtype]
        return op(
            "Where",
            [visible, self.layers.scalar(0.0, "mask_visible"), self.layers.scalar(low, "mask_hidden")],
            root,
        )

    def _make_lengths(self) -> tuple[ir.Value, ir.Value]:
        """GroupQueryAttention's seqlens_k [batch] (last valid position) and total_sequence_length [], both int32."""
        op, mask = self.layers.op, self.inputs.mask
        assert mask is not None
        count = op("ReduceSum", [mask, self.build.constant([1], "axis_1")], "/model/kv/count", keepdims=0)
        last = op("Sub", [count, self.build.constant(np.array(1), "step")], "/model/kv/last")
        total = self._scalar(op("Shape", [mask], "/model/kv/total", start=1, end=2), "/model/kv/total")
        int32 = ir.DataType.INT32.value
        return op("Cast", [last], "/model/kv/seqlens_k", to=int32), op(
            "Cast", [total], "/model/kv/total_sequence_length", to=int32
        )

    def _make_tables(self) -> tuple[ir.Value, ir.Value] | None:
        """cos and sin, each [max_position_embeddings, rotary dim / 2]; all layers share them."""
        rope, dtype = self.config.rope, self.layers.dtype
        if rope is None:
            return None
        cos, sin = (
            table.astype(np.float32).astype(dtype.numpy()) for table in rope.tables(self.config.max_position_embeddings)
        )
        return self.build.initializer(ir.Tensor(cos, dtype=dtype), "model.rope.cos"), self.build.initializer(
            ir.Tensor(sin, dtype=dtype), "model.rope.sin"
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

    def last_rows(self, tokens: ir.Value, width: int) -> ir.Value:
        """[batch * sequence, width] reduced to each row's last real token, [batch, width]."""
        op, build, name = self.layers.op, self.build, f"/model/last/{width}"
        if "last" not in self._shared:
            self._shared["last"] = op(
                "Unsqueeze", [self.last_token(), build.constant([2], "axis_2")], "/model/last/index"
            )
        target = op("Concat", [self.inputs.batch, build.constant([1, width], "last_shape")], f"{name}/target", axis=0)
        index = op("Expand", [self._shared["last"], target], f"{name}/index")
        picked = op("GatherElements", [self.shaped(tokens, (width,), f"{name}/rows"), index], f"{name}/picked", axis=1)
        return op("Reshape", [picked, build.constant([-1, width], "tokens_shape")], f"{name}/tokens")

    # --- one layer ---------------------------------------------------------------------------------------------------

    def __call__(self, hidden: ir.Value, n: int, *, last_only: bool = False) -> ir.Value:
        """Add layer `n`: projections, cache, attention and output projection.

        Maps [batch * sequence, hidden] to the same shape, or with `last_only` to [batch, hidden] of the last tokens.
        """
        c, weight, name = self.config.blocks[n].attention, f"model.layers.{n}.self_attn", f"/model/layers.{n}/attn"
        packed = self.layers.qkv(hidden, c, weight, name) if isinstance(self.layers, OrtLayers) else None
        if packed is not None:
            product, qkv_bias = packed
            joined = self.shaped(product, (c.q_size + 2 * c.kv_size,), f"{name}/qkv")
            joined = joined if qkv_bias is None else self.layers.op("Add", [joined, qkv_bias], f"{name}/qkv")
            context = self._grouped([joined, None, None], n, name)
        else:
            q, k, v = (
                self.layers.linear(hidden, f"{weight}.{part}_proj", f"{name}/{part}_proj", bias=c.bias)
                for part in (_Q, _K, _V)
            )
            if self.kind == "gqa":
                sizes = ((_Q, q, c.q_size), (_K, k, c.kv_size), (_V, v, c.kv_size))
                context = self._grouped([self.shaped(x, (size,), f"{name}/{part}") for part, x, size in sizes], n, name)
            else:
                context = self._standard(q, k, v, n, name)
        flat = self.layers.op(
            "Reshape", [context, self.build.constant([-1, c.q_size], "context_shape")], f"{name}/context"
        )
        flat = self.last_rows(flat, c.q_size) if last_only else flat
        return self.layers.linear(flat, f"{weight}.o_proj", f"{name}/o_proj", bias=c.output_bias)

    def _grouped(self, projected: list[ir.Value | None], n: int, name: str) -> ir.Value:
        """Add com.microsoft.GroupQueryAttention, which rotates, appends to the cache and attends.

        `projected` is [q, k, v], or [packed q, k and v, None, None].
        """
        c = self.config.blocks[n].attention
        inputs = [*projected, *self._pasts[n], *self._lengths, *(self._tables or ())]
        outputs = self.build.ops(
            "GroupQueryAttention",
            inputs,
            f"{name}/GroupQueryAttention",
            outputs=3,
            domain=MICROSOFT,
            num_heads=c.heads,
            kv_num_heads=c.kv_heads,
            scale=c.scale,
            do_rotary=int(self._tables is not None),
            **({} if c.window is None else {"local_window_size": c.window}),
        )
        for kind, value in zip(("key", "value"), outputs[1:], strict=True):
            self._present(value, n, kind)
        return outputs[0]

    def _standard(self, q: ir.Value, k: ir.Value, v: ir.Value, n: int, name: str) -> ir.Value:
        """Add attention over the cache in standard operators; returns [batch, sequence, heads, head_dim]."""
        c = self.config.blocks[n].attention
        q = self._rotated(self._heads(q, c.heads, c, f"{name}/{_Q}"), c, f"{name}/{_Q}")
        k = self._rotated(self._heads(k, c.kv_heads, c, f"{name}/{_K}"), c, f"{name}/{_K}")
        v = self._heads(v, c.kv_heads, c, f"{name}/{_V}")
        if self._pasts:
            k, v = (
                self._cached(new, n, i, f"{name}/{kind}") for i, (new, kind) in enumerate(((k, "key"), (v, "value")))
            )
        if self.options.opset >= 23:
            wide = {} if self.layers.dtype == FLOAT else {"softmax_precision": FLOAT.value}
            context = self.layers.op("Attention", [q, k, v, self._masks[c.window]], name, scale=c.scale, **wide)
        else:
            context = self._primitive(q, k, v, c, name)
        return self.layers.op("Transpose", [context], f"{name}/context", perm=[0, 2, 1, 3])

    def shaped(self, value: ir.Value, sizes: tuple[int, ...], name: str) -> ir.Value:
        """[tokens, ...] as [batch, sequence, *sizes]; all layers share the computed target."""
        key = "/model/shape/" + "x".join(map(str, sizes))
        if key not in self._shared:
            self._shared[key] = self.layers.op(
                "Concat", [self.inputs.batch, self.inputs.new, self.build.constant(list(sizes), "sizes")], key, axis=0
            )
        return self.layers.op("Reshape", [value, self._shared[key]], name)

    def _heads(self, value: ir.Value, heads: int, attention: SelfAttention, name: str) -> ir.Value:
        split = self.shaped(value, (heads, attention.head_dim), name)
        return self.layers.op("Transpose", [split], name, perm=[0, 2, 1, 3])

    def _present(self, value: ir.Value, n: int, kind: str) -> ir.Value:
        length = self.cache_length if self.kind == "scatter" else "total_sequence"
        attention = self.config.blocks[n].attention
        return self.cache.present(value, n, kind, attention.kv_heads, attention.head_dim, self.layers.dtype, length)

    def _cached(self, new: ir.Value, n: int, slot: int, name: str) -> ir.Value:
        """The cache with the new keys or values (`slot` 0 or 1), which also becomes an output of the graph."""
        past = self._pasts[n][slot]
        if self.kind == "concat":
            whole = self.cache.concat(past, new, name)
        else:
            whole = self.layers.op(
                "TensorScatter", [past, new, self.inputs.write_indices], name, axis=-2, mode="linear"
            )
        return self._present(whole, n, ("key", "value")[slot])

    def _rotated(self, x: ir.Value, attention: SelfAttention, name: str) -> ir.Value:
        """Rotary embedding of the first channels of [batch, heads, sequence, head_dim]; pairs are halves."""
        rope = attention.rope
        if rope is None or self._tables is None:
            return x
        if self.options.opset >= 23:
            dim = rope.dim if rope.dim < attention.head_dim else 0  # 0: all channels
            return self.layers.op("RotaryEmbedding", [x, *self._tables, self.positions], name, rotary_embedding_dim=dim)
        return self._rotated_primitive(x, rope.dim, attention.head_dim - rope.dim, name)

    def _rotated_primitive(self, x: ir.Value, dim: int, unrotated: int, name: str) -> ir.Value:
        op, build = self.layers.op, self.build
        if "angles" not in self._shared:
            assert self._tables is not None
            for key, table in zip(("angles", "sines"), self._tables, strict=True):
                rows = op("Gather", [table, self.positions], f"/model/rope/{key}")
                self._shared[key] = op("Unsqueeze", [rows, build.constant([1], "axis_1")], f"/model/rope/{key}")
        cos, sin = self._shared["angles"], self._shared["sines"]
        sizes = build.constant([dim // 2, dim // 2, *([unrotated] if unrotated else [])], "rope_parts")
        parts = build.ops("Split", [x, sizes], f"{name}/Split", outputs=3 if unrotated else 2, axis=-1)
        a, b = parts[:2]
        first = op("Sub", [op("Mul", [a, cos], f"{name}/a_cos"), op("Mul", [b, sin], f"{name}/b_sin")], f"{name}/first")
        second = op(
            "Add", [op("Mul", [b, cos], f"{name}/b_cos"), op("Mul", [a, sin], f"{name}/a_sin")], f"{name}/second"
        )
        return op("Concat", [first, second, *parts[2:]], f"{name}/rotated", axis=-1)

    def _primitive(self, q: ir.Value, k: ir.Value, v: ir.Value, c: SelfAttention, name: str) -> ir.Value:
        """Attention in primitive operators: MatMul, mask, Softmax in fp32, MatMul."""
        op = self.layers.op
        k, v = self._repeated(k, c, f"{name}/key"), self._repeated(v, c, f"{name}/value")
        scaled = op("Mul", [q, self.layers.scalar(c.scale, "attention_scale")], f"{name}/{_Q}/scaled")
        scores = op("MatMul", [scaled, op("Transpose", [k], f"{name}/key", perm=[0, 1, 3, 2])], f"{name}/qk")
        masked = self.layers.cast(op("Add", [scores, self._masks[c.window]], f"{name}/scores"), FLOAT, f"{name}/scores")
        probabilities = self.layers.cast(
            op("Softmax", [masked], name, axis=-1), self.layers.dtype, f"{name}/probabilities"
        )
        return op("MatMul", [probabilities, v], f"{name}/pv")

    def _repeated(self, x: ir.Value, c: SelfAttention, name: str) -> ir.Value:
        """Repeat each key/value head for every query head that shares it."""
        build = self.build
        repeat = c.heads // c.kv_heads
        if repeat == 1:
            return x
        column = self.layers.op("Unsqueeze", [x, build.constant([2], "axis_2")], name)
        copies = self.layers.op("Expand", [column, build.constant([1, 1, repeat, 1, 1], "repeat")], name)
        target = build.constant([0, c.heads, -1, c.head_dim], "repeated_shape")
        return self.layers.op("Reshape", [copies, target], f"{name}/repeated")
