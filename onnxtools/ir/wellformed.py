"""Checks that an ONNX file is well-formed before it is used; each refusal names the object.

onnx_ir and ONNX Runtime take much for granted. This module visits every message of the file once and reads no weight.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from onnxtools.base.errors import ModelError, one_line

_LONGEST_NAME = 255
"""Longest file name, in bytes (POSIX file systems)."""
_MAX_ELEMENTS = 1 << 62
_MAX_EXPANDED = 5_000_000
"""Most nodes of a model after its functions are inlined: far above any model, and a few seconds' work."""
_TENSOR_TYPES = set(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED}
_BITS = {
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32), **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    "COMPLEX128": 128,
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4), **dict.fromkeys(("INT2", "UINT2"), 2),
}  # fmt: skip
"""Bits of an element; 8 if the type is not listed. Strings have no width."""
_FIELDS = {
    "int32_data": ("INT32", "INT16", "INT8", "UINT16", "UINT8", "BOOL", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN",
        "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ",
                   "FLOAT8E8M0", "INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2"),
    "float_data": ("FLOAT", "COMPLEX64"), "double_data": ("DOUBLE", "COMPLEX128"), "int64_data": ("INT64",),
    "uint64_data": ("UINT64", "UINT32"),
    "string_data": ("STRING",),
}  # fmt: skip
"""The field that holds the elements of each type unless they are raw bytes (onnx.proto)."""


def check(proto: onnx.ModelProto, path: Path) -> list[str]:
    """Refuse an invalid model, and repair harmless faults in `proto`.

    Args:
        proto: the model; it is changed in place.
        path: the file, for errors.

    Returns:
        One line for each kind of repair.

    Raises:
        ModelError: names the object.
    """
    try:
        _check_texts(proto)
        _check_opsets(proto, path)
        notes = _check_names(proto, path)
        opset = _default_opset(proto.opset_import)
        for graph in _graphs(proto.graph, path):
            _check_graph(graph, path, opset)
        for function in proto.functions:
            _check_nodes(function.node, path, _default_opset(function.opset_import) or opset, inside_function=True)
        _check_expansion(proto, path)
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path}: holds a text that is not UTF-8 ({error.reason}); the file is damaged, export or copy it again"
        ) from None
    unknown = sum(
        _forget_negative_sizes(value)
        for graph in _graphs(proto.graph, path)
        for value in (*graph.input, *graph.output, *graph.value_info)
    )
    return [*notes, *([f"{unknown} negative sizes of values are taken as unknown"] if unknown else [])]


def _check_texts(message: Message) -> None:
    """Check that every text is UTF-8. protobuf returns any other text as bytes, or raises when it is read.

    Raises:
        UnicodeDecodeError: for the first text that is not UTF-8.
    """
    if isinstance(message, onnx.TensorProto):  # its other fields may hold gigabytes, and reading them copies them
        texts: list[Any] = [
            message.name,
            message.doc_string,
            *(text for entry in message.external_data for text in (entry.key, entry.value)),
        ]
    else:
        texts = []
        for field, value in message.ListFields():
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                for inner in value if field.is_repeated else (value,):
                    _check_texts(inner)
            elif field.type == FieldDescriptor.TYPE_STRING:
                texts += value if field.is_repeated else [value]
    for text in texts:
        if isinstance(text, bytes):
            text.decode()


def fault(path: Path) -> str:
    """Returns the error of onnx.checker or of onnx's strict shape inference on one line, or "" if there is none.

    It reads the whole file and takes seconds on a large one, so it is meant for a file that another library refused.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # of several libraries
        message = one_line(error, 2000)
        if re.search(r"Field '(shape|type)' of '\w+' is required", message):
            return ""  # outputs need no recorded type or shape to run
        return message[:200] or type(error).__name__
    return ""


def _graphs(graph: onnx.GraphProto, path: Path) -> Iterator[onnx.GraphProto]:
    """Yields the graph and the graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner, path)


def _check_opsets(proto: onnx.ModelProto, path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    for entry in (*proto.opset_import, *(entry for function in proto.functions for entry in function.opset_import)):
        default = entry.domain in ("", "ai.onnx")
        if entry.version < 1 or (default and entry.version > newest):
            raise ModelError(
                f"{path}: imports version {entry.version} of operator set {entry.domain or 'ai.onnx'!r}; 1 to {newest} "
                "are known, export it again"
            )


def _default_opset(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    return next((int(entry.version) for entry in imports if entry.domain in ("", "ai.onnx")), 0)


def _check_graph(graph: onnx.GraphProto, path: Path, opset: int) -> None:
    _check_nodes(graph.node, path, opset, inside_function=False)
    for tensor in graph.initializer:
        check_tensor(tensor, path)
    for sparse in graph.sparse_initializer:
        check_tensor(sparse.values, path)
        check_tensor(sparse.indices, path)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if not _is_known(value.type):
            raise ModelError(
                f"{path}: the value {value.name!r} has an element type that ONNX does not know; export the model again"
            )


def _is_known(kind: onnx.TypeProto) -> bool:
    """Whether the element types in a type are ONNX's. A missing type is left to inference."""
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        return getattr(kind, which).elem_type in (*_TENSOR_TYPES, 0)
    if which in ("sequence_type", "optional_type"):
        return _is_known(getattr(kind, which).elem_type)
    return which != "map_type" or kind.map_type.key_type in _TENSOR_TYPES


def _check_nodes(nodes: Iterable[onnx.NodeProto], path: Path, opset: int, *, inside_function: bool) -> None:
    for node in nodes:
        if not node.op_type:
            raise ModelError(f"{path}: node {node.name!r} names no operator; export the model again")
        seen: set[str] = set()
        for attribute in node.attribute:
            where = f"{path}: attribute {attribute.name!r} of node {node.name!r} ({node.op_type})"
            if not attribute.name or attribute.name in seen:
                raise ModelError(
                    f"{where} {'stands there twice' if attribute.name else 'has no name'}; export the model again"
                )
            seen.add(attribute.name)
            if attribute.ref_attr_name and not inside_function:
                raise ModelError(
                    f"{where} refers to an attribute of a function, but is in none; export the model again"
                )
            if not attribute.ref_attr_name and not _is_complete(attribute):
                raise ModelError(f"{where} has no value of its type; the file is damaged, export the model again")
            for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
                check_tensor(tensor, path)
        if opset and node.domain in ("", "ai.onnx"):
            _check_signature(node, opset, path)


@functools.cache
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    """Returns ONNX's definition, or None if ONNX has no such operator (exporters put plugins into its domain)."""
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _check_signature(node: onnx.NodeProto, opset: int, path: Path) -> None:
    """Check a node against ONNX's definition: attribute types, required attributes, numbers of inputs and outputs."""
    schema = _schema(node.op_type, opset)
    if schema is None:
        return
    where = f"{path}: node {node.name!r} ({node.op_type}, opset {opset})"
    attribute_types = {attribute.name: int(attribute.type) for attribute in node.attribute}
    for name, kind in attribute_types.items():
        if name in schema.attributes and kind != schema.attributes[name].type.value:  # type: ignore[attr-defined]
            expected = schema.attributes[name].type.name  # type: ignore[attr-defined]
            raise ModelError(
                f"{where}: attribute {name!r} is no {expected}, as the operator takes it; export the model again"
            )
    missing = next(
        (name for name, attribute in schema.attributes.items() if attribute.required and name not in attribute_types),
        None,
    )
    if missing is not None:
        raise ModelError(f"{where}: has no attribute {missing!r}, which the operator needs; export the model again")
    if (
        not schema.min_input <= len(node.input) <= schema.max_input
        or not schema.min_output <= len(node.output) <= schema.max_output
    ):
        counts = f"{len(node.input)} inputs and {len(node.output)} outputs"
        raise ModelError(
            f"{where}: has {counts}, and the operator takes {schema.min_input} and {schema.min_output} or more; export "
            "the model again"
        )


_VALUE_FIELDS = {
    onnx.AttributeProto.FLOAT: "f", onnx.AttributeProto.INT: "i", onnx.AttributeProto.STRING: "s",
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g", onnx.AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    onnx.AttributeProto.TYPE_PROTO: "tp",
}  # fmt: skip
"""The field of AttributeProto that holds the value, by type. The fields of lists may be empty."""


def _is_complete(attribute: onnx.AttributeProto) -> bool:
    """Whether the attribute has a type and, if that is the type of a single value, the value."""
    if (
        attribute.type == onnx.AttributeProto.UNDEFINED
        or attribute.type not in onnx.AttributeProto.AttributeType.values()
    ):
        return False
    field = _VALUE_FIELDS.get(attribute.type)
    # proto3 writers omit numbers that are zero and texts that are empty
    return field is None or field in ("f", "i", "s") or attribute.HasField(field)


def check_tensor(tensor: onnx.TensorProto, path: Path) -> None:
    """Refuse a tensor whose type, sizes and elements do not fit together. No data file is opened.

    Raises:
        ModelError: names the tensor.
    """
    where = f"{path}: tensor {tensor.name!r}"
    if tensor.data_type not in _TENSOR_TYPES:
        raise ModelError(
            f"{where} has the element type {tensor.data_type}, which ONNX does not know; the file is damaged, export "
            "the model again"
        )
    count = math.prod(tensor.dims)
    if any(size < 0 for size in tensor.dims) or count > _MAX_ELEMENTS:
        raise ModelError(f"{where} has the shape {list(tensor.dims)[:8]}; the file is damaged, export the model again")
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    if tensor.HasField("segment"):
        raise ModelError(f"{where} is stored in segments, which nobody reads; export the model again")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_place(tensor, where, kind)
    elif tensor.HasField("raw_data"):
        needed = -(-count * _BITS.get(kind, 8) // 8)
        if kind == "STRING" or len(tensor.raw_data) != needed:
            raise ModelError(
                f"{where} has {len(tensor.raw_data)} bytes and its shape {list(tensor.dims)} needs {needed}; the file "
                "is damaged, export it again"
            )
    else:
        _check_elements(tensor, where, kind, count)


def _check_place(tensor: onnx.TensorProto, where: str, kind: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    numbers = (entries.get("offset", "0"), entries.get("length", "0"))
    too_long = max(len(part.encode(errors="replace")) for part in location.split("/")) > _LONGEST_NAME
    if (
        not location
        or too_long
        or "\0" in location
        or kind == "STRING"
        or not all(text.isascii() and text.isdigit() and len(text) < 19 for text in numbers)
    ):
        place = f"{location[:60]!r}, offset and length {', '.join(numbers)[:40]}"
        raise ModelError(f"{where} has an ill-formed place in a data file ({place}); export the model again")


def _check_elements(tensor: onnx.TensorProto, where: str, kind: str, count: int) -> None:
    field = next(name for name, kinds in _FIELDS.items() if kind in kinds)
    bits = _BITS.get(kind, 8)
    per_entry = 8 // bits if bits < 8 else 1
    needed = 2 * count if kind.startswith("COMPLEX") else -(-count // per_entry)
    stored = len(getattr(tensor, field))
    if stored != needed:
        raise ModelError(
            f"{where} has {stored} elements and its shape {list(tensor.dims)} needs {needed}; the file is damaged, "
            "export the model again"
        )


def _forget_negative_sizes(value: onnx.ValueInfoProto) -> int:
    """Clear negative sizes: older exporters write -1 for an unknown size. Returns the number of cleared sizes."""
    if value.type.WhichOneof("value") != "tensor_type":
        return 0
    dims = [dim for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value") and dim.dim_value < 0]
    for dim in dims:
        dim.ClearField("dim_value")
    return len(dims)


def _check_expansion(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse functions that call themselves, or that exceed `_MAX_EXPANDED` nodes when they are inlined."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    sizes: dict[tuple[str, str, str], int] = {}
    waiting: set[tuple[str, str, str]] = set()

    def size(key: tuple[str, str, str]) -> int:
        if key not in sizes:
            if key in waiting:
                raise ModelError(f"{path}: the function {key[1]!r} calls itself; export the model again")
            waiting.add(key)
            sizes[key] = total(functions[key].node)
            waiting.discard(key)
        return sizes[key]

    def total(nodes: Iterable[onnx.NodeProto]) -> int:
        count = 0
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            count += size(key) if key in functions else 1
            for attribute in node.attribute:
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    count += total(inner.node)
        return count

    try:
        expanded = total(proto.graph.node) if functions else 0
    except RecursionError:
        raise ModelError(
            f"{path}: its functions are nested too deeply to be inlined; inline them with onnx.inliner first"
        ) from None
    if expanded > _MAX_EXPANDED:
        raise ModelError(
            f"{path}: its functions come to more than {_MAX_EXPANDED} nodes when they are inlined; export the model "
            "again"
        )


# --- names ------------------------------------------------------------------------------------------------------------


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
        node.name = node.name or f"{node.op_type}_{index}"  # errors, checks and TensorRT all identify nodes by name
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain not in domains and not (domain == "" and "ai.onnx" in domains):
            raise ModelError(
                f"{path}: node {node.name!r} is {node.domain}::{node.op_type} but the model imports no domain "
                f"{node.domain!r}; add the opset import"
            )
        for name in node.output:
            if name in defined:
                raise ModelError(
                    f"{path}: value {name!r} of node {node.name!r} is already defined by {defined[name]}; names must "
                    "be unique"
                )
            if name:
                defined[name] = f"node {node.name!r}"
        if node.name in node_names:
            node.name, renamed = _unique(node.name, node_names), renamed + 1
        node_names.add(node.name)
    _check_defined(proto.graph, set(), path)
    return [f"{renamed} nodes shared a name with another; given unique names"] if renamed else []


def _check_defined(graph: onnx.GraphProto, outer: set[str], path: Path) -> None:
    """Refuse uses of values that nothing defines, in the graph and its subgraphs."""
    defined = (
        outer
        | {v.name for v in graph.input}
        | {t.name for t in graph.initializer}
        | {t.values.name for t in graph.sparse_initializer}
    )
    defined |= {name for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            if name and name not in defined:
                raise ModelError(
                    f"{path}: node {node.name!r} ({node.op_type}) uses the value {name!r}, which nothing defines; "
                    "export the model again"
                )
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _check_defined(inner, defined, path)
    for value in graph.output:
        if value.name not in defined:
            raise ModelError(f"{path}: nothing defines the output {value.name!r}; export the model again")


def _unique(name: str, names: set[str]) -> str:
    index = 1
    while f"{name}_{index}" in names:
        index += 1
    return f"{name}_{index}"
