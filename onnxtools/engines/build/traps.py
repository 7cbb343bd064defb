"""Checks for nodes that TensorRT's ONNX parser misreads silently, or refuses without a useful message.

They are found in the graph, before parsing.

Measured with TensorRT-RTX 1.7.1:
  - Attention: the `nonpad_kv_seqlen` input is dropped; `is_causal` becomes an upper-left aligned mask whatever the
    shapes and cannot be combined with a mask; past inputs and a second output are refused.
  - TensorScatter: only rank 4, axis -2, mode linear.
  - ReduceMean and other reductions: axes must be an initializer or a Constant, not the result of a Reshape.
  - TRT_MXFP8DequantizeLinear without `axis`: the blocks are expected along axis 1, which is the last axis of a matrix
    only.
  - an operator of an unknown domain with the name of an ONNX operator is parsed as the ONNX operator.
Boolean masks and fp32 Attention are mended on the parsed network instead (`onnxtools.engines.tensorrt.network`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import onnx
import onnx_ir as ir

from onnxtools.analysis.facts import Facts, constants
from onnxtools.base.errors import JobError
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, constant_tensor, is_op

_KNOWN_DOMAINS = ("", "ai.onnx", "trt", "trt.plugins")


class Graph:
    """A model whose facts are computed once, on first use."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @cached_property
    def _analysis(self) -> tuple[Facts, dict[ir.Value, Any]]:
        views, agreed = constants(self.model)
        return views[0], agreed

    @property
    def constants(self) -> dict[ir.Value, Any]:
        """Elements (numpy) of the node outputs that do not depend on the inputs."""
        return self._analysis[1]

    def nodes(self) -> Iterator[ir.Node]:
        """All nodes, including those of subgraphs and functions."""
        return self.model.nodes_everywhere()

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Sizes with a distinct stand-in for each symbolic dimension; None if unknown.

        Dimensions with equal stand-ins are equal at run time.
        """
        return None if value is None else self._analysis[0][value].shape


def label(node: ir.Node) -> str:
    """`node 'X' (Op)`; a node without a name is identified by its first output."""
    domain = f"{node.domain}::" if node.domain not in ("", "ai.onnx") else ""
    identity = repr(node.name) if node.name else f"that makes {node.outputs[0].name!r}"
    return f"node {identity} ({domain}{node.op_type})"


def refuse(found: list[tuple[ir.Node, str]]) -> None:
    """Raise for the first (node, reason) of `found` and count the others; an empty list raises nothing.

    Raises:
        JobError: `node 'X' (Op): reason`.
    """
    if found:
        node, reason = found[0]
        more = f" (and {len(found) - 1} more such nodes)" if len(found) > 1 else ""
        raise JobError(f"{label(node)}: {reason}{more}")


def check_traps(graph: Graph) -> None:
    """Refuse nodes that TensorRT would build with another meaning, or not at all.

    Raises:
        JobError: names the first such node, the reason and what to do.
    """
    problems: list[tuple[ir.Node, str]] = []
    for node in graph.nodes():
        reason = None
        if is_op(node, "Attention"):
            reason = _attention(node, graph)
        elif is_op(node, "TensorScatter"):
            reason = _tensor_scatter(node, graph)
        elif node.op_type.startswith("Reduce") and _has_input(node, 1) and constant_tensor(node.inputs[1]) is None:
            reason = (
                "TensorRT takes the axes as an initializer or Constant alone, not computed; `onnxtools convert` folds "
                "them"
            )
        elif is_op(node, "TRT_MXFP8DequantizeLinear", domain="trt") and _lacks_axis(node, graph):
            reason = (
                "says no axis, and TensorRT looks for the blocks along axis 1, not the last; `onnxtools convert "
                "--keep-mx` says it"
            )
        elif _shadows_onnx(node, graph.model):
            reason = (
                f"TensorRT would read it as ONNX's {node.op_type} whatever {node.domain!r} means; use ONNX's or rename "
                "it"
            )
        if reason is not None:
            problems.append((node, reason))
    refuse(problems)


def _has_input(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


_DECOMPOSE = "`onnxtools decompose-attention IN OUT` writes an explicit mask"


def _attention(node: ir.Node, graph: Graph) -> str | None:
    if _has_input(node, 6):
        return (
            "TensorRT's parser drops its nonpad_kv_seqlen input without a word; give it an explicit additive mask "
            "instead"
        )
    if _has_input(node, 4) or _has_input(node, 5):
        return (
            "TensorRT takes no past_key or past_value input; concatenate the cache outside Attention, as add-kv-cache "
            "does"
        )
    if any(output.name for output in node.outputs[1:]):
        return "TensorRT takes an Attention with one output only; compute the others outside, or drop them"
    if not attribute(node, "is_causal", 0):
        return None
    if _has_input(node, 3):
        return f"TensorRT cannot combine is_causal with a mask; {_DECOMPOSE}"
    query, key = (graph.shape(node.inputs[index]) for index in (0, 1))
    if query is None or key is None:
        return f"is_causal=1 with unknown sequence lengths, and TensorRT aligns that mask upper-left; {_DECOMPOSE}"
    lengths = [shape[2] if len(shape) == 4 else shape[1] for shape in (query, key)]
    if lengths[0] != lengths[1]:
        return (
            f"is_causal=1 on other lengths of queries and keys, and TensorRT aligns that mask upper-left; {_DECOMPOSE}"
        )
    return None


def _lacks_axis(node: ir.Node, graph: Graph) -> bool:
    shape = graph.shape(node.inputs[0])
    return "axis" not in node.attributes and (shape is None or len(shape) != 2)


def _tensor_scatter(node: ir.Node, graph: Graph) -> str | None:
    shape = graph.shape(node.inputs[0])
    rank = len(shape) if shape is not None else None
    axis, mode = attribute(node, "axis", -2), attribute(node, "mode", "linear")
    if rank == 4 and axis in (-2, 2) and mode == "linear":
        return None
    return (
        f"TensorRT takes rank 4, axis -2 and mode linear, not rank {rank or 'unknown'}, axis {axis} and mode {mode};"
        " lay the cache out as [batch, heads, sequence, head_dim]"
    )


def _shadows_onnx(node: ir.Node, model: Model) -> bool:
    if node.domain in _KNOWN_DOMAINS or node.op_identifier() in model.ir.functions:
        return False
    return bool(onnx.defs.has(node.op_type))
