"""Finds the tensors of an onnx_ir model, initializers and attributes, and checks those in data files."""

from __future__ import annotations

import stat
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxtools.base.errors import ModelError
from onnxtools.storage.rows import external_path

ExternalAttribute = tuple[MutableMapping[str, Any], str, ir.ExternalTensor]
"""The attributes of a node or function, the name of one of them, and its tensor."""


def weights(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Yields (value, tensor) of every initializer, those of subgraphs included."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yields every node, those of subgraphs and functions included."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _attributes(model: ir.Model) -> Iterator[MutableMapping[str, Any]]:
    """Yields the attributes of every node, and the default attributes of every function."""
    yield from (node.attributes for node in nodes(model))
    yield from (function.attributes for function in model.functions.values())


def external_attributes(model: ir.Model) -> Iterator[ExternalAttribute]:
    """Yields every attribute whose tensor lies in a data file, in subgraphs, functions and their defaults too."""
    for attributes in _attributes(model):
        for name, attribute in list(attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                yield attributes, name, attribute.value


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yields every tensor in a data file: initializers and attributes (TENSOR and TENSORS)."""
    for _, tensor in weights(model):
        if isinstance(tensor, ir.ExternalTensor):
            yield tensor
    for _, _, tensor in external_attributes(model):
        yield tensor
    for attributes in _attributes(model):
        for attribute in attributes.values():
            if attribute.type == ir.AttributeType.TENSORS:
                yield from (tensor for tensor in attribute.value if isinstance(tensor, ir.ExternalTensor))


def check_external(tensor: ir.ExternalTensor, model_path: Path) -> None:
    """Refuse a tensor whose data file is missing, too short, no regular file, a link, or outside the model's folder.

    The rules are onnx's own: onnx and onnx_ir refuse a data file behind a link or outside the folder. The links of a
    Hugging Face cache lead from `snapshots/REVISION/` into the `blobs/` of the same repository and are followed.

    Args:
        tensor: its `base_dir` is the model's folder.
        model_path: the graph file, for errors.

    Raises:
        ModelError: names the weight and its data file.
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
        raise ModelError(
            f"{where} at offset {offset} with length {length}, but its shape needs {tensor.nbytes} bytes; re-export "
            "the model"
        )
    if status.st_size < offset + length:
        raise ModelError(
            f"{where}, which ends at byte {status.st_size} but should reach {offset + length}; the file is truncated, "
            "copy it again"
        )


def hub_blob(link: Path) -> Path | None:
    """Returns the file that a link of a Hugging Face cache leads to, or None for any other link.

    huggingface_hub's layout: `REPOSITORY/snapshots/REVISION/NAME` is a link to `REPOSITORY/blobs/HASH`.
    """
    real = link.resolve()
    folder = link.parent.resolve()
    snapshots = next((parent for parent in (folder, *folder.parents) if parent.parent.name == "snapshots"), None)
    return real if snapshots is not None and real.parent == snapshots.parent.parent / "blobs" else None
