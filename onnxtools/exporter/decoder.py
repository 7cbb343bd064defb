"""A decoder's graph from its configuration and weights."""

from __future__ import annotations

import onnx_ir as ir

from onnxtools.base.errors import JobError
from onnxtools.exporter.config import DecoderConfig, Norm
from onnxtools.exporter.export_options import ExportOptions
from onnxtools.exporter.family import Weights
from onnxtools.exporter.layers import FLOAT, Layers
from onnxtools.exporter.ort_layers import OrtLayers
from onnxtools.exporter.self_attention import Attention
from onnxtools.ir.edit import Builder, remove_unused
from onnxtools.ir.model import MAX_IR_VERSION, Model


def build_decoder(config: DecoderConfig, options: ExportOptions, weights: Weights, dtype: ir.DataType) -> Model:
    """Build the graph of a decoder; `weights` are cast to `dtype` when they are written.

    Inputs: input_ids, attention_mask, position_ids, past_key_values.N.key / .value. Outputs: logits (fp32),
    present.N.key / .value.

    Raises:
        JobError: a cache longer than the model's positions, or `gqa` with a head size that ONNX Runtime's operator
            refuses.
    """
    for head_dim, rotated in {
        (a.head_dim, a.rope.dim if a.rope is not None else 0) for a in (block.attention for block in config.blocks)
    }:
        if options.kv_cache == "gqa" and (head_dim % 16 or rotated % 16):
            raise JobError(
                f"GroupQueryAttention takes head and rotary sizes that are multiples of 16, not {head_dim} and "
                f"{rotated}; use --kv-cache concat"
            )
    if options.cache_length and options.cache_length > config.max_position_embeddings:
        raise JobError(
            f"the cache of {options.cache_length} is longer than the {config.max_position_embeddings} positions of the "
            "model; lower --cache-length"
        )
    opsets = {"": options.opset, **({"com.microsoft": 1} if options.kv_cache == "gqa" else {})}
    graph = ir.Graph([], [], nodes=[], name=config.family, opset_imports=opsets)
    model = Model(
        ir.Model(graph, ir_version=min(MAX_IR_VERSION, _IR_VERSION[options.opset]), producer_name="onnxtools")
    )
    build = Builder(model)
    layers = (OrtLayers if options.kv_cache == "gqa" else Layers)(build, config, options, weights, dtype)
    logits = ir.val(
        "logits", FLOAT, ir.Shape(["batch", 1 if options.logits == "last" else "sequence", config.vocab_size])
    )
    graph.outputs.append(logits)  # the first output; the caches follow
    attention = Attention(layers)
    hidden = layers.embedding(attention.inputs.ids, None if config.rope is not None else attention.positions)
    shaped = _rows(layers, attention, layers.head(_Stack(layers, attention).run(hidden)))
    shaped.name, shaped.dtype, shaped.shape = "logits", FLOAT, logits.shape
    graph.outputs[0] = shaped
    remove_unused(model)
    return model


class _Stack:
    """The blocks on the residual stream, [tokens, hidden].

    Where a sum is normalized next, `Layers.add_norm` makes both, so that they can be one node.
    """

    def __init__(self, layers: Layers, attention: Attention) -> None:
        self.layers, self.attention, self.blocks = layers, attention, layers.config.blocks
        self.last = len(self.blocks) - 1 if layers.options.logits == "last" else None

    def run(self, hidden: ir.Value) -> ir.Value:
        """Run all blocks on the embedding [tokens, hidden]; returns the input of the head."""
        entry = self._entry(0)
        normed = self.layers.norm(hidden, *entry) if entry else hidden
        for n, block in enumerate(self.blocks):
            update = self.attention(normed, n, last_only=n == self.last)
            if n == self.last:
                hidden = self.attention.last_rows(hidden, self.layers.config.hidden_size)
            hidden, normed = _PLACEMENTS[block.placement](self, n, hidden, update)
        return normed

    def _entry(self, n: int) -> tuple[Norm, str, str] | None:
        """The norm (kind, weight, name) in front of block `n`, or of the head; None for a block without one."""
        if n == len(self.blocks):
            return self.layers.config.norm, "model.norm", "/model/norm"
        if self.blocks[n].placement == "post":
            return None
        kind, weight, name = self._norm(n, "input_layernorm")
        # Exported files have had these node names from the first.
        return kind, weight, name if n == 0 else f"/{weight.replace('model.', 'model/', 1)}"

    def _norm(self, n: int, name: str) -> tuple[Norm, str, str]:
        return self.blocks[n].norm, f"model.layers.{n}.{name}", f"/model/layers.{n}/{name}"

    def _mlp(self, n: int, x: ir.Value) -> ir.Value:
        return self.layers.mlp(x, self.blocks[n].mlp, f"model.layers.{n}.mlp", f"/model/layers.{n}/mlp")

    def _leave(self, n: int, hidden: ir.Value, update: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The residual stream after block `n`, and the value that the next block or the head reads."""
        entry, residual = self._entry(n + 1), f"/model/layers.{n}/mlp/residual"
        if entry is not None:
            return self.layers.add_norm(hidden, update, *entry, residual)
        summed = self.layers.op("Add", [hidden, update], residual)
        return summed, summed

    def pre(self, n: int, hidden: ir.Value, update: ir.Value) -> tuple[ir.Value, ir.Value]:
        hidden, normed = self.layers.add_norm(
            hidden, update, *self._norm(n, "post_attention_layernorm"), f"/model/layers.{n}/attn/residual"
        )
        return self._leave(n, hidden, self._mlp(n, normed))

    def post(self, n: int, hidden: ir.Value, update: ir.Value) -> tuple[ir.Value, ir.Value]:
        update = self.layers.norm(update, *self._norm(n, "post_attention_layernorm"))
        hidden = self.layers.op("Add", [hidden, update], f"/model/layers.{n}/attn/residual")
        return self._leave(
            n, hidden, self.layers.norm(self._mlp(n, hidden), *self._norm(n, "post_feedforward_layernorm"))
        )

    def sandwich(self, n: int, hidden: ir.Value, update: ir.Value) -> tuple[ir.Value, ir.Value]:
        update = self.layers.norm(update, *self._norm(n, "post_attention_layernorm"))
        hidden, normed = self.layers.add_norm(
            hidden, update, *self._norm(n, "pre_feedforward_layernorm"), f"/model/layers.{n}/attn/residual"
        )
        return self._leave(
            n, hidden, self.layers.norm(self._mlp(n, normed), *self._norm(n, "post_feedforward_layernorm"))
        )

    def parallel(self, n: int, hidden: ir.Value, update: ir.Value) -> tuple[ir.Value, ir.Value]:
        normed = self.layers.norm(hidden, *self._norm(n, "post_attention_layernorm"))
        updates = self.layers.op("Add", [update, self._mlp(n, normed)], f"/model/layers.{n}/parallel")
        return self._leave(n, hidden, updates)


_PLACEMENTS = {"pre": _Stack.pre, "post": _Stack.post, "sandwich": _Stack.sandwich, "parallel": _Stack.parallel}

_IR_VERSION = {19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12}
"""Opset to the IR version of the same onnx release (onnx/docs/Versioning.md)."""


def _rows(layers: Layers, attention: Attention, logits: ir.Value) -> ir.Value:
    """Logits [tokens, vocabulary] as [batch, sequence or 1, vocabulary]."""
    size = layers.config.vocab_size
    if layers.options.logits == "all":
        return attention.shaped(logits, (size,), "/lm_head")
    return layers.op("Reshape", [logits, layers.build.constant([-1, 1, size], "logits_shape")], "/lm_head")
