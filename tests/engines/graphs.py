"""Small graphs in the style of an exporter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxtools.engines.build.builder import Engine

FIXTURES = Path(__file__).parents[2] / "fixtures"
Dims = Sequence[int | str]
FLOAT, HALF, BF16, BOOL, INT64 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.BOOL,
    TensorProto.INT64,
)


def tensor(name: str, dims: Dims | None, dtype: int = HALF) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, dims)


def weights(**arrays: np.ndarray[Any, Any]) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(array, name) for name, array in arrays.items()]


def write(
    path: Path,
    nodes: Any,
    inputs: Any,
    outputs: Any,
    stored: Any = (),
    *,
    opset: int = 24,
    ir: int = 11,
    domains: Sequence[str] = (),
) -> Path:
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), list(stored))
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=ir), path)
    return path


def random(*shape: int, dtype: Any = np.float16) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def two_of_four(array: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
    """The plain reference: the last two of each four along `axis` become zero."""
    moved = np.moveaxis(array.copy(), axis, -1)
    moved.reshape(*moved.shape[:-1], -1, 4)[..., 2:] = 0
    return np.moveaxis(moved, -1, axis)


def linear(
    path: Path, dims: Dims = ("batch", "sequence", 64), weight: np.ndarray[Any, Any] | None = None, **kwargs: Any
) -> Path:
    """x [.., 64] @ w [64, 128] in fp16."""
    stored = weights(w=random(64, 128) if weight is None else weight)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="/proj/MatMul")
    return write(path, [node], [tensor("x", dims)], [tensor("y", [*dims[:-1], 128])], stored, **kwargs)


def fp8_linear(path: Path, scale: float = 0.5) -> Path:
    """FP8 Q/DQ on the activation and an FP8 weight behind DequantizeLinear: fp32 [4, 64] @ [64, 128]."""
    stored = weights(s=np.float32(scale), sw=np.float32(0.25))
    stored.append(helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]))
    stored.append(
        helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, [64, 128], random(64, 128, dtype=np.float32).ravel().tolist())
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["xq"], name="Q"),
        helper.make_node("DequantizeLinear", ["xq", "s"], ["xd"], name="DQ"),
        helper.make_node("DequantizeLinear", ["w", "sw"], ["wd"], name="DQw"),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="mm"),
    ]
    return write(path, nodes, [tensor("x", [4, 64], FLOAT)], [tensor("y", [4, 128], FLOAT)], stored, opset=19)


def attention(
    path: Path,
    *,
    dtype: int = HALF,
    keys: int | str = "sequence",
    queries: int | str = "sequence",
    mask: int | None = None,
    extra: Sequence[tuple[int, onnx.ValueInfoProto]] = (),
    outputs: int = 1,
    **attributes: Any,
) -> Path:
    """One Attention, 4 heads of 32; `extra` puts graph inputs at further input positions."""
    inputs = [tensor("q", ["batch", 4, queries, 32], dtype), *(tensor(n, ["batch", 4, keys, 32], dtype) for n in "kv")]
    names = ["q", "k", "v"]
    if mask is not None:
        inputs.append(tensor("mask", ["batch", 1, queries, keys], mask))
        names.append("mask")
    for position, info in extra:
        names += [""] * (position + 1 - len(names))
        names[position] = info.name
        inputs.append(info)
    made = ["y", "y1", "y2"][:outputs]
    node = helper.make_node("Attention", names, made, name="/attn/Attention", **attributes)
    results = [tensor("y", ["batch", 4, queries, 32], dtype), *(tensor(name, None, dtype) for name in made[1:])]
    return write(path, [node], inputs, results)


def manifest(engine: Engine) -> dict[str, Any]:
    """The manifest as it lies on the disk."""
    found: dict[str, Any] = json.loads(engine.path.with_name(f"{engine.path.name}.json").read_text())
    return found


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith((".onnx", ".data")))
