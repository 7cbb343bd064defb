"""Extracts the part of a graph that some of its values need. Weights outside the part are not read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx
import onnx_ir as ir

from onnxtools.base.errors import OnnxtoolsError
from onnxtools.ir.model import Model
from onnxtools.ir.query import graphs_inside, is_op
from onnxtools.storage.lazy import row_range, shape_of
from onnxtools.storage.rows import RowTensor

TABLE_ROWS = 1024
"""Rows of an embedding table in a part. Token ids must be below."""


def needed(model: Model, values: Iterable[ir.Value]) -> tuple[set[ir.Node], set[ir.Value]]:
    """Returns the nodes of the main graph that compute `values`, and the inputs and initializers that they read."""
    nodes: set[ir.Node] = set()
    leaves: set[ir.Value] = set()
    main, waiting = set(model.graph), list(values)
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None:
            leaves.add(value)
        elif node in main and node not in nodes:
            nodes.add(node)
            waiting += _read_by(node)
    return nodes, {value for value in leaves if value.is_graph_input() or value.is_initializer()}


def _read_by(node: ir.Node) -> Iterator[ir.Value]:
    """Yields the inputs of a node and all values that the graphs inside it read, their own ones included (harmless)."""
    yield from (value for value in node.inputs if value is not None)
    for graph in graphs_inside(node):
        for inner in graph.all_nodes():
            yield from (value for value in inner.inputs if value is not None)
        yield from graph.outputs


def part(model: Model, names: Sequence[str], *, rows: int | None = None) -> onnx.ModelProto:
    """Returns a model whose outputs are the values called `names`.

    Args:
        model: the model; it is not changed.
        names: node outputs or graph inputs of its main graph.
        rows: keep only so many rows of tables that tokens or positions look up; None keeps all.

    Raises:
        KeyError: the main graph has no such value.
        OnnxtoolsError: a weight cannot be computed.
    """
    by_name = {value.name: value for node in model.graph for value in node.outputs} | {
        value.name: value for value in model.graph.inputs
    }
    nodes, leaves = needed(model, [by_name[name] for name in names])
    graph = onnx.GraphProto(name="part")
    graph.node.extend(ir.serde.serialize_node(node) for node in model.graph if node in nodes)
    main = set(model.graph.inputs)
    for value in model.graph.inputs:
        if value in leaves:
            graph.input.append(ir.serde.serialize_value(value))
    for value in sorted((v for v in leaves if v not in main), key=lambda v: v.name or ""):
        tensor = value.const_value
        if tensor is not None:
            part_tensor = _some_rows(value, tensor, rows) if rows is not None else tensor
            proto = _serialized(part_tensor)
            proto.name = value.name or ""
            graph.initializer.append(proto)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.ir.opset_imports.items()]
    model_proto = onnx.ModelProto(ir_version=model.ir.ir_version, graph=graph, opset_import=opsets)
    model_proto.functions.extend(ir.serde.serialize_function(function) for function in model.ir.functions.values())
    return model_proto


def _serialized(tensor: ir.TensorProtocol) -> onnx.TensorProto:
    try:
        return ir.serde.serialize_tensor(tensor)
    except Exception as error:  # onnx_ir wraps the error of a weight that cannot be computed
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OnnxtoolsError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from None


def is_table(value: ir.Value) -> bool:
    """Whether the weight is read, and only by Gather along its first axis."""
    return bool(value.uses()) and all(
        is_op(node, "Gather") and index == 0 and node.attributes.get_int("axis", 0) == 0 for node, index in value.uses()
    )


def _some_rows(value: ir.Value, tensor: ir.TensorProtocol, rows: int) -> ir.TensorProtocol:
    shape = shape_of(tensor)
    whole = len(shape) != 2 or shape[0] <= rows or tensor.dtype.bitwidth < 8 or not is_table(value)
    multiple = tensor.row_multiple if isinstance(tensor, RowTensor) else 1
    return tensor if whole else row_range(tensor, 0, min(-(-rows // multiple) * multiple, shape[0]))


def beginning(model: Model, limit: int, count: int = 24) -> tuple[list[str], int, int]:
    """Returns values of the first nodes whose weights have at most `limit` bytes. Tables count `TABLE_ROWS` rows.

    Returns:
        Up to `count` names of values, spread over these nodes and in graph order; the number of these nodes; the bytes
        of their weights.
    """
    weights: set[ir.Value] = set()
    nbytes = nodes = 0
    names: list[str] = []
    for node in model.graph:
        new = [v for v in _read_by(node) if v.is_initializer() and v not in weights and v.const_value is not None]
        size = nbytes + sum(_part_bytes(v) for v in new)
        if size > limit:
            break
        weights.update(new)
        nbytes, nodes = size, nodes + 1
        names += [v.name for v in node.outputs if v.name and v.uses()]
    step = max(1, -(-len(names) // count))
    return names[::-1][::step][::-1], nodes, nbytes


def _part_bytes(value: ir.Value) -> int:
    tensor = value.const_value
    assert tensor is not None
    shape = shape_of(tensor)
    return (
        tensor.nbytes * TABLE_ROWS // shape[0]
        if len(shape) == 2 and shape[0] > TABLE_ROWS and is_table(value)
        else tensor.nbytes
    )
