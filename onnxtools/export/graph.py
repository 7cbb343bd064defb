"""A decoder's graph from its configuration and weights."""

from __future__ import annotations

import onnx_ir as ir

from onnxtools.errors import JobError
from onnxtools.export.attention import Attention
from onnxtools.export.config import DecoderConfig
from onnxtools.export.family import Weights
from onnxtools.export.layers import FLOAT, Layers
from onnxtools.export.options import ExportOptions
from onnxtools.graph import Builder, remove_unused
from onnxtools.model import MAX_IR_VERSION, Model

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


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
    layers = Layers(build, config, options, weights, dtype)
    logits = ir.val("logits", FLOAT, ir.Shape(["batch", 1 if options.logits == "last" else "sequence", config.vocab_size]))
    graph.outputs.append(logits)  # first, the caches follow
    attention = Attention(layers)
    hidden = layers.embedding(attention.inputs.ids, None if config.rope is not None else attention.positions)
    for n in range(config.num_hidden_layers):
        weight, name = f"model.layers.{n}", f"/model/layers.{n}"
        normed = layers.norm(hidden, f"{weight}.input_layernorm", f"{name}/input_layernorm")
        hidden = layers.op("Add", [hidden, attention(normed, n)], f"{name}/attn/residual")
        normed = layers.norm(hidden, f"{weight}.post_attention_layernorm", f"{name}/post_attention_layernorm")
        hidden = layers.op("Add", [hidden, layers.mlp(normed, f"{weight}.mlp", f"{name}/mlp")], f"{name}/mlp/residual")
    if options.logits == "last":
        hidden = _last(layers, attention, hidden)
    hidden = layers.norm(hidden, "model.norm", "/model/norm")
    found = _rows(layers, attention, layers.head(hidden))
    found.name, found.dtype, found.shape = "logits", FLOAT, logits.shape
    graph.outputs[0] = found
    remove_unused(model)
    return model


_IR_VERSION = {19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12}
"""Opset to the IR version of the same onnx release (onnx/docs/Versioning.md)."""


def _last(layers: Layers, attention: Attention, hidden: ir.Value) -> ir.Value:
    """[batch, hidden] of each row's last real token, taken before the head."""
    rows = attention.shaped(hidden, (layers.config.hidden_size,), "/model/last/rows")
    index = layers.op("Unsqueeze", [attention.last_token(), layers.build.constant([2], "axis_2")], "/model/last/index")
    target = layers.op("Concat", [attention.inputs.batch, layers.build.constant([1, layers.config.hidden_size], "last_shape")], "/model/last/target", axis=0)
    picked = layers.op("GatherElements", [rows, layers.op("Expand", [index, target], "/model/last/index")], "/model/last/picked", axis=1)
    return layers.op("Reshape", [picked, layers.build.constant([-1, layers.config.hidden_size], "tokens_shape")], "/model/last/tokens")


def _rows(layers: Layers, attention: Attention, logits: ir.Value) -> ir.Value:
    """[tokens, vocabulary] as [batch, sequence or 1, vocabulary]."""
    size = layers.config.vocab_size
    if layers.options.logits == "all":
        return attention.shaped(logits, (size,), "/lm_head")
    return layers.op("Reshape", [logits, layers.build.constant([-1, 1, size], "logits_shape")], "/lm_head")
