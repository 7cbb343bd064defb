"""Runs a graph on ONNX Runtime (CPU) to check a transform.

Speed is not the aim; `onnxtools.engines` is for speed.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxtools.analysis.opsets import reach_opset
from onnxtools.base.errors import JobError, one_line
from onnxtools.base.onnx_runtime import onnxruntime
from onnxtools.check.feeds import Array, Feeds
from onnxtools.check.sessions import open_session, session_options
from onnxtools.ir.model import Model
from onnxtools.ir.part import part
from onnxtools.storage.rows import RowTensor, elements

IN_MEMORY_LIMIT = 1_500_000_000
REFERENCE_LIMIT = 64 << 20
_BF16 = onnx.TensorProto.BFLOAT16
_F32 = onnx.TensorProto.FLOAT


class Runner:
    """A graph that is loaded once and run on feeds.

    `trt::` operators run as ONNX functions that follow their definition. ONNX Runtime's CPU provider does not compute
    in bfloat16: such values are computed in float32, and `notes` says so. If ONNX Runtime has no kernel for an
    operator, a small model runs on onnx.reference.

    Args:
        model: the model whose main graph is run.
        only: names of the values to return; nodes that they do not need are not loaded. None for the graph's outputs.
        rows: load only the first so many rows of embedding tables; used with `only`.
        seconds: a run that takes longer is ended.

    Attributes:
        notes: how the computation differs from the graph, a line each.
        inputs: `onnx.ValueInfoProto` by name.
        outputs: names in the graph's order.

    Raises:
        JobError: the graph cannot be loaded, or too many changed weights are in memory.
    """

    def __init__(
        self, model: Model, only: Sequence[str] | None = None, *, rows: int | None = None, seconds: float | None = None
    ) -> None:
        self.notes: list[str] = []
        self._seconds = seconds
        proto = _runnable(model, self.notes, only, rows)
        self.inputs = {value.name: value for value in proto.graph.input}
        self.outputs = [value.name for value in proto.graph.output]
        self._run = self._load(proto, model)

    def _load(self, proto: onnx.ModelProto, model: Model) -> Any:
        ort = onnxruntime()
        options = session_options(folder=model.path.parent if model.path is not None else None)
        self._mapped = _map_foreign(options, proto, model)  # ONNX Runtime reads the arrays in place
        data = proto.SerializeToString()
        try:
            session = open_session(data, options=options, qdq_as_written=True)
        except Exception as error:
            if "NOT_IMPLEMENTED" in str(error) and model.weight_bytes() <= REFERENCE_LIMIT:
                self.notes.append("ONNX Runtime has no kernel for part of the graph; computed by onnx.reference")
                return self._reference(proto)
            raise JobError(f"ONNX Runtime cannot load the graph: {one_line(error)}") from error
        types = {value.name: value.type for value in session.get_inputs()}

        def run(feeds: Feeds) -> list[Array]:
            values = {name: ort_value(feeds[name], types[name]) for name in types}
            limit = ort.RunOptions()
            timer = (
                threading.Timer(self._seconds, lambda: setattr(limit, "terminate", True))
                if self._seconds is not None
                else None
            )
            if timer is not None:
                timer.daemon = True
                timer.start()
            try:
                results = session.run_with_ort_values(None, values, limit)
            except Exception as error:
                if limit.terminate:
                    raise JobError(f"the graph ran for more than {self._seconds:g} s, so it was ended") from None
                raise JobError(f"ONNX Runtime failed on the graph: {one_line(error)}") from error
            finally:
                if timer is not None:
                    timer.cancel()
            return [to_numpy(value) for value in results]

        return run

    def _reference(self, proto: onnx.ModelProto) -> Any:
        from onnx.reference import ReferenceEvaluator

        try:
            evaluator = ReferenceEvaluator(proto)
        except (NotImplementedError, RuntimeError) as error:
            raise JobError(
                f"neither ONNX Runtime nor onnx.reference runs the graph (NOT_IMPLEMENTED): {one_line(error)}"
            ) from error

        def run(feeds: Feeds) -> list[Array]:
            try:
                return [np.asarray(value) for value in evaluator.run(None, {name: feeds[name] for name in self.inputs})]
            except NotImplementedError as error:
                raise JobError(
                    f"neither ONNX Runtime nor onnx.reference runs the graph (NOT_IMPLEMENTED): {one_line(error)}"
                ) from error

        return run

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph and return its outputs by name.

        Args:
            feeds: arrays by input name; other names are ignored.

        Raises:
            JobError: an input is missing, the run took longer than `seconds`, or the runtime failed.
        """
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise JobError(f"no data for the graph's input {missing[0]!r}; add it to the inputs file")
        return dict(zip(self.outputs, self._run(dict(feeds)), strict=True))


def ort_value(array: Array, type_name: str) -> Any:
    """Returns `array` as an `onnxruntime.OrtValue`, without a copy if it is contiguous.

    The array must then live as long as the value.

    Args:
        array: bfloat16 and float8 arrays may have any dtype of the same size.
        type_name: ONNX Runtime's name of the type, such as tensor(float), or ONNX's in lower case.
    """
    ort = onnxruntime()
    if "float8e4m3fn" in type_name:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            np.ascontiguousarray(array).view(np.uint8), onnx.TensorProto.FLOAT8E4M3FN
        )
    if "bfloat16" in type_name:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            np.ascontiguousarray(array).view(np.uint16), onnx.TensorProto.BFLOAT16
        )
    return ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))  # ascontiguousarray makes [1] of a scalar


def to_numpy(value: Any) -> Array:
    """Returns an `onnxruntime.OrtValue` as an array; FLOAT8E4M3FN as ml_dtypes.float8_e4m3fn."""
    array = value.numpy()
    if "float8e4m3fn" in value.data_type():  # ONNX Runtime returns the bytes
        import ml_dtypes

        return array.view(ml_dtypes.float8_e4m3fn)  # type: ignore[no-any-return]
    return array  # type: ignore[no-any-return]


def _map_foreign(options: Any, proto: onnx.ModelProto, model: Model) -> list[Array]:
    """Pass the weights outside the graph's folder (in a Hugging Face cache) to ONNX Runtime from memory.

    ONNX Runtime reads data files from one folder only. The returned arrays must live as long as the session.
    """
    folder = model.path.parent.resolve() if model.path is not None else None
    external_names = {
        tensor.name for tensor in proto.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    names, arrays = [], []
    for value, tensor in model.weights():
        if (
            value.name in external_names
            and isinstance(tensor, ir.ExternalTensor)
            and Path(tensor.base_dir).resolve() != folder
        ):
            names.append(value.name)
            arrays.append(np.ascontiguousarray(elements(tensor)))
    if names:
        kinds = {
            tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type).lower() for tensor in proto.graph.initializer
        }
        options.add_external_initializers(
            names, [ort_value(array, kinds[name]) for name, array in zip(names, arrays, strict=True)]
        )
    return arrays


def _runnable(
    model: Model, notes: list[str], only: Sequence[str] | None = None, rows: int | None = None
) -> onnx.ModelProto:
    """Returns a proto that ONNX Runtime takes: functions for `trt::`, no stale types, float32 for bfloat16.

    With `only`, it is the part of the graph that computes these values.
    """
    if only is not None:
        proto = part(model, only, rows=rows)
        return _as_it_runs(proto, model, notes)
    streamed = sum(t.nbytes for _, t in model.weights() if isinstance(t, RowTensor))
    if streamed > IN_MEMORY_LIMIT:
        raise JobError(
            f"{streamed / 1e9:.1f} GB of changed weights are not on disk yet; save the model, then validate the files"
        )
    return _as_it_runs(model.proto(), model, notes)


def _as_it_runs(proto: onnx.ModelProto, model: Model, notes: list[str]) -> onnx.ModelProto:
    uses_te = any(node.domain == "trt" for node in model.graph.all_nodes())
    if uses_te:
        proto = _with_te_functions(proto, model)
    del proto.graph.value_info[:]
    if any(i.data_type == _BF16 for i in proto.graph.initializer) or any(
        _elem_type(v) == _BF16 for v in (*proto.graph.input, *proto.graph.output)
    ):
        _bf16_as_fp32(proto, model)
        notes.append("bfloat16 is computed as float32 (ONNX Runtime's CPU provider has no bfloat16 kernels)")
    return proto


def _with_te_functions(proto: onnx.ModelProto, model: Model) -> onnx.ModelProto:
    from onnxtools.check.te_functions import functions

    version = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if version < 19:  # float8 begins at opset 19
        copy = Model(ir.from_proto(proto), model.path)
        if model.path is not None:
            ir.external_data.set_base_dir(copy.graph, model.path.parent)
        reach_opset(copy, 19)
        proto, version = copy.proto(), 19
    _retype_fp8_bytes(proto)
    proto.functions.extend(functions(version))
    return proto


def _retype_fp8_bytes(proto: onnx.ModelProto) -> None:
    """Change the type of uint8 initializers that feed a dequantize: they hold FP8 bytes (fp8_model_init)."""
    read = {
        node.input[0] for node in proto.graph.node if node.domain == "trt" and node.op_type == "TRT_FP8DequantizeLinear"
    }
    for initializer in proto.graph.initializer:
        if initializer.name in read and initializer.data_type == onnx.TensorProto.UINT8:
            raw = onnx.numpy_helper.to_array(initializer).tobytes()
            initializer.CopyFrom(
                onnx.TensorProto(
                    name=initializer.name, data_type=onnx.TensorProto.FLOAT8E4M3FN, dims=initializer.dims, raw_data=raw
                )
            )


def _elem_type(value: onnx.ValueInfoProto) -> int:
    return int(value.type.tensor_type.elem_type)


def _bf16_as_fp32(proto: onnx.ModelProto, model: Model) -> None:
    tensors = {value.name: tensor for value, tensor in model.weights()}
    for initializer in proto.graph.initializer:
        if initializer.data_type == _BF16:
            tensor = tensors[initializer.name]
            array = elements(tensor)[: initializer.dims[0]] if initializer.dims else elements(tensor)
            array = array.astype(np.float32)
            initializer.CopyFrom(onnx.numpy_helper.from_array(array, initializer.name))
    for value in (*proto.graph.input, *proto.graph.output):
        if _elem_type(value) == _BF16:
            value.type.tensor_type.elem_type = _F32
    for node in proto.graph.node:
        widen_node(node, {_BF16})


def widen_node(node: onnx.NodeProto, types: Container[int]) -> None:
    """Change element types in the attributes of `node` to float32: those of outputs, and those of its tensors.

    Args:
        node: the node to change.
        types: the `onnx.TensorProto.DataType` to replace.
    """
    for attribute in node.attribute:
        if attribute.name in ("to", "output_dtype", "dtype") and attribute.i in types:
            attribute.i = _F32
        if attribute.HasField("t") and attribute.t.data_type in types:
            attribute.t.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(attribute.t).astype(np.float32))
            )
