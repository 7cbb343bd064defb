"""`Model`: an ONNX graph in memory, its weights left where they lie."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir
import onnx_ir as ir

from onnxtools.base.errors import ModelError, OnnxtoolsError
from onnxtools.base.inputs import absent, check_regular
from onnxtools.tensors import external_path
from onnxtools.wellformed import check

if TYPE_CHECKING:
    from onnxtools.storage import Beside, SaveReport

MAX_IR_VERSION = 13
"""ONNX Runtime 1.31 loads IR <= 13; onnx 1.23 would write 14."""
_LOG = logging.getLogger("onnxtools")
_MAX_PROTO_BYTES = 1 << 31
"""No protobuf is larger."""


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
        _LOG.info("reading %s", path)
        proto, digest = _read_proto(path)
        notes = check(proto, path)
        try:
            model = ir.from_proto(proto)
        except Exception as error:  # onnx_ir raises many types for ill-formed protos
            raise ModelError(f"{path}: ill-formed ONNX graph ({_one_line(error)}); re-export the model") from error
        loaded = cls(model, path, digest, notes)
        for tensor in loaded.external_tensors():
            tensor.base_dir = path.parent
            check_external(tensor, path)
        loaded._follow_hub_links()
        loaded.lift_constants()
        loaded._drop_initializer_inputs()
        loaded._sort()
        return loaded

    def _follow_hub_links(self) -> None:
        """Let weights behind the links of a Hugging Face cache refer to the files that these lead to: onnx_ir follows none that leave the folder."""
        for value, tensor in self.weights():
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = _real(tensor)
        for attributes, name, tensor in self.external_attributes():
            attributes[name] = ir.AttrTensor(name, _real(tensor))

    def lift_constants(self) -> None:
        """Constant nodes that hold a weight become initializers, in subgraphs too, so that all weights are in one place.

        A weight is a tensor in a data file, or one of two or more elements in floating point, or above 1 KiB; scalars stay.
        """
        for graph in self.ir.graphs():
            for node in list(graph):
                held = node.attributes.get("value") if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
                if held is not None and held.type == ir.AttributeType.TENSOR and _is_weight(held.as_tensor()):
                    self._lift(graph, node, held.as_tensor())

    def _lift(self, graph: onnx_ir.Graph, node: onnx_ir.Node, tensor: onnx_ir.TensorProtocol) -> None:
        old = node.outputs[0]
        if old.is_graph_output():
            return
        name, old.name = old.name or "constant", f"{old.name}__node"
        tensor.name = name
        new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(tensor.shape.numpy())), const_value=tensor)
        graph.register_initializer(new)
        ir.convenience.replace_all_uses_with(old, new)
        graph.remove(node)

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

    def nodes_everywhere(self) -> Iterator[onnx_ir.Node]:
        """Every node, those of subgraphs and functions included."""
        yield from self.ir.graph.all_nodes()
        for function in self.ir.functions.values():
            yield from function.all_nodes()

    def external_attributes(self) -> Iterator[tuple[MutableMapping[str, Any], str, onnx_ir.ExternalTensor]]:
        """(attributes, name, tensor) of every attribute whose tensor lies in a data file: in subgraphs, functions and their defaults too."""
        for attributes in self._attributes_everywhere():
            for name, attribute in list(attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    yield attributes, name, attribute.value

    def _attributes_everywhere(self) -> Iterator[MutableMapping[str, Any]]:
        """Of every node, and what attributes of functions are by default."""
        yield from (node.attributes for node in self.nodes_everywhere())
        yield from (function.attributes for function in self.ir.functions.values())

    def external_tensors(self) -> Iterator[onnx_ir.ExternalTensor]:
        """Whatever lies in data files: initializers, and attributes of nodes."""
        for _, tensor in self.weights():
            if isinstance(tensor, ir.ExternalTensor):
                yield tensor
        for _, _, tensor in self.external_attributes():
            yield tensor
        for attributes in self._attributes_everywhere():
            for attribute in attributes.values():
                if attribute.type == ir.AttributeType.TENSORS:
                    yield from (tensor for tensor in attribute.value if isinstance(tensor, ir.ExternalTensor))

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
            cause: BaseException = error
            while not isinstance(cause, OnnxtoolsError) and (deeper := cause.__cause__ or cause.__context__) is not None:
                cause = deeper
            if isinstance(cause, OnnxtoolsError):
                raise cause from None
            raise ModelError(f"{self.path}: cannot be written as ONNX ({_one_line(cause)}); export the model again") from error

    def save(self, path: str | os.PathLike[str], *, copy_weights: bool = False, weights: bool = True, beside: Beside | None = None) -> SaveReport:
        """Write the graph to `path` atomically; see `onnxtools.storage.save`."""
        from onnxtools import storage

        return storage.save(self, Path(path), copy_weights=copy_weights, weights=weights, beside=beside)


def _is_weight(tensor: ir.TensorProtocol) -> bool:
    floating = tensor.dtype.is_floating_point() and tensor.size > 1
    return isinstance(tensor, ir.ExternalTensor) or (tensor.dtype != ir.DataType.STRING and (floating or tensor.nbytes > 1024))


def _read_proto(path: Path) -> tuple[onnx.ModelProto, str]:
    try:
        if path.is_dir():
            raise ModelError(f"{path}: is a folder; name the .onnx file in it")
        check_regular(path, ModelError)
        if (size := path.stat().st_size) >= _MAX_PROTO_BYTES:
            raise ModelError(f"{path}: has {size} bytes, and no ONNX graph can have more than {_MAX_PROTO_BYTES}; keep its weights in a data file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{absent(path)}: no such file; check the path") from None
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
    """Refuse a data file that is missing, too short, no file, outside the model's folder, or a link that leads out of it.

    The rules are onnx's own (a data file behind a link, or outside the folder, is refused by onnx and onnx_ir); the links of a
    Hugging Face cache lead from `snapshots/REVISION/` into the `blobs/` of the same repository and are followed.
    """
    location = str(tensor.location)
    where = f"{model_path}: weight {tensor.name!r} lies in external data {location!r}"
    if Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(f"{where}, which leaves the model's folder; move the file beside the model and re-save")
    file = external_path(tensor)
    probe = Path(tensor.base_dir)
    for part in Path(location).parts:
        probe = probe / part
        if probe.is_symlink() and hub_blob(probe) is None:
            raise ModelError(f"{where}, which is a symbolic link; replace it by the file itself")
    try:
        status = file.stat()
    except OSError:
        raise ModelError(f"{where}, which is missing; put the file beside the model") from None
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{where}, which is no file; put the data file beside the model")
    offset = tensor.offset or 0
    length = tensor.length if tensor.length is not None else tensor.nbytes
    if offset < 0 or length != tensor.nbytes:
        raise ModelError(f"{where} at offset {offset} with length {length}, but its shape needs {tensor.nbytes} bytes; re-export the model")
    if status.st_size < offset + length:
        raise ModelError(f"{where}, which ends at byte {status.st_size} but should reach {offset + length}; the file is truncated, copy it again")


def hub_blob(link: Path) -> Path | None:
    """The file that a link of a Hugging Face cache leads to; None where it is another link.

    huggingface_hub's layout: `REPOSITORY/snapshots/REVISION/NAME` is a link to `REPOSITORY/blobs/HASH`.
    """
    real = link.resolve()
    folder = link.parent.resolve()
    snapshots = next((parent for parent in (folder, *folder.parents) if parent.parent.name == "snapshots"), None)
    return real if snapshots is not None and real.parent == snapshots.parent.parent / "blobs" else None


def _real(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    """The tensor itself, or one that refers to the file behind a link that `check_external` let pass."""
    file = external_path(tensor)
    if not file.is_symlink():
        return tensor
    real = file.resolve()
    return ir.ExternalTensor(real.name, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=real.parent)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
