"""`Model`: an ONNX graph in memory. Its weights stay in their files."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir
import onnx_ir as ir

from onnxtools.base.errors import ModelError, one_line
from onnxtools.base.inputs import absent, check_regular
from onnxtools.ir.wellformed import check
from onnxtools.storage import external
from onnxtools.storage.external import ExternalAttribute
from onnxtools.storage.records import MAX_PROTO_BYTES, Beside
from onnxtools.storage.rows import external_path
from onnxtools.storage.save import SaveReport, save, to_proto

MAX_IR_VERSION = 13
"""ONNX Runtime 1.31 loads IR <= 13; onnx 1.23 would write 14."""
_UNKNOWN = ("?", "-1", "None", "unk")
"""Names that exporters give to every dimension that they do not know; Paddle's is "?"."""
_LOG = logging.getLogger("onnxtools")


@dataclass
class Model:
    """A graph and its origin.

    Attributes:
        ir: the onnx_ir model. Passes change it in place.
        path: the file that it was read from, or None for a model built in memory.
        sha256: hexadecimal hash of the graph file as read. External weights are not hashed, since that would read them.
        notes: one line for each repair at loading, and for each note of a pass.
        unnamed: whether the file has one name, such as "?", for all dimensions that its exporter did not know.
    """

    ir: ir.Model
    path: Path | None = None
    sha256: str = ""
    notes: list[str] = field(default_factory=list)
    unnamed: bool = False

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Model:
        """Reads the graph file `path`. No weight in a data file is read.

        Raises:
            ModelError: the file is not ONNX, is truncated or ill-formed, or a data file is missing, too short or
                outside the model's folder.
        """
        path = Path(path)
        _LOG.info("reading %s", path)
        proto, digest = _read_proto(path)
        notes = check(proto, path)
        try:
            model = ir.from_proto(proto)
        except Exception as error:  # onnx_ir raises many types for ill-formed protos
            raise ModelError(f"{path}: ill-formed ONNX graph ({one_line(error)}); re-export the model") from error
        loaded = cls(model, path, digest, notes)
        for tensor in loaded.external_tensors():
            tensor.base_dir = path.parent
            external.check_external(tensor, path)
        loaded._follow_hub_links()
        loaded.lift_constants()
        loaded._drop_initializer_inputs()
        loaded._forget_unknown_names()
        loaded._sort()
        return loaded

    def _follow_hub_links(self) -> None:
        """Let weights behind the links of a Hugging Face cache refer to the links' targets.

        onnx_ir follows no link that leaves the folder.
        """
        for value, tensor in self.weights():
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = _real(tensor)
        for attributes, name, tensor in self.external_attributes():
            attributes[name] = ir.AttrTensor(name, _real(tensor))

    def lift_constants(self) -> None:
        """Turn Constant nodes that hold a weight into initializers, in subgraphs too.

        All weights are then initializers. A weight is a tensor in a data file, a floating-point tensor of two or more
        elements, or a tensor of more than 1 KiB. Scalars and texts stay. So does a constant that is a graph output.
        """
        for graph in self.ir.graphs():
            for node in list(graph):
                attribute = (
                    node.attributes.get("value")
                    if node.op_type == "Constant" and node.domain in ("", "ai.onnx")
                    else None
                )
                if (
                    attribute is not None
                    and attribute.type == ir.AttributeType.TENSOR
                    and _is_weight(attribute.as_tensor())
                ):
                    self._lift(graph, node, attribute.as_tensor())

    def _lift(self, graph: onnx_ir.Graph, node: onnx_ir.Node, tensor: onnx_ir.TensorProtocol) -> None:
        old = node.outputs[0]
        if old.is_graph_output():
            return
        name, old.name = old.name or "constant", f"{old.name}__node"
        tensor.name = name
        new = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(tensor.shape.numpy())), const_value=tensor
        )
        graph.register_initializer(new)
        ir.convenience.replace_all_uses_with(old, new)
        graph.remove(node)

    def _drop_initializer_inputs(self) -> None:
        """Turn initializers that are graph inputs too into constants, if the IR version is below 4.

        IR < 4 forced every initializer to be an input. In a newer model, callers may override such an initializer.
        """
        both = [value for value in self.ir.graph.inputs if value.name in self.ir.graph.initializers]
        if both and (self.ir.ir_version or 0) >= 4:
            self.notes.append(
                f"{len(both)} initializers are graph inputs too ({both[0].name!r} first): callers may override them, "
                "so they are left alone"
            )
        elif both:
            from onnx_ir.passes.common import RemoveInitializersFromInputsPass

            RemoveInitializersFromInputsPass()(self.ir)
            self.notes.append(
                f"{len(both)} initializers were listed as graph inputs (IR {self.ir.ir_version}); they are constants "
                "now, and the IR version is 4"
            )
            self.ir.ir_version = 4

    def _forget_unknown_names(self) -> None:
        """Let dimensions that an exporter calls unknown be so: one name would make one size of all of them."""
        for graph in self.ir.graphs():
            values = [*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)]
            for value in values:
                dims = list(value.shape or ())
                if any(isinstance(dim, ir.SymbolicDim) and dim.value in _UNKNOWN for dim in dims):
                    self.unnamed = True
                    known = [None if isinstance(d, ir.SymbolicDim) and d.value in _UNKNOWN else d for d in dims]
                    value.shape = ir.Shape(known)

    def _sort(self) -> None:
        try:
            self.ir.graph.sort()
        except ValueError as error:
            raise ModelError(
                f"{self.path}: the graph has a cycle through {_cycle_node(self.ir.graph)}; an ONNX graph must be "
                "acyclic"
            ) from error

    @property
    def graph(self) -> onnx_ir.Graph:
        """The main graph."""
        return self.ir.graph

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return int(self.ir.opset_imports.get("", 1))

    def weights(self) -> Iterator[tuple[onnx_ir.Value, onnx_ir.TensorProtocol]]:
        """Yields (value, tensor) of every initializer, those of subgraphs included."""
        return external.weights(self.ir)

    def nodes_everywhere(self) -> Iterator[onnx_ir.Node]:
        """Yields every node, those of subgraphs and functions included."""
        return external.nodes(self.ir)

    def external_attributes(self) -> Iterator[ExternalAttribute]:
        """See `storage.external.external_attributes`."""
        return external.external_attributes(self.ir)

    def external_tensors(self) -> Iterator[onnx_ir.ExternalTensor]:
        """Yields every tensor in a data file: initializers and attributes."""
        return external.external_tensors(self.ir)

    def weight_bytes(self) -> int:
        """Returns the bytes of all initializers."""
        return sum(tensor.nbytes for _, tensor in self.weights())

    def proto(self) -> onnx.ModelProto:
        """Returns the graph as ONNX's own message. Weights in memory are evaluated, external ones stay references.

        Raises:
            OnnxtoolsError: a weight cannot be computed.
        """
        return to_proto(self.ir, self.path)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        copy_weights: bool = False,
        weights: bool = True,
        beside: Beside | None = None,
    ) -> SaveReport:
        """Write the graph to `path` atomically; see `onnxtools.storage.save.save`."""
        return save(self.ir, Path(path), origin=self.path, copy_weights=copy_weights, weights=weights, beside=beside)


def _is_weight(tensor: ir.TensorProtocol) -> bool:
    floating = tensor.dtype.is_floating_point() and tensor.size > 1
    return isinstance(tensor, ir.ExternalTensor) or (
        tensor.dtype != ir.DataType.STRING and (floating or tensor.nbytes > 1024)
    )


def _read_proto(path: Path) -> tuple[onnx.ModelProto, str]:
    try:
        if path.is_dir():
            raise ModelError(f"{path}: is a folder; name the .onnx file in it")
        check_regular(path, ModelError)
        if (size := path.stat().st_size) >= MAX_PROTO_BYTES:
            raise ModelError(
                f"{path}: has {size} bytes, and no ONNX graph can have more than {MAX_PROTO_BYTES}; keep its weights "
                "in a data file"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{absent(path)}: no such file; check the path") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception:
        raise ModelError(
            f"{path}: not an ONNX file, or a truncated one ({len(data)} bytes); export or copy it again"
        ) from None
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{path}: not an ONNX model, or an empty one: it has no nodes and no outputs; export it again")
    if not proto.opset_import:
        raise ModelError(f"{path}: imports no operator set, so its nodes have no meaning; export it again")
    return proto, hashlib.sha256(data).hexdigest()


def _cycle_node(graph: ir.Graph) -> str:
    """Returns the name of a node on or behind a cycle: Kahn's algorithm leaves exactly these nodes."""
    waiting = {
        node: {i.producer() for i in node.inputs if i is not None and i.producer() is not None} for node in graph
    }
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


def _real(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    """Returns `tensor`, or one that refers to the target of a link that `check_external` accepted."""
    file = external_path(tensor)
    if not file.is_symlink():
        return tensor
    real = file.resolve()
    return ir.ExternalTensor(
        real.name,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=real.parent,
    )


def load(path: str | os.PathLike[str]) -> Model:
    """Reads the graph file `path` (`Model.load`). No weight in a data file is read.

    Raises:
        ModelError: the file is not ONNX, is truncated or ill-formed, or a data file is missing, too short or outside
            the model's folder.
    """
    return Model.load(path)


def file_stamps(path: Path) -> list[list[str | int]]:
    """Returns [name, size in bytes, modification time in ns] of each file of a model. Hashing would read the files.

    Args:
        path: a graph (its data files are included), a folder (all its files), or another file.
    """
    files = [path]
    if path.suffix == ".onnx":
        files += sorted({external_path(tensor) for tensor in Model.load(path).external_tensors()})
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
