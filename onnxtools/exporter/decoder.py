"""A decoder's graph from its configuration and weights."""

from __future__ import annotations

import onnx_ir as ir

from onnxtools.base.errors import JobError
from onnxtools.exporter.config import DecoderConfig, LatentAttention, Moe, Norm
from onnxtools.exporter.decoder_inputs import DecoderInputs
from onnxtools.exporter.export_options import ExportOptions
from onnxtools.exporter.family import Weights
from onnxtools.exporter.layers import FLOAT, Layers
from onnxtools.exporter.moe import Experts
from onnxtools.exporter.ort_layers import OrtLayers
from onnxtools.exporter.self_attention import Attention
from onnxtools.ir.edit import Builder, remove_unused
from onnxtools.ir.model import MAX_IR_VERSION, Model


def build_decoder(config: DecoderConfig, options: ExportOptions, weights: Weights, dtype: ir.DataType) -> Model:
    """Build the graph of a decoder; `weights` are cast to `dtype` when they are written.

    Inputs: input_ids, attention_mask, position_ids, past_key_values.N.key / .value. Outputs: logits (fp32),
    present.N.key / .value.

    Raises:
        JobError: a cache longer than the model's positions, or `gqa` with an attention that ONNX Runtime's operator
            does not have.
    """
    if options.kv_cache == "gqa":
        _check_grouped(config)
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
    io = DecoderInputs(layers)
    hidden = layers.embedding(io.inputs.ids, io.positions if config.learned_positions else None)
    shaped = _rows(layers, io, layers.head(_Stack(layers, io).run(hidden)))
    shaped.name, shaped.dtype, shaped.shape = "logits", FLOAT, logits.shape
    graph.outputs[0] = shaped
    remove_unused(model)
    return model


def _check_grouped(config: DecoderConfig) -> None:
    for attention in (block.attention for block in config.kinds()):
        head_dim, rotated = attention.head_dim, attention.rope.dim if attention.rope is not None else 0
        if isinstance(attention, LatentAttention) or attention.alibi is not None:
            feature = "ALiBi" if attention.alibi is not None else "latent attention"
            raise JobError(f"GroupQueryAttention has no {feature} on GPUs; use --kv-cache concat")
        if head_dim % 16 or rotated % 16:
            raise JobError(
                f"GroupQueryAttention takes head and rotary sizes that are multiples of 16, not {head_dim} and "
                f"{rotated}; use --kv-cache concat"
            )


class _Stack:
    """The blocks on the residual stream, [tokens, hidden].

    Where a sum is normalized next, `Layers.add_norm` makes both, so that they can be one node.
    """

    def __init__(self, layers: Layers, io: DecoderInputs) -> None:
        self.layers, self.io, self.blocks = layers, io, layers.config.blocks
        self.attention = Attention(layers, io)
        self.last = len(self.blocks) - 1 if layers.options.logits == "last" else None

    def run(self, hidden: ir.Value) -> ir.Value:
        """Run all blocks on the embedding [tokens, hidden]; returns the input of the head."""
        entry = self._entry(0)
        normed = self.layers.norm(hidden, *entry) if entry else hidden
        for n, block in enumerate(self.blocks):
            update = self._scaled(self.attention(normed, n, last_only=n == self.last), n, "attn")
            if n == self.last:
                hidden, normed = self._last(hidden, normed, n)
            hidden, normed = _PLACEMENTS[block.placement](self, n, hidden, normed, update)
        return normed

    def _last(self, hidden: ir.Value, normed: ir.Value, n: int) -> tuple[ir.Value, ir.Value]:
        """The rows of the last tokens of the stream and of its norm, as far as the rest of block `n` reads them."""
        block, size = self.blocks[n], self.layers.config.hidden_size
        if block.placement == "parallel_shared":
            return self.io.last_rows(hidden, size), self.io.last_rows(normed, size, "normed")
        if block.normed_residual:
            return hidden, self.io.last_rows(normed, size)
        return self.io.last_rows(hidden, size), normed

    def _entry(self, n: int) -> tuple[Norm, str, str] | None:
        """The norm (kind, weight, name) in front of block `n`, or of the head; None where there is none."""
        if n == len(self.blocks):
            norm = self.layers.config.norm
            return (norm, "model.norm", "/model/norm") if norm is not None else None
        if self.blocks[n].placement in ("post", "post_residual"):
            return None
        kind, weight, name = self._norm(n, "input_layernorm")
        # Exported files have had these node names from the first.
        return kind, weight, name if n == 0 else f"/{weight.replace('model.', 'model/', 1)}"

    def _norm(self, n: int, name: str) -> tuple[Norm, str, str]:
        return self.blocks[n].norm, f"model.layers.{n}.{name}", f"/model/layers.{n}/{name}"

    def _mlp(self, n: int, x: ir.Value) -> ir.Value:
        mlp, weight, name = self.blocks[n].mlp, f"model.layers.{n}.mlp", f"/model/layers.{n}/mlp"
        return (
            Experts(self.layers, mlp, weight, name)(x)
            if isinstance(mlp, Moe)
            else self.layers.mlp(x, mlp, weight, name)
        )

    def _scaled(self, update: ir.Value, n: int, part: str) -> ir.Value:
        scale = self.blocks[n].residual_scale
        if scale == 1:
            return update
        factor = self.layers.scalar(scale, "residual_scale")
        return self.layers.op("Mul", [update, factor], f"/model/layers.{n}/{part}/residual_scale")

    def _leave(self, n: int, hidden: ir.Value, update: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The residual stream after block `n`, and the value that the next block or the head reads."""
        entry, residual = self._entry(n + 1), f"/model/layers.{n}/mlp/residual"
        if entry is not None:
            return self.layers.add_norm(hidden, update, *entry, residual)
        summed = self.layers.op("Add", [hidden, update], residual)
        return summed, summed

    def pre(self, n: int, hidden: ir.Value, normed: ir.Value, update: ir.Value) -> tuple[ir.Value, ir.Value]:
        of_norm = self.blocks[n].normed_residual
        norm, residual = self._norm(n, "post_attention_layernorm"), f"/model/layers.{n}/attn/residual"
        hidden, normed = self.layers.add_norm(normed if of_norm else hidden, update, *norm, residual)
        return self._leave(n, normed if of_norm else hidden, self._scaled(self._mlp(n, normed), n, "mlp"))

    def post(self, n: int, hidden: ir.Value, _normed: ir.Value, update: ir.Value) -> tuple[ir.Value, ir.Value]:
        update = self.layers.norm(update, *self._norm(n, "post_attention_layernorm"))
        hidden = self.layers.op("Add", [hidden, update], f"/model/layers.{n}/attn/residual")
        return self._leave(
            n, hidden, self.layers.norm(self._mlp(n, hidden), *self._norm(n, "post_feedforward_layernorm"))
        )

    def post_residual(self, n: int, hidden: ir.Value, _normed: ir.Value, update: ir.Value) -> tuple[ir.Value, ir.Value]:
        norm, residual = self._norm(n, "post_attention_layernorm"), f"/model/layers.{n}/attn/residual"
        _, hidden = self.layers.add_norm(hidden, update, *norm, residual)
        norm, residual = self._norm(n, "post_feedforward_layernorm"), f"/model/layers.{n}/mlp/residual"
        _, hidden = self.layers.add_norm(hidden, self._mlp(n, hidden), *norm, residual)
        entry = self._entry(n + 1)
        return hidden, hidden if entry is None else self.layers.norm(hidden, *entry)

    def sandwich(self, n: int, hidden: ir.Value, _normed: ir.Value, update: ir.Value) -> tuple[ir.Value, ir.Value]:
        update = self.layers.norm(update, *self._norm(n, "post_attention_layernorm"))
        hidden, normed = self.layers.add_norm(
            hidden, update, *self._norm(n, "pre_feedforward_layernorm"), f"/model/layers.{n}/attn/residual"
        )
        return self._leave(
            n, hidden, self.layers.norm(self._mlp(n, normed), *self._norm(n, "post_feedforward_layernorm"))
        )

    def parallel(self, n: int, hidden: ir.Value, _normed: ir.Value, update: ir.Value) -> tuple[ir.Value, ir.Value]:
        return self.parallel_shared(
            n, hidden, self.layers.norm(hidden, *self._norm(n, "post_attention_layernorm")), update
        )

    def parallel_shared(
        self, n: int, hidden: ir.Value, normed: ir.Value, update: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """The MLP beside the attention, on `normed`."""
        updates = self.layers.op("Add", [update, self._mlp(n, normed)], f"/model/layers.{n}/parallel")
        return self._leave(n, hidden, updates)


_PLACEMENTS = {
    "pre": _Stack.pre, "post": _Stack.post, "post_residual": _Stack.post_residual, "sandwich": _Stack.sandwich,
    "parallel": _Stack.parallel, "parallel_shared": _Stack.parallel_shared,
}  # fmt: skip

_IR_VERSION = {19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12}
"""Opset to the IR version of the same onnx release (onnx/docs/Versioning.md)."""


def _rows(layers: Layers, io: DecoderInputs, logits: ir.Value) -> ir.Value:
    """Logits [tokens, vocabulary] as [batch, sequence or 1, vocabulary]."""
    size = layers.config.vocab_size
    if layers.options.logits == "all":
        return io.shaped(logits, (size,), "/lm_head")
    return layers.op("Reshape", [logits, layers.build.constant([-1, 1, size], "logits_shape")], "/lm_head")
