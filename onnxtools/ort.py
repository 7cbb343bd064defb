"""Running a graph on ONNX Runtime (CPU) to judge a transform. Speed is not the aim; see `onnxtools.engines` for that."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxtools.errors import JobError
from onnxtools.graph import constant_tensor, is_op
from onnxtools.infer import is_ids_like
from onnxtools.model import Model
from onnxtools.tensors import RowTensor

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]

IN_MEMORY_LIMIT = 1_500_000_000
REFERENCE_LIMIT = 64 << 20
BROKEN_OPTIMIZERS = ["ReluQuantRewrite", "ClipQuantRewrite"]
"""ONNX Runtime's rewrites that drop a Relu or Clip before QuantizeLinear, taking every zero point of 0 for an unsigned type's least value: wrong in FP8."""
BATCH, SEQUENCE = 2, 16
_BF16 = onnx.TensorProto.BFLOAT16
_F32 = onnx.TensorProto.FLOAT


class Runner:
    """One graph, loaded once, run on feeds.

    `trt::` operators run through their definition as ONNX functions. bfloat16, which ONNX Runtime's CPU provider does
    not compute in, is computed in float32: `notes` says so. What ONNX Runtime has no kernel for falls back on
    onnx.reference when the model is small.

    Args:
        extra_outputs: names of inner values to return as well.
        only: return just these values, so that nothing behind them is computed.
    """

    def __init__(self, model: Model, extra_outputs: Sequence[str] = (), only: Sequence[str] | None = None) -> None:
        self.notes: list[str] = []
        proto = _runnable(model, self.notes)
        if only is not None:
            del proto.graph.output[:]
        wanted = list(extra_outputs) if only is None else list(only)
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        self.inputs = {value.name: value for value in proto.graph.input}
        self.outputs = [value.name for value in proto.graph.output]
        self._run = self._load(proto, model)

    def _load(self, proto: onnx.ModelProto, model: Model) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        # ONNX Runtime's own Q/DQ fusions break FP8 around float32 MatMul (FACTS-te-nemo, 1.7).
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        if model.path is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.path.parent.resolve()))
        data = proto.SerializeToString()
        try:
            session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"], disabled_optimizers=BROKEN_OPTIMIZERS)
        except Exception as error:
            if "NOT_IMPLEMENTED" in str(error) and model.weight_bytes() <= REFERENCE_LIMIT:
                self.notes.append("ONNX Runtime has no kernel for part of the graph; computed by onnx.reference")
                return self._reference(proto)
            raise JobError(f"ONNX Runtime cannot load the graph: {one_line(error)}") from error
        types = {value.name: value.type for value in session.get_inputs()}

        def run(feeds: Feeds) -> list[Array]:
            values = {name: ort_value(feeds[name], types[name]) for name in types}
            try:
                results = session.run_with_ort_values(None, values)
            except Exception as error:
                raise JobError(f"ONNX Runtime failed on the graph: {one_line(error)}") from error
            return [to_numpy(value) for value in results]

        return run

    def _reference(self, proto: onnx.ModelProto) -> Any:
        from onnx.reference import ReferenceEvaluator

        try:
            evaluator = ReferenceEvaluator(proto)
        except (NotImplementedError, RuntimeError) as error:
            raise JobError(f"neither ONNX Runtime nor onnx.reference runs the graph (NOT_IMPLEMENTED): {one_line(error)}") from error

        def run(feeds: Feeds) -> list[Array]:
            try:
                return [np.asarray(value) for value in evaluator.run(None, {name: feeds[name] for name in self.inputs})]
            except NotImplementedError as error:
                raise JobError(f"neither ONNX Runtime nor onnx.reference runs the graph (NOT_IMPLEMENTED): {one_line(error)}") from error

        return run

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name.

        Raises:
            JobError: an input is missing, or the runtime failed.
        """
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise JobError(f"no data for the graph's input {missing[0]!r}; add it to the inputs file")
        return dict(zip(self.outputs, self._run(dict(feeds)), strict=True))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def ort_value(array: Array, type_name: str) -> Any:
    """`array` for ONNX Runtime, without a copy where it is contiguous; it must stay alive as long as the value."""
    import onnxruntime as ort

    if "float8e4m3fn" in type_name:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array).view(np.uint8), onnx.TensorProto.FLOAT8E4M3FN)
    if "bfloat16" in type_name:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array).view(np.uint16), onnx.TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def to_numpy(value: Any) -> Array:
    array = value.numpy()
    if "float8e4m3fn" in value.data_type():  # handed out as its bytes
        import ml_dtypes

        return array.view(ml_dtypes.float8_e4m3fn)  # type: ignore[no-any-return]
    return array  # type: ignore[no-any-return]


def _runnable(model: Model, notes: list[str]) -> onnx.ModelProto:
    """A proto that ONNX Runtime takes: functions for `trt::`, no stale types, float32 for bfloat16."""
    streamed = sum(t.nbytes for _, t in model.weights() if isinstance(t, RowTensor))
    if streamed > IN_MEMORY_LIMIT:
        raise JobError(f"{streamed / 1e9:.1f} GB of changed weights are not on disk yet; save the model, then validate the files")
    proto = model.proto()
    uses_te = any(node.domain == "trt" for node in model.graph.all_nodes())
    if uses_te:
        proto = _with_te_functions(proto, model)
    del proto.graph.value_info[:]
    if any(i.data_type == _BF16 for i in proto.graph.initializer) or any(_elem_type(v) == _BF16 for v in (*proto.graph.input, *proto.graph.output)):
        _bf16_as_fp32(proto, model)
        notes.append("bfloat16 is computed as float32 (ONNX Runtime's CPU provider has no bfloat16 kernels)")
    return proto


def _with_te_functions(proto: onnx.ModelProto, model: Model) -> onnx.ModelProto:
    from onnxtools.te_functions import functions

    version = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if version < 19:  # float8 begins at opset 19
        from onnxtools.passes.set_opset import SetOpset

        copy = Model(ir.from_proto(proto), model.path)
        if model.path is not None:
            ir.external_data.set_base_dir(copy.graph, model.path.parent)
        SetOpset(19).apply(copy)
        proto, version = copy.proto(), 19
    _retype_fp8_bytes(proto)
    proto.functions.extend(functions(version))
    return proto


def _retype_fp8_bytes(proto: onnx.ModelProto) -> None:
    """uint8 initializers that feed a dequantize directly hold FP8 bytes (fp8_model_init)."""
    read = {node.input[0] for node in proto.graph.node if node.domain == "trt" and node.op_type == "TRT_FP8DequantizeLinear"}
    for initializer in proto.graph.initializer:
        if initializer.name in read and initializer.data_type == onnx.TensorProto.UINT8:
            raw = onnx.numpy_helper.to_array(initializer).tobytes()
            initializer.CopyFrom(onnx.TensorProto(name=initializer.name, data_type=onnx.TensorProto.FLOAT8E4M3FN, dims=initializer.dims, raw_data=raw))


def _elem_type(value: onnx.ValueInfoProto) -> int:
    return int(value.type.tensor_type.elem_type)


def _bf16_as_fp32(proto: onnx.ModelProto, model: Model) -> None:
    tensors = {value.name: tensor for value, tensor in model.weights()}
    for initializer in proto.graph.initializer:
        if initializer.data_type == _BF16:
            array = tensors[initializer.name].numpy().astype(np.float32)
            initializer.CopyFrom(onnx.numpy_helper.from_array(array, initializer.name))
    for value in (*proto.graph.input, *proto.graph.output):
        if _elem_type(value) == _BF16:
            value.type.tensor_type.elem_type = _F32
    for node in proto.graph.node:
        widen_node(node, {_BF16})


def widen_node(node: onnx.NodeProto, types: Container[int]) -> None:
    """Let a node that makes or holds values of `types` make or hold float32."""
    for attribute in node.attribute:
        if attribute.name in ("to", "output_dtype", "dtype") and attribute.i in types:
            attribute.i = _F32
        if attribute.HasField("t") and attribute.t.data_type in types:
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(attribute.t).astype(np.float32)))


# --- inputs -----------------------------------------------------------------------------------------------------------


def random_feeds(model: Model, batch: int = BATCH, sequence: int = SEQUENCE, seed: int = 0) -> Feeds:
    """Inputs by rule: token ids within the embedding, positions 0.., causal 4-D masks, other masks that keep all, empty or zero caches, normal floats."""
    generator = np.random.default_rng(seed)
    return {value.name or "": _feed(value, batch, sequence, generator) for value in model.graph.inputs}


def _feed(value: ir.Value, batch: int, sequence: int, generator: np.random.Generator) -> Array:
    if value.shape is None or value.dtype is None:
        raise JobError(f"input {value.name!r} has no recorded type or shape; give data with --inputs")
    shape = [_dim(dim, axis, value, batch, sequence) for axis, dim in enumerate(value.shape)]
    name = (value.name or "").lower()
    dtype = np.dtype(np.float32) if value.dtype == ir.DataType.BFLOAT16 else value.dtype.numpy()
    if "past" in name:
        return np.zeros(shape, dtype)  # also static caches, whose slots are masked
    if "position" in name and is_ids_like(value):
        along = np.arange(shape[1], dtype=dtype) if shape[1] == sequence else np.arange(shape[0], dtype=dtype)[:, None]
        return np.broadcast_to(along, shape).copy()
    if "mask" in name:
        if value.dtype == ir.DataType.BOOL and len(shape) == 4:
            causal = np.triu(np.ones(shape[-2:], dtype=bool), shape[-1] - shape[-2] + 1)
            return np.broadcast_to(causal if _true_hides(value) else ~causal, shape).copy()
        if value.dtype.is_floating_point() and len(shape) == 4:
            return np.broadcast_to(np.triu(np.full(shape[-2:], -10000.0), shape[-1] - shape[-2] + 1), shape).astype(dtype)
        return np.ones(shape, dtype=dtype) if value.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL) else np.zeros(shape, dtype=dtype)
    if value.dtype in (ir.DataType.INT64, ir.DataType.INT32):
        return generator.integers(0, vocabulary(value), shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def _true_hides(mask: ir.Value) -> bool:
    """Whether True takes a key out (NeMo: Where(mask, -10000, scores)) or keeps it (the Attention operator, Where(mask, scores, ...))."""
    for node, index in mask.uses():
        if node.op_type == "Attention":
            return False
        if node.op_type == "Where" and index == 0:
            chosen = node.inputs[1]
            while chosen is not None and is_op(chosen.producer(), "Cast", "CastLike"):
                chosen = chosen.producer().inputs[0]  # type: ignore[union-attr]
            fill = constant_tensor(chosen)
            return fill is not None and fill.size == 1
        if node.op_type == "Not":
            return not _true_hides(node.outputs[0])
        if node.op_type in ("Unsqueeze", "Identity", "Expand", "Cast", "Slice", "Reshape"):
            return _true_hides(node.outputs[0])
    return True


def _dim(dim: int | ir.SymbolicDim, axis: int, value: ir.Value, batch: int, sequence: int) -> int:
    if isinstance(dim, int):
        return dim
    name = (dim.value or "").lower()
    if "past" in name:
        return 0
    if "batch" in name or (not name and axis == 0):
        return batch
    return batch if axis == 0 and "seq" not in name else sequence


def vocabulary(ids: ir.Value) -> int:
    """Rows of the smallest table that `ids` index; 2 where they index none."""
    tables = [node.inputs[0] for node, index in ids.uses() if node.op_type == "Gather" and index == 1]
    rows = [table.shape[0] for table in tables if table is not None and table.shape]
    return min((size for size in rows if isinstance(size, int)), default=2)


def read_feeds(path: Path) -> Feeds:
    """Inputs from an .npz file or from Polygraphy's JSON (the first entry of a list of feeds).

    Raises:
        JobError: the file cannot be read.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        from polygraphy.json import load_json

        data = load_json(str(path))
        first = data[0] if isinstance(data, list) else data
        return {name: np.asarray(array) for name, array in first.items()}
    except Exception as error:
        raise JobError(f"{path}: no readable inputs ({one_line(error)}); write an .npz or a Polygraphy JSON file") from error
