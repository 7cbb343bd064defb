"""`Model`: an ONNX graph in memory, its weights left where they lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir
import onnx_ir as ir

from onnxtools.errors import ModelError, OnnxtoolsError
from onnxtools.tensors import external_path

if TYPE_CHECKING:
    from onnxtools.storage import SaveReport

MAX_IR_VERSION = 13
"""ONNX Runtime 1.31 loads IR <= 13; onnx 1.23 would write 14."""


@dataclass
class Model:
    """A graph and where it came from.

    Attributes:
        ir: the onnx_ir model; passes change it in place.
        path: the file it was read from, or None for a model made in memory.
        sha256: of the graph file as it was read (external weights are not hashed: that would read them).
        notes: what loading had to mend, one line each.
    """

    ir: ir.Model
    path: Path | None = None
    sha256: str = ""
    notes: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Model:
        """Read the graph of `path`; no weight is read.

        Raises:
            ModelError: not ONNX, truncated, ill-formed, or a data file is missing, short or outside the folder.
        """
        path = Path(path)
        proto, digest = _read_proto(path)
        notes = _check_names(proto, path)
        try:
            model = ir.from_proto(proto)
        except Exception as error:  # onnx_ir raises many types for ill-formed protos
            raise ModelError(f"{path}: ill-formed ONNX graph ({_one_line(error)}); re-export the model") from error
        ir.external_data.set_base_dir(model.graph, path.parent)
        loaded = cls(model, path, digest, notes)
        loaded._lift_external_constants()
        loaded._drop_initializer_inputs()
        loaded._sort()
        for tensor in loaded.external_tensors():
            check_external(tensor, path)
        return loaded

    def _lift_external_constants(self) -> None:
        """Constant nodes whose tensor lies in a data file become initializers, so that all such weights are in one place."""
        for node in list(self.ir.graph):
            value = node.attributes.get("value") if node.op_type == "Constant" else None
            if value is None or not isinstance(value.value, ir.ExternalTensor):
                continue
            old, tensor = node.outputs[0], value.value
            name, old.name = old.name or "constant", f"{old.name}__node"
            tensor.name = name
            new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(tensor.shape.numpy())), const_value=tensor)
            self.ir.graph.register_initializer(new)
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            self.ir.graph.remove(node)

    def _drop_initializer_inputs(self) -> None:
        """Initializers that IR < 4 forced to be inputs too become constants; in a newer model they are meant to be overridden."""
        both = [value for value in self.ir.graph.inputs if value.name in self.ir.graph.initializers]
        if both and (self.ir.ir_version or 0) >= 4:
            self.notes.append(f"{len(both)} initializers are graph inputs too ({both[0].name!r} first): callers may override them, so they are left alone")
        elif both:
            for value in both:
                self.ir.graph.inputs.remove(value)
            self.notes.append(f"{len(both)} initializers were listed as graph inputs (IR {self.ir.ir_version}); they are constants now")

    def _sort(self) -> None:
        try:
            self.ir.graph.sort()
        except ValueError as error:
            raise ModelError(f"{self.path}: the graph has a cycle through {_cycle_node(self.ir.graph)}; an ONNX graph must be acyclic") from error

    @property
    def graph(self) -> onnx_ir.Graph:
        return self.ir.graph

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return int(self.ir.opset_imports.get("", 1))

    def weights(self) -> Iterator[tuple[onnx_ir.Value, onnx_ir.TensorProtocol]]:
        """(value, tensor) of every initializer, subgraphs included."""
        for graph in self.ir.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None:
                    yield value, value.const_value

    def external_tensors(self) -> Iterator[onnx_ir.ExternalTensor]:
        for _, tensor in self.weights():
            if isinstance(tensor, ir.ExternalTensor):
                yield tensor
        for node in self.ir.graph.all_nodes():
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value

    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.weights())

    def proto(self) -> onnx.ModelProto:
        """The graph as ONNX's own message, weights in memory evaluated.

        Raises:
            OnnxtoolsError: a weight cannot be computed.
        """
        try:
            return ir.to_proto(self.ir)
        except Exception as error:  # onnx_ir wraps what a weight raises while it is computed
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OnnxtoolsError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None

    def save(self, path: str | os.PathLike[str], *, copy_weights: bool = False, weights: bool = True) -> SaveReport:
        """Write the graph to `path` atomically; see `onnxtools.storage.save`."""
        from onnxtools import storage

        return storage.save(self, Path(path), copy_weights=copy_weights, weights=weights)


def _read_proto(path: Path) -> tuple[onnx.ModelProto, str]:
    try:
        if path.is_dir():
            raise ModelError(f"{path}: is a folder; name the .onnx file in it")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception:
        raise ModelError(f"{path}: not an ONNX file, or a truncated one ({len(data)} bytes); export or copy it again") from None
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{path}: not an ONNX model, or an empty one: it has no nodes and no outputs; export it again")
    if not proto.opset_import:
        raise ModelError(f"{path}: imports no operator set, so its nodes have no meaning; export it again")
    return proto, hashlib.sha256(data).hexdigest()


def _check_names(proto: onnx.ModelProto, path: Path) -> list[str]:
    """Refuse values defined twice and undeclared domains; give unique names to nodes that share one."""
    domains = {entry.domain or "" for entry in proto.opset_import} | {f.domain for f in proto.functions}
    defined: dict[str, str] = {}
    for value in proto.graph.input:
        if value.name in defined:
            raise ModelError(f"{path}: input {value.name!r} is declared twice; rename one")
        defined[value.name] = "a graph input"
    seen: set[str] = set()
    for tensor in proto.graph.initializer:
        if tensor.name in seen:
            raise ModelError(f"{path}: initializer {tensor.name!r} is defined twice; rename or remove one")
        seen.add(tensor.name)
        defined.setdefault(tensor.name, "an initializer")
    node_names: set[str] = set()
    renamed = 0
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"  # errors, checks and TensorRT all speak of nodes by name
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain not in domains and not (domain == "" and "ai.onnx" in domains):
            raise ModelError(
                f"{path}: node {node.name!r} is {node.domain}::{node.op_type} but the model imports no domain {node.domain!r}; add the opset import"
            )
        for name in node.output:
            if name in defined:
                raise ModelError(f"{path}: value {name!r} of node {node.name!r} is already defined by {defined[name]}; names must be unique")
            if name:
                defined[name] = f"node {node.name!r}"
        if node.name in node_names:
            node.name, renamed = _unique(node.name, node_names), renamed + 1
        node_names.add(node.name)
    _check_defined(proto.graph, set(), path)
    return [f"{renamed} nodes shared a name with another; given unique names"] if renamed else []


def _check_defined(graph: onnx.GraphProto, outer: set[str], path: Path) -> None:
    """Refuse uses of values that nothing defines, in the graph and its subgraphs."""
    known = outer | {v.name for v in graph.input} | {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    known |= {name for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                raise ModelError(f"{path}: node {node.name!r} ({node.op_type}) uses the value {name!r}, which nothing defines; export the model again")
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _check_defined(inner, known, path)
    for value in graph.output:
        if value.name not in known:
            raise ModelError(f"{path}: nothing defines the output {value.name!r}; export the model again")


def _unique(name: str, taken: set[str]) -> str:
    index = 1
    while f"{name}_{index}" in taken:
        index += 1
    return f"{name}_{index}"


def _cycle_node(graph: ir.Graph) -> str:
    """Name of a node that waits for itself (Kahn's algorithm leaves exactly the nodes on or after a cycle)."""
    waiting = {node: {i.producer() for i in node.inputs if i is not None and i.producer() is not None} for node in graph}
    done: set[ir.Node | None] = set()
    progress = True
    while progress:
        ready = [node for node, needs in waiting.items() if needs <= done]
        progress = bool(ready)
        for node in ready:
            done.add(node)
            del waiting[node]
    first = next(iter(waiting), None)
    return f"node {first.name!r} ({first.op_type})" if first is not None else "a node"


def check_external(tensor: ir.ExternalTensor, model_path: Path) -> None:
    """Refuse a data file that is missing, too short, a link, or outside the model's folder.

    The rules are onnx's own (a data file behind a link, or outside the folder, is refused by onnx and onnx_ir).
    """
    location = str(tensor.location)
    where = f"{model_path}: weight {tensor.name!r} lies in external data {location!r}"
    if Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(f"{where}, which leaves the model's folder; move the file beside the model and re-save")
    file = external_path(tensor)
    probe = Path(tensor.base_dir)
    for part in Path(location).parts:
        probe = probe / part
        if probe.is_symlink():
            raise ModelError(f"{where}, which is a symbolic link; replace it by the file itself")
    try:
        size = file.stat().st_size
    except OSError:
        raise ModelError(f"{where}, which is missing; put the file beside the model") from None
    offset = tensor.offset or 0
    length = tensor.length if tensor.length is not None else tensor.nbytes
    if offset < 0 or length != tensor.nbytes:
        raise ModelError(f"{where} at offset {offset} with length {length}, but its shape needs {tensor.nbytes} bytes; re-export the model")
    if size < offset + length:
        raise ModelError(f"{where}, which ends at byte {size} but should reach {offset + length}; the file is truncated, copy it again")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
