"""Small whole inputs of every kind that the tool reads, made once for each process in a folder of its own."""

from __future__ import annotations

import functools
import io
import json
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

from onnxtools.exporter.export import export
from onnxtools.exporter.export_options import ExportOptions
from onnxtools.ir.model import Model

FLOAT = TensorProto.FLOAT


@functools.cache
def folder() -> Path:
    kept = tempfile.TemporaryDirectory(prefix="fuzz-seeds-")
    _KEPT.append(kept)
    return Path(kept.name)


_KEPT: list[Any] = []


@functools.cache
def graphs() -> tuple[onnx.ModelProto, ...]:
    """A decoder in two forms, quantized layers, control flow, functions, convolutions, constants in nodes and in
    files.
    """
    return (
        *(decoder(form, opset) for form, opset in (("none", 19), ("concat", 24))),
        quantized(),
        control_flow(),
        functions(),
        vision(),
        external(),
        attention(),
    )


def decoder(form: str, opset: int) -> onnx.ModelProto:
    path = folder() / f"{form}.onnx"
    export(
        None,
        path,
        ExportOptions(
            random=True, n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16, kv_cache=form, opset=opset
        ),
    )  # type: ignore[arg-type]
    return onnx.load(path)


def _weight(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _model(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], outputs: list[str], opset: int = 21, **arrays: Any
) -> onnx.ModelProto:
    ports = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()]
    results = [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs]
    graph = helper.make_graph(
        nodes, "g", ports, results, [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def quantized() -> onnx.ModelProto:
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], name="d"),
        node("DequantizeLinear", ["w", "ws"], ["wd"], name="wd", axis=1),
        node("Gemm", ["d", "wd"], ["h"], name="g", alpha=2.0), node("Relu", ["h"], ["y"],
        name="r"),
    ]  # fmt: skip
    codes = np.arange(16 * 8, dtype=np.int8).reshape(16, 8)
    return _model(
        nodes, {"x": ["n", 16]}, ["y"], s=np.float32(0.1), z=np.int8(0), w=codes, ws=np.full(8, 0.02, np.float32)
    )


def control_flow() -> onnx.ModelProto:
    return parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        agraph (float[n, 8] x, bool c, int64 t) => (float[n, 8] y, float[n, 8] z) {
            y = If (c) <then_branch = g1 () => (float[n, 8] a) { a = Mul (x, x) },
                        else_branch = g2 () => (float[n, 8] b) { b = Sqrt (x) }>
            z = Loop (t, c, x) <body = l (int64 i, bool k, float[n, 8] v) =>
                                  (bool k2, float[n, 8] v2) { k2 = Identity (k) v2 = Add (v, x) }>
        }""")  # type: ignore[no-any-return]


def functions() -> onnx.ModelProto:
    return parser.parse_model("""<ir_version: 10, opset_import: ["" : 21, "f" : 1]>
        agraph (float[n, 8] x) => (float[n, 8] y) { h = f.twice (x) s = Shape (h) r = Reshape (h, s)
            t = Transpose <perm = [1, 0]> (r)
            u = Transpose (t) y = Add (u, u) }
        <domain: "f", opset_import: ["" : 21, "f" : 1]> twice (a) => (b) { c = f.once (a) b = f.once (c) }
        <domain: "f", opset_import: ["" : 21]> once (a) => (b) { b = Mul (a, a) }""")  # type: ignore[no-any-return]


def vision() -> onnx.ModelProto:
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "k"], ["c"], name="c", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"], name="n"),
        node("Relu", ["n"], ["r"], name="r"), node("Resize", ["r", "", "scales"], ["up"], name="up"),
        node("GlobalAveragePool", ["up"], ["p"], name="p"),
        node("Flatten", ["p"], ["f"], name="f"), node("MatMul", ["f", "w"], ["y"], name="mm"),
        node("Dropout", ["y"], ["z"], name="drop"),
    ]  # fmt: skip
    ones = np.ones(4, np.float32)
    return _model(
        nodes,
        {"x": ["b", 3, 8, 8]},
        ["z"],
        13,
        k=_weight(4, 3, 3, 3),
        g=ones,
        b=ones,
        m=ones,
        v=ones,
        scales=np.array([1, 1, 2, 2], np.float32),
        w=_weight(4, 16),
    )


def external() -> onnx.ModelProto:
    made = _model(
        [helper.make_node("MatMul", ["x", "w"], ["h"], name="m"), helper.make_node("Add", ["h", "b"], ["y"], name="a")],
        {"x": ["n", 8]},
        ["y"],
        w=_weight(8, 8),
        b=_weight(8),
    )
    path = folder() / "external.onnx"
    onnx.save(made, path, save_as_external_data=True, location="external.onnx.data", size_threshold=0)
    return onnx.load(path, load_external_data=False)


def attention() -> onnx.ModelProto:
    made = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        agraph (int64[batch, seq] input_ids, int64[batch, seq] attention_mask) => (float[batch, seq, 32] logits) {
            e = Gather (table, input_ids) q = MatMul (e, wq) k = Transpose <perm = [0, 2, 1]> (e) s = MatMul (q, k)
            m = Cast <to = 1> (attention_mask)
            i = Sub (one, m) l = Mul (i, low) u = Unsqueeze (l, axis) t = Shape (q) n = Gather (t, axis)
            r = Expand (one, n) a = Add (s, u)
            p = Softmax <axis = -1> (a) o = MatMul (p, e) logits = MatMul (o, head)
        }""")
    arrays = {
        "table": _weight(32, 16),
        "wq": _weight(16, 16),
        "head": _weight(16, 32),
        "one": np.float32(1),
        "low": np.float32(-1e4),
        "axis": np.array([1]),
    }
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items())
    return made  # type: ignore[no-any-return]


@functools.cache
def gguf_file() -> bytes:
    path = folder() / "seed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, number in {
        "block_count": 1,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "context_length": 32,
    }.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab", "<s>"])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 1, 3])
    for name, shape in {
        "token_embd.weight": (4, 32),
        "blk.0.attn_q.weight": (32, 32),
        "output_norm.weight": (32,),
    }.items():
        writer.add_tensor(name, _weight(*shape))
    writer.add_tensor("blk.0.attn_k.weight", np.zeros((32, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@functools.cache
def safetensors_file() -> bytes:
    header = {"__metadata__": {"format": "pt"}, "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
              "b.bias": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}}  # fmt: skip
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(32)


@functools.cache
def pickles() -> tuple[bytes, ...]:
    """A state dict as torch writes it, and plain objects of all protocols."""
    plain: dict[str, Any] = {"iteration": 3, "args": {"a": (1, 2.5, "x"), "b": [None, True, b"\0"]}, "version": 3.0}
    tensor = (
        b"\x80\x02ccollections\nOrderedDict\n)R(X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQK\x00K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtRu."
    )
    return (tensor, *(pickle.dumps(plain, protocol) for protocol in range(6)))


_BY_TORCH = """
import sys, torch
from collections import OrderedDict
state = OrderedDict((name, torch.randn(*shape)) for name, shape in {
    "model.language_model.embedding.word_embeddings.weight": (32, 16),
    "model.language_model.embedding.position_embeddings.weight": (16, 16),
    "model.language_model.encoder.final_layernorm.weight": (16,),
    "model.language_model.encoder.layers.0.self_attention.query_key_value.weight": (48, 16)}.items())
torch.save(state, sys.argv[1])
cfg = dict(num_layers=1, hidden_size=16, num_attention_heads=2, encoder_seq_length=16)
torch.save({"state_dict": state, "hyper_parameters": {"cfg": cfg}, "epoch": 1}, sys.argv[2])
"""


@functools.cache
def by_torch() -> tuple[bytes, bytes]:
    """A state dict, and a checkpoint with its configuration, saved by torch in a process of its own: torch takes much
    of the memory that is allowed.
    """
    paths = [folder() / name for name in ("state.bin", "whole.ckpt")]
    subprocess.run([sys.executable, "-c", _BY_TORCH, *map(str, paths)], check=True)
    return paths[0].read_bytes(), paths[1].read_bytes()


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32},
    "bos_token_id": 1, "eos_token_id": [2, 3], "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "vocab_size": 32,
    "n_positions": 16,
    "activation_function": "gelu_new",
}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [{"id": 4, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True}],
    "normalizer": {"type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}]},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\s+|\\w+"}, "behavior": "Isolated", "invert": False},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False,
        "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3},
    "merges": ["a b"]},
}  # fmt: skip
RECIPE = """input: a.onnx
output: b.onnx
passes:
  - convert: {opset: 19}
  - quantize: {scheme: int4-rtn, exclude: ["*head*"]}
  - prune: {method: magnitude, lm_head: true}
build: {engine: b.engine, sparsity: enable, max_seq_len: 64}
"""
NEMO_CONFIG = (
    "num_layers: 1\nhidden_size: 16\nnum_attention_heads: 2\nencoder_seq_length: 16\ntokenizer: {library: "
    "huggingface, type: gpt2, model: null}\n"
)


@functools.cache
def nemo_tar() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in {
            "./model_config.yaml": NEMO_CONFIG.encode(),
            "./model_weights.ckpt": by_torch()[0],
            "./x_tokenizer.json": json.dumps(TOKENIZER).encode(),
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return made.getvalue()


@functools.cache
def manifest() -> bytes:
    """Of an engine, with every key that is read."""
    spec: dict[str, Any] = {"backend": "auto", "sparsity": "disable"}
    io_ = [
        {"name": "input_ids", "dtype": "int64", "shape": [-1, -1]},
        {"name": "past_key_values.0.key", "dtype": "float32", "shape": [-1, 2, -1, 8]},
    ]
    out = [
        {"name": "logits", "dtype": "float32", "shape": [-1, -1, 32]},
        {"name": "present.0.key", "dtype": "float32", "shape": [-1, 2, -1, 8]},
    ]
    return json.dumps({
        "format": "onnxtools.engine/1", "onnxtools": "0", "backend": {"name": "tensorrt-rtx", "version": "1.7"},
        "engine": {"file": "e", "bytes": 1,
        "sha256": ""},
        "graph": {"sha256": "", "file": "m.onnx", "path": "m.onnx", "opset": 19, "ir_version": 9, "info": None,
            "beside": {}}, "weights": [{"file": "w",
        "bytes": 1, "sha256": ""}],
        "provenance": [], "spec": spec, "compute_capabilities": ["8.9"], "profiles": [{"name": "p", "inputs": {}}],
        "io_source": "network", "inputs": io_,
        "outputs": out,
        "layers": {"types": {"A": 1}, "output_dtypes": {}},
        "audit": {"source": "network", "outputs": {}, "layers": None}, "sparsity": None, "mends": [],
        "notes": [], "warnings": [],
        "build_seconds": 1.0, "peak_rss_mib": 1.0,
    }).encode()  # fmt: skip


def loaded(proto: onnx.ModelProto, where: Path) -> Model:
    path = where / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return Model.load(path)
