"""A decoder's graph from its configuration and weights."""

from __future__ import annotations

import onnx_ir as ir

from onnxtools.base.errors import JobError
from onnxtools.exporter.config import DecoderConfig
from onnxtools.exporter.export_options import ExportOptions
from onnxtools.exporter.family import Weights
from onnxtools.exporter.layers import FLOAT, Layers
from onnxtools.exporter.ort_layers import OrtLayers
from onnxtools.exporter.self_attention import Attention
from onnxtools.ir.edit import Builder, remove_unused
from onnxtools.ir.model import MAX_IR_VERSION, Model


def build_decoder(config: DecoderConfig, options: ExportOptions, weights: Weights, dtype: ir.DataType) -> Model:
    """The graph; `weights` are cast to `dtype` while they are written.

    Raises:
        JobError: a cache longer than the model's positions, or `gqa` with a head size that ONNX Runtime's operator refuses.

    Inputs: input_ids, attention_mask, position_ids, past_key_values.N.key / .value; outputs: logits (fp32), present.N.key / .value.
    """
    rotated = config.rope.dim if config.rope is not None else 0
    if options.kv_cache == "gqa" and (config.head_dim % 16 or rotated % 16):
        raise JobError(f"GroupQueryAttention takes head and rotary sizes that are multiples of 16, not {config.head_dim} and {rotated}; use --kv-cache concat")
    if options.cache_length and options.cache_length > config.max_position_embeddings:
        raise JobError(f"the cache of {options.cache_length} is longer than the {config.max_position_embeddings} positions of the model; lower --cache-length")
    opsets = {"": options.opset, **({"com.microsoft": 1} if options.kv_cache == "gqa" else {})}
    graph = ir.Graph([], [], nodes=[], name=config.family, opset_imports=opsets)
    model = Model(ir.Model(graph, ir_version=min(MAX_IR_VERSION, _IR_VERSION[options.opset]), producer_name="onnxtools"))
    build = Builder(model)
    layers = (OrtLayers if options.kv_cache == "gqa" else Layers)(build, config, options, weights, dtype)
    logits = ir.val("logits", FLOAT, ir.Shape(["batch", 1 if options.logits == "last" else "sequence", config.vocab_size]))
    graph.outputs.append(logits)  # first, the caches follow
    attention = Attention(layers)
    hidden = layers.embedding(attention.inputs.ids, None if config.rope is not None else attention.positions)
    normed = layers.norm(hidden, "model.layers.0.input_layernorm", "/model/layers.0/input_layernorm")
    for n in range(config.num_hidden_layers):
        weight, name = f"model.layers.{n}", f"/model/layers.{n}"
        if options.logits == "last" and n + 1 == config.num_hidden_layers:
            update, hidden = attention(normed, n, last_only=True), attention.last_rows(hidden, config.hidden_size)
        else:
            update = attention(normed, n)
        hidden, normed = layers.add_norm(hidden, update, f"{weight}.post_attention_layernorm", f"{name}/post_attention_layernorm", f"{name}/attn/residual")
        update = layers.mlp(normed, f"{weight}.mlp", f"{name}/mlp")
        following = f"layers.{n + 1}.input_layernorm" if n + 1 < config.num_hidden_layers else "norm"
        hidden, normed = layers.add_norm(hidden, update, f"model.{following}", f"/model/{following}", f"{name}/mlp/residual")
    found = _rows(layers, attention, layers.head(normed))
    found.name, found.dtype, found.shape = "logits", FLOAT, logits.shape
    graph.outputs[0] = found
    remove_unused(model)
    return model


_IR_VERSION = {19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12}
"""Opset to the IR version of the same onnx release (onnx/docs/Versioning.md)."""


def _rows(layers: Layers, attention: Attention, logits: ir.Value) -> ir.Value:
    """[tokens, vocabulary] as [batch, sequence or 1, vocabulary]."""
    size = layers.config.vocab_size
    if layers.options.logits == "all":
        return attention.shaped(logits, (size,), "/lm_head")
    return layers.op("Reshape", [logits, layers.build.constant([-1, 1, size], "logits_shape")], "/lm_head")
