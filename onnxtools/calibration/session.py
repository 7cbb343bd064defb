"""Runs one segment of a graph as a session of ONNX Runtime, in float32, with its weights as inputs.

ONNX Runtime does not fold, pack or convert weights that are inputs. A segment therefore needs the memory of its float32
weights once, and a changed weight needs no new session. float16 and bfloat16 are computed in float32: the CPU has no
kernels for them, and their rounding should not affect calibration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxtools.base.errors import JobError, one_line
from onnxtools.calibration.segments import Segment, outer_inputs
from onnxtools.check.feeds import Array, Feeds
from onnxtools.check.runner import ort_value, to_numpy, widen_node
from onnxtools.check.sessions import open_session, session_options
from onnxtools.ir.model import MAX_IR_VERSION, Model
from onnxtools.ir.query import constant_tensor, is_op
from onnxtools.storage.rows import elements, external_path

_NARROW = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_NARROW_TYPES = {dtype.value for dtype in _NARROW}
_FLOAT = onnx.TensorProto.FLOAT
_SMALL = 4096
"""Most elements of a constant that becomes an initializer of the segment; larger ones become inputs."""


class SegmentSession:
    """A session that runs `segment` on the CPU.

    Args:
        model: the model of the segment.
        segment: the segment to run.
        received_types: ONNX element types (`onnx.TensorProto.DataType`) of the values that it receives.
        wanted: the values to return.

    Raises:
        JobError: ONNX Runtime cannot load the segment.
    """

    def __init__(
        self, model: Model, segment: Segment, received_types: Mapping[ir.Value, int], wanted: Sequence[ir.Value]
    ) -> None:
        self._segment, self.wanted = segment, list(wanted)
        self._weights: dict[ir.Value, str] = {}
        self._tables: set[ir.Value] = set()
        self._session = _load(self._proto(model, received_types), segment.nodes[0].name or "")
        self._types = {value.name: value.type for value in self._session.get_inputs()}
        self._ort_weights: dict[str, tuple[Any, Any]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the weights again, so that the next run uses the changed ones."""
        self._ort_weights = {}
        for value, name in self._weights.items():
            array = self._stored(value)
            self._ort_weights[name] = (array, ort_value(array, self._types[name]))

    def _stored(self, value: ir.Value) -> Array:
        tensor = constant_tensor(value)
        assert tensor is not None
        shape = tensor.shape.numpy()
        if value in self._tables and isinstance(tensor, ir.ExternalTensor):
            # A memory map reads only the rows in use.
            return np.memmap(external_path(tensor), tensor.dtype.numpy(), "r", tensor.offset or 0, tuple(shape))
        array = elements(tensor)
        return array.astype(np.float32) if tensor.dtype in _NARROW and value not in self._tables else array

    def __call__(self, feeds: Feeds, received: Mapping[str, Array]) -> dict[ir.Value, Array]:
        """Run the segment once.

        Args:
            feeds: arrays by the name of the graph input; other names are ignored.
            received: arrays by the name of the received value.

        Returns:
            The arrays of the values `wanted`.

        Raises:
            JobError: ONNX Runtime failed.
        """
        values = {name: ort_weight for name, (_, ort_weight) in self._ort_weights.items()}
        arrays = []  # ONNX Runtime reads the arrays in place
        for name, array in {**feeds, **received}.items():
            if name in self._types and name not in values:
                array = (
                    array.astype(np.float32) if self._types[name] == "tensor(float)" else np.asarray(array, order="C")
                )
                arrays.append(array)
                values[name] = ort_value(array, self._types[name])
        try:
            results = self._session.run_with_ort_values([value.name for value in self.wanted], values)
        except Exception as error:
            raise JobError(
                f"ONNX Runtime failed on a part of the graph that begins at node {self._segment.nodes[0].name!r}: "
                f"{one_line(error)}"
            ) from error
        return {value: to_numpy(result) for value, result in zip(self.wanted, results, strict=True)}

    # --- the graph ---------------------------------------------------------------------------------------------------

    def _proto(self, model: Model, received_types: Mapping[ir.Value, int]) -> onnx.ModelProto:
        inputs, constants = outer_inputs(self._segment)
        graph = onnx.GraphProto(name="segment")
        for value in inputs:
            assert value.dtype is not None
            graph.input.append(_info(value, _wide(value.dtype)))
        graph.input.extend(_info(value, received_types[value], shaped=False) for value in self._segment.received)
        for value in constants:
            self._add_constant(graph, value)
        for node in self._segment.nodes:
            if node.op_type == "Constant" and all(output in constants for output in node.outputs):
                continue
            proto = ir.serde.serialize_node(node)
            widen_node(proto, _NARROW_TYPES)
            graph.node.append(proto)
            if node.inputs and node.inputs[0] in self._tables:
                name, proto.output[0] = proto.output[0], f"{proto.output[0]}/narrow"
                graph.node[-1].output[0] = proto.output[0]
                graph.node.append(onnx.helper.make_node("Cast", [proto.output[0]], [name], to=_FLOAT))
        graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in self.wanted)
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.graph.opset_imports.items()]
        return onnx.ModelProto(
            ir_version=min(model.ir.ir_version or 10, MAX_IR_VERSION), graph=graph, opset_import=opsets
        )

    def _add_constant(self, graph: onnx.GraphProto, value: ir.Value) -> None:
        tensor, name = constant_tensor(value), value.name or ""
        assert tensor is not None
        if tensor.size <= _SMALL or tensor.dtype.itemsize < 1:
            graph.initializer.append(_embedded(tensor, name))
            return
        self._weights[value] = name
        if tensor.dtype in _NARROW and all(is_op(node, "Gather") and index == 0 for node, index in value.uses()):
            # A table whose rows are looked up keeps its type and stays on disk.
            self._tables.add(value)
            graph.input.append(_info(value, tensor.dtype.value))
        else:
            graph.input.append(_info(value, _wide(tensor.dtype)))


def _wide(dtype: ir.DataType) -> int:
    return _FLOAT if dtype in _NARROW else int(dtype.value)


def _info(value: ir.Value, element_type: int, *, shaped: bool = True) -> onnx.ValueInfoProto:
    shape = None
    if shaped and value.shape is not None:
        shape = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return onnx.helper.make_tensor_value_info(value.name or "", element_type, shape)


def _embedded(tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
    shape = tensor.shape.numpy()
    if tensor.dtype.itemsize < 1:
        return onnx.TensorProto(name=name, data_type=tensor.dtype.value, dims=shape, raw_data=tensor.tobytes())
    array = elements(tensor)
    return ir.serde.serialize_tensor(
        ir.Tensor(array.astype(np.float32) if tensor.dtype in _NARROW else array, name=name)
    )


def _load(proto: onnx.ModelProto, first: str) -> Any:
    try:
        return open_session(proto.SerializeToString(), options=session_options(spinning=False), qdq_as_written=True)
    except Exception as error:
        raise JobError(
            f"ONNX Runtime cannot load the part of the graph that begins at node {first!r}: {one_line(error)}"
        ) from error
