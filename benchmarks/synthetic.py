"""A synthetic GPT of any size in the exporter's style, weights streamed to external data, memory bounded.

The node chains are those of `fixtures/te`: sequence-first attention over [batch * heads, sequence, channels], a mask
from positions, reshapes to computed targets. `fp8` puts TransformerEngine's operators around every linear layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

HIDDEN, HEADS, POSITIONS = 4096, 32, 2048
VOCABULARY, SMALL_VOCABULARY = 51200, 8192
ITEM_BYTES: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2}


class Graph:
    """Collects nodes and external initializers."""

    def __init__(self, data: Path, dtype: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.data, self.dtype = data, dtype
        self.offset = 0
        self.count = 0

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        self.count += 1
        name = f"{op_type.lower()}_{self.count}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], f"node_{name}", domain=domain, **attributes))
        return name

    def ints(self, *values: int) -> str:
        return self.op("Constant", value_ints=list(values))

    def scalar(self, value: float | int, dtype: int) -> str:
        return self.op("Constant", value=helper.make_tensor("v", dtype, [], [value]))

    def weight(self, name: str, *shape: int) -> str:
        tensor = TensorProto(name=name, data_type=self.dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        length = int(np.prod(shape)) * ITEM_BYTES[self.dtype]
        for key, value in (("location", self.data.name), ("offset", self.offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.offset += -(-length // 4096) * 4096
        self.initializers.append(tensor)
        return name

    def reshape(self, value: str, *dims: int | str) -> str:
        parts = [self.ints(d) if isinstance(d, int) else self.op("Reshape", d, self.ints(-1)) for d in dims]
        return self.op("Reshape", value, self.op("Concat", *parts, axis=0), allowzero=1)


def linear(g: Graph, x: str, name: str, n_in: int, n_out: int, fp8: bool) -> str:
    weight = g.weight(f"{name}.weight", n_out, n_in)
    if fp8:
        x, weight = (quantized(g, value, scale) for value, scale in ((x, 0.01), (weight, 0.0005)))
    flat = g.reshape(x, -1, n_in)
    y = g.op("Gemm", flat, weight, g.weight(f"{name}.bias", n_out), transB=1)
    return g.reshape(y, "batch_size", "length", n_out)


def quantized(g: Graph, value: str, scale: float) -> str:
    wide = value if g.dtype == TensorProto.FLOAT else g.op("Cast", value, to=TensorProto.FLOAT)
    q = g.op("TRT_FP8QuantizeLinear", wide, g.op("Constant", value_float=scale), domain="trt")
    inverse = g.op("Reciprocal", g.op("Constant", value_float=1 / scale))
    d = g.op("TRT_FP8DequantizeLinear", q, inverse, domain="trt")
    return d if g.dtype == TensorProto.FLOAT else g.op("Cast", d, to=g.dtype)


def norm(g: Graph, x: str, name: str) -> str:
    return g.op(
        "LayerNormalization",
        x,
        g.weight(f"{name}.weight", HIDDEN),
        g.weight(f"{name}.bias", HIDDEN),
        axis=-1,
        epsilon=1e-5,
    )


def mask(g: Graph) -> str:
    size = g.op("Concat", *(g.op("Reshape", "length", g.ints(-1)) for _ in range(2)), axis=0)
    ones = g.op("Expand", g.op("Cast", g.scalar(1.0, TensorProto.FLOAT), to=TensorProto.BOOL), size)
    return g.op("Trilu", ones, g.scalar(1, TensorProto.INT64), upper=1)


def attention(g: Graph, x: str, name: str, fp8: bool) -> str:
    size = HIDDEN // HEADS
    rows = g.op("Mul", "batch_size", g.scalar(HEADS, TensorProto.INT64))
    packed = g.reshape(linear(g, x, f"{name}.qkv", HIDDEN, 3 * HIDDEN, fp8), "batch_size", "length", HEADS, 3, size)
    parts = []
    for index in range(3):
        part = g.op("Transpose", g.op("Gather", packed, g.scalar(index, TensorProto.INT64), axis=-2), perm=[1, 0, 2, 3])
        parts.append(g.op("Transpose", g.reshape(g.op("Identity", part), "length", rows, size), perm=[1, 0, 2]))
    query, key, value = parts
    scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 2, 1]))
    scores = g.op("Mul", scores, g.op("CastLike", g.scalar(size**-0.5, TensorProto.FLOAT), scores))
    scores = g.reshape(scores, "batch_size", HEADS, "length", "length")
    scores = g.op("Where", mask(g), g.op("CastLike", g.scalar(-10000.0, TensorProto.FLOAT), scores), scores)
    probabilities = g.reshape(g.op("Softmax", scores, axis=-1), rows, "length", -1)
    context = g.reshape(g.op("MatMul", probabilities, value), "batch_size", HEADS, "length", size)
    merged = g.reshape(g.op("Transpose", context, perm=[0, 2, 1, 3]), "batch_size", "length", -1)
    return linear(g, merged, f"{name}.proj", HIDDEN, HIDDEN, fp8)


def gelu(g: Graph, x: str) -> str:
    def constant(number: float) -> str:
        return g.op("CastLike", g.scalar(number, TensorProto.FLOAT), x)

    inner = g.op("Add", x, g.op("Mul", constant(0.044715), g.op("Mul", x, g.op("Mul", x, x))))
    tanh = g.op("Tanh", g.op("Mul", constant(0.7978846), inner))
    return g.op("Mul", x, g.op("Mul", constant(0.5), g.op("Add", tanh, constant(1.0))))


def weights_path(path: Path) -> Path:
    """The data file of the model at `path`."""
    return path.with_name(f"{path.name}.weights")


def make(path: Path, gigabytes: float, *, fp8: bool = False, dtype: int = TensorProto.FLOAT16) -> int:
    """Write a model of about `gigabytes` to `path` and its data file; returns the bytes of that.

    Args:
        fp8: TransformerEngine's FP8 operators around every linear layer.
        dtype: FLOAT16 or FLOAT.
    """
    data = weights_path(path)
    vocabulary = VOCABULARY if gigabytes >= 2 else SMALL_VOCABULARY
    g = Graph(data, dtype)
    for name, axis in (("batch_size", 0), ("length", 1)):
        shape = g.op("Shape", "input_ids", start=axis, end=axis + 1)
        g.nodes.append(helper.make_node("Squeeze", [shape], [name], f"node_{name}"))
    table = g.weight("wte.weight", vocabulary, HIDDEN)
    x = g.op(
        "Add",
        g.op("Gather", table, "input_ids"),
        g.op("Gather", g.weight("wpe.weight", POSITIONS, HIDDEN), "position_ids"),
    )
    layers = max(1, round((gigabytes * 1e9 - g.offset) / (12 * HIDDEN * HIDDEN * ITEM_BYTES[dtype])))
    for layer in range(layers):
        name = f"layers.{layer}"
        x = g.op("Add", x, attention(g, norm(g, x, f"{name}.norm1"), f"{name}.attention", fp8))
        hidden = gelu(g, linear(g, norm(g, x, f"{name}.norm2"), f"{name}.fc1", HIDDEN, 4 * HIDDEN, fp8))
        x = g.op("Add", x, linear(g, hidden, f"{name}.fc2", 4 * HIDDEN, HIDDEN, fp8))
    logits = g.op("MatMul", norm(g, x, "norm"), g.op("Transpose", table, perm=[1, 0]))
    g.nodes.append(helper.make_node("Cast", [logits], ["logits"], "node_logits", to=TensorProto.FLOAT))
    ids = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"])
        for n in ("input_ids", "position_ids")
    ]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", vocabulary])
    graph = helper.make_graph(g.nodes, "synthetic", ids, [output], g.initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("trt", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    _fill(data, g.offset, dtype)
    return g.offset


def _fill(data: Path, size: int, dtype: int) -> None:
    """Random weights of scale 0.02 from one block, each copy with its own low mantissa bits so that no two weights are
    equal.
    """
    values = np.random.default_rng(0).standard_normal(8 << 20, dtype=np.float32) * np.float32(0.02)
    block = values.view(np.uint32) if dtype == TensorProto.FLOAT else values.astype(np.float16).view(np.uint16)
    with open(data, "wb", buffering=0) as file:
        for index, start in enumerate(range(0, size, block.nbytes)):
            mixed = block ^ block.dtype.type(index % 1024)
            file.write(mixed.view(np.uint8).data[: size - start])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--gb", type=float, default=10)
    parser.add_argument(
        "--fp8", action="store_true", help="TransformerEngine's FP8 operators around every linear layer"
    )
    parser.add_argument("--fp32", action="store_true", help="fp32 instead of fp16")
    options = parser.parse_args()
    size = make(
        options.path, options.gb, fp8=options.fp8, dtype=TensorProto.FLOAT if options.fp32 else TensorProto.FLOAT16
    )
    print(f"{size / 1e9:.2f} GB")
