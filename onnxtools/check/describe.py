"""Describes a model as plain data, for people and for `--json`, and lists the differences of two models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from onnxtools.analysis.cache import cache_inputs
from onnxtools.analysis.products import weight_products
from onnxtools.ir.model import Model
from onnxtools.ir.provenance import provenance
from onnxtools.ir.query import attribute, is_op


def describe(model: Model, *, sparsity: bool = False) -> dict[str, Any]:
    """Returns a summary of `model` as plain data (dicts, lists, strings, numbers).

    Args:
        model: the model.
        sparsity: also count the zeros of the weights. Weights are read for this alone.
    """
    return {
        "path": str(model.path),
        "sha256": model.sha256,
        "producer": " ".join(filter(None, (model.ir.producer_name, model.ir.producer_version))),
        "ir_version": model.ir.ir_version,
        "opsets": dict(model.ir.opset_imports),
        "nodes": len(model.graph),
        "ops": dict(Counter(_op(node) for node in model.graph.all_nodes()).most_common()),
        "io": [_io("input", v) for v in model.graph.inputs] + [_io("output", v) for v in model.graph.outputs],
        "weights": _weights(model),
        "quantization": _quantization(model),
        "cache": _cache(model),
        "provenance": provenance(model),
        "sparsity": _sparsity(model) if sparsity else None,
    }


def _op(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def shape_of(value: ir.Value) -> list[int | str]:
    """Returns sizes and names of the dimensions, with "?" for a dimension without a name; [] for an unknown shape."""
    return [d if isinstance(d, int) else d.value or "?" for d in value.shape or ()]


def _io(kind: str, value: ir.Value) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": value.name,
        "dtype": value.dtype.name if value.dtype else "?",
        "shape": shape_of(value),
    }


def _weights(model: Model) -> dict[str, Any]:
    by_dtype: dict[str, dict[str, int]] = {}
    files: set[str] = set()
    for _, tensor in model.weights():
        entry = by_dtype.setdefault(tensor.dtype.name, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += tensor.nbytes
        if isinstance(tensor, ir.ExternalTensor):
            files.add(str(tensor.location))
    return {"bytes": sum(e["bytes"] for e in by_dtype.values()), "by_dtype": by_dtype, "files": sorted(files)}


def _quantization(model: Model) -> dict[str, Any]:
    products = list({p.node: p for p in weight_products(model)}.values())
    sizes = [(p.tensor.size, p.quantized) for p in products]
    sizes += [
        (attribute(node, "K", 0) * attribute(node, "N", 0), True)
        for node in model.graph
        if is_op(node, "MatMulNBits", domain="com.microsoft")
    ]
    total = sum(size for size, _ in sizes)
    return {
        "products": len(sizes),
        "quantized_products": sum(quantized for _, quantized in sizes),
        "weight_fraction": sum(size for size, quantized in sizes if quantized) / total if total else 0.0,
    }


def _cache(model: Model) -> dict[str, Any] | None:
    caches = cache_inputs(model)
    if not caches:
        return None
    first = caches[0]
    return {
        "tensors": len(caches),
        "dtype": first.dtype.name if first.dtype else "?",
        "shape": " x ".join(map(str, shape_of(first))),
    }


def _sparsity(model: Model) -> list[dict[str, Any]]:
    from onnxtools.numerics.sparsity import count_2_4

    rows = []
    for product in {p.weight: p for p in weight_products(model)}.values():
        counts = count_2_4(product.tensor, product.axis)
        rows.append(
            {
                "name": product.weight.name,
                "shape": [int(d) for d in product.tensor.shape.numpy()],
                "zeros": counts.zero_fraction,
                "is_2_4": counts.is_2_4,
            }
        )
    return rows


def differences(a: Model, b: Model) -> dict[str, list[dict[str, Any]]]:
    """Returns the differences of two models: opsets, operators, inputs and outputs, weights by type, initializers.

    Each difference has the keys `name`, `before` (in `a`) and `after` (in `b`). A value is None where a model lacks
    the entry.
    """
    x, y = describe(a), describe(b)
    return {
        "opsets": _changes(x["opsets"], y["opsets"]),
        "ops": _changes(x["ops"], y["ops"]),
        "io": _changes(
            *(
                {f"{io['kind']} {io['name']}": f"{io['dtype']} {'x'.join(map(str, io['shape']))}" for io in d["io"]}
                for d in (x, y)
            )
        ),
        "weights": _changes(
            *(
                {k: f"{v['count']} tensors, {v['bytes']} bytes" for k, v in d["weights"]["by_dtype"].items()}
                for d in (x, y)
            )
        ),
        "initializers": _changes(_initializers(a), _initializers(b)),
    }


def engine_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the differences of two engine manifests, in the form of `differences`.

    They cover the builder, graph and size, the options, inputs and outputs, profiles, types of layer outputs, and
    layers.
    """

    def io(m: Mapping[str, Any]) -> dict[str, str]:
        return {
            f"{kind} {t['name']}": f"{t['dtype']} {'x'.join(map(str, t['shape']))}"
            for kind in ("inputs", "outputs")
            for t in m[kind]
        }

    def build_of(m: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "builder": f"{m['backend']['name']} {m['backend']['version']}",
            "graph": m["graph"]["sha256"][:12],
            "bytes": m["engine"]["bytes"],
        }

    parts: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "made": build_of, "options": lambda m: m["spec"], "io": io,
        "profiles": lambda m: {p["name"]: p["inputs"] for p in m["profiles"]},
        "types": lambda m: m["audit"]["outputs"], "layers": lambda m: m["layers"]["types"],
    }  # fmt: skip
    return {title: _changes(of(a), of(b)) for title, of in parts.items()}


def _initializers(model: Model) -> dict[str, str]:
    return {
        v.name or "": f"{t.dtype.name} {'x'.join(str(d) for d in t.shape.numpy())}"
        for v, t in model.weights()
        if t.size > 1
    }


def _changes(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": key, "before": a.get(key), "after": b.get(key)}
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key)
    ]
