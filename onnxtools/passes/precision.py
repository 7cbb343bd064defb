"""fp32 to fp16 or bf16 in the graph: what --fp16 and --bf16 were before networks were strongly typed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from onnxtools.analysis.cache import cache_inputs, present_of
from onnxtools.analysis.facts import Facts, analyse
from onnxtools.analysis.opsets import MAX_OPSET
from onnxtools.analysis.products import weight_products
from onnxtools.analysis.readers import readers
from onnxtools.base.dtypes import BY_NAME
from onnxtools.base.errors import JobError, ModelError
from onnxtools.base.options import option
from onnxtools.calibration.calibration_options import Calibrated
from onnxtools.calibration.run import Calibration, Findings, Layer
from onnxtools.calibration.statistics import LargestFinite
from onnxtools.ir.description import record_dtypes
from onnxtools.ir.edit import Builder, remove_unused
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, constant_tensor, graphs_inside, is_op
from onnxtools.pipeline.passbase import PassResult
from onnxtools.storage.lazy import cast
from onnxtools.storage.rows import StreamedTensor, elements

FLOAT = ir.DataType.FLOAT
_FP16_MAX = 65504.0

_RECURRENT = ("LSTM", "GRU", "RNN")
_GENERATED = (
    "RandomNormal", "RandomUniform", "HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix",
)  # fmt: skip
"""Operators that make float32 unless they are told otherwise; ONNX Runtime makes no other type."""
_WIDE = {
    "Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "ReduceMean", "ReduceSum", "ReduceSumSquare",
    "ReduceL2", "ReduceLogSumExp", "Sin", "Cos", "CumSum", "RotaryEmbedding", "If", "Loop", "Scan",
    *_RECURRENT, *_GENERATED,
}  # fmt: skip
"""Operators that lose too much precision in 16 bits: softmax, the parts of norms, angles, states that go round."""
_SPREADING = _WIDE - {"Softmax", "LogSoftmax", "RotaryEmbedding", *_RECURRENT, *_GENERATED}
_REARRANGING = ("Squeeze", "Transpose", "Reshape", "Unsqueeze", "Identity")
"""Behind a recurrent operator these stay fp32 too, so that the cast stands at the product.

ONNX Runtime 1.32 crashes on Cast, Squeeze, Transpose, MatMul in fp16.
"""
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Neg"}
_BOUNDING = {"Max", "Clip", "Expand", "Abs"}
"""Operators that keep a length away from zero before something is divided by it."""
_SMALL = 64
_BF16_OPSET = 13
"""The first operator set whose MatMul, Add and the like take bfloat16."""
_HIDES = {"Add", "Mul", "Where", "Max", "Min", "Sub", "Clip", "Expand", "Concat"}
"""Operators in which a constant below the type's lowest number hides masked tokens, so that it may be cut."""


@dataclass(frozen=True)
class Precision(Calibrated):
    """Compute in fp16 or bf16, and keep what needs fp32.

    Rules:
      - products, additions, activation functions and their weights become 16 bits wide;
      - softmax, rotary embedding, and norms made of primitives (with the elementwise operators behind their parts) stay
        fp32; LayerNormalization, RMSNormalization and Attention take 16 bits and compute inside in fp32
        (stash_type, softmax_precision); so does an operator whose schema does not know the type;
      - logits stay fp32; caches and other inputs and outputs change their type, unless --keep-io;
      - a value is cast once for all its readers, never to fp32 and back;
      - the angles of sines and cosines stay fp32 too, from the counted positions on: in fp16 position 4001 is 4000;
      - constants that hide masked tokens are cut to half the lowest number of the type; other constants beyond it keep
        their operator in fp32, and a weight beyond fp16 is an error;
      - inputs that an operator takes in fp32 alone (the scales of Resize) stay, and so do all nodes inside If, Loop and
        Scan;
      - with --calib the model is run in fp32, and the values that fp16 could not hold are named.
    """

    name = "precision"
    numerics = "rounding"
    example = "onnxtools precision model.onnx fp16.onnx --to fp16"

    to: Literal["fp16", "bf16"] = option("fp16", "The type to compute in.")
    keep_io: bool = option(False, "Inputs and outputs of the graph keep their types.")

    @property
    def rewrites_weights(self) -> bool:
        return True

    def requires(self, model: Model) -> None:
        if any(node.domain == "trt" for node in model.graph):
            raise JobError(f"{model.path}: has TransformerEngine's operators; run `onnxtools convert` first")
        if self.to == "bf16" and model.opset < _BF16_OPSET:
            raise JobError(
                f"{model.path}: bf16 needs opset {_BF16_OPSET} and the model is at {model.opset}; run `onnxtools "
                "set-opset` first"
            )

    def apply(self, model: Model) -> PassResult:
        if not any(product.tensor.dtype == FLOAT for product in weight_products(model)):
            return PassResult(False, 0, ["no product with an fp32 weight found: nothing to narrow"])
        table = self._overflows(model) if self.calib is not None and self.to == "fp16" else []
        narrowing = _Narrowing(model, BY_NAME[self.to], self.keep_io)
        matches = narrowing.run()
        model.graph.sort()
        remove_unused(model)
        record_dtypes(model, compute=self.to, cache=None if self.keep_io else self.to)
        return PassResult(
            True,
            matches,
            [*(_warnings(table) if self.calib is not None and self.to == "fp16" else []), *narrowing.notes(matches)],
            table,
        )

    def _overflows(self, model: Model) -> list[dict[str, Any]]:
        """Rows {value, largest}: values whose largest magnitude over the calibration texts is beyond fp16."""
        rows: list[dict[str, Any]] = []
        with Calibration(model, self) as calibration:

            def look(layer: Layer) -> Findings:
                values = [
                    v for node in layer.segment.heavy for v in node.outputs if v.uses() and not is_op(node, "Constant")
                ]
                observers = {value: (LargestFinite(),) for value in values if calibration.is_float(value)}
                layer.observe(observers)
                return {value.name or "": np.array(observer.amax) for value, (observer,) in observers.items()}

            for _, findings in calibration.findings(look):
                rows += [{"value": name, "largest": float(amax)} for name, amax in findings.items() if amax > _FP16_MAX]
        return rows


def _warnings(table: list[dict[str, Any]]) -> list[str]:
    if not table:
        return [f"nothing exceeds fp16's {_FP16_MAX:.0f} while calibrating"]
    worst = max(table, key=lambda row: row["largest"])
    return [
        f"warning: {len(table)} values exceed fp16's {_FP16_MAX:.0f} while calibrating ({worst['value']!r} reaches "
        f"{worst['largest']:.4g}); use --to bf16"
    ]


class _Narrowing:
    """Narrows one model: decides which nodes stay fp32 (wide), then adds casts where wide and narrow nodes meet."""

    def __init__(self, model: Model, dtype: ir.DataType, keep_io: bool) -> None:
        self.model, self.dtype, self.keep_io = model, dtype, keep_io
        self.facts: Facts = analyse(model)
        self.build = Builder(model)
        self._types: dict[ir.Value, ir.DataType] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._weights: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._cut: list[str] = []
        self._limit = float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]
        self._wide_count: dict[str, int] = {}
        self._later: dict[str, int] = {}
        """Operators that take the type at a later opset, and this opset."""

    def run(self) -> int:
        """Rewrite the model; returns how many nodes were narrowed."""
        nodes = list(self.model.graph)
        self._angles = self._find_angles(nodes)
        for value in self.model.graph.inputs:
            if value.dtype == FLOAT:
                self._types[value] = FLOAT if self.keep_io or value in self._angles else self.dtype
                value.dtype = self._types[value]
        wide = self._wide(nodes)
        narrowed = 0
        for node in nodes:
            narrowed += self._rewrite(node, node in wide)
        outputs = list(self.model.graph.outputs)
        names = {value.name or "" for value in outputs}
        presents = {found[0] for past in cache_inputs(self.model) if (found := present_of(past.name or "", names))}
        for index, value in enumerate(outputs):
            self._output(index, value, value.name in presents)
        return narrowed

    def notes(self, narrowed: int) -> list[str]:
        wide = ", ".join(f"{count} {name}" for name, count in sorted(self._wide_count.items()))
        notes = [
            f"{narrowed} nodes compute in {self.dtype.name.lower()}",
            f"{len(self._casts)} casts",
            f"kept in fp32: {wide}" if wide else "nothing kept in fp32",
        ]
        if self._later:
            names, opset = ", ".join(sorted(self._later)), max(self._later.values())
            notes.append(f"{names} takes {self.dtype.name.lower()} from opset {opset}: `onnxtools set-opset --version "
                         f"{opset}` first")  # fmt: skip
        return notes + (
            [f"constants beyond the type cut to half of its lowest: {', '.join(self._cut[:3])}"] if self._cut else []
        )

    def _wide(self, nodes: list[ir.Node]) -> set[ir.Node]:
        """Nodes that stay in fp32: by operator, by schema, and elementwise ones that read outputs of such nodes."""
        wide: set[ir.Node] = set()
        rearranged: set[ir.Node] = set()
        for node in nodes:
            if not self._is_float(node):
                continue
            makers = [value.producer() for value in node.inputs if value is not None]
            spreading = _SPREADING | _ELEMENTWISE | _BOUNDING
            behind = node.op_type in _ELEMENTWISE | _BOUNDING and any(
                m is not None and m in wide and m.op_type in spreading for m in makers
            )
            recurrent = is_op(node, *_REARRANGING) and any(m is not None and m in rearranged for m in makers[:1])
            if is_op(node, *_RECURRENT) or recurrent:
                rearranged.add(node)
            explicit = (
                is_op(node, "Cast") and attribute(node, "to") == FLOAT.value and self._float_value(node.inputs[0])
            )
            needs_fp32 = any(value in self._angles for value in node.outputs) or self._scales_beyond(node)
            if (
                node.op_type in _WIDE
                or explicit
                or behind
                or recurrent
                or needs_fp32
                or not _takes(node, self.dtype, self.model.opset)
            ):
                wide.add(node)
                self._note_later(node)
                self._wide_count[node.op_type] = self._wide_count.get(node.op_type, 0) + 1
        return wide

    def _note_later(self, node: ir.Node) -> None:
        """Remember a product that is kept only because the graph's opset is too old for it."""
        if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose") or node.op_type in self._later:
            return
        if not _takes(node, self.dtype, self.model.opset):
            later = range(self.model.opset + 1, MAX_OPSET + 1)
            opset = next((version for version in later if _takes(node, self.dtype, version)), None)
            self._later.update({node.op_type: opset} if opset is not None else {})

    def _find_angles(self, nodes: list[ir.Node]) -> set[ir.Value]:
        """Values that the angles of sines and cosines are computed from, in subgraphs too.

        The search ends at products with stored weights, norms and softmax.
        """
        ends = {
            product.node for product in weight_products(self.model) if min(product.tensor.shape.numpy(), default=1) > 1
        }
        angles: set[ir.Value] = set()
        waiting = [value for node in self.model.graph.all_nodes() if is_op(node, "Sin", "Cos") for value in node.inputs]
        while waiting:
            value = waiting.pop()
            node = value.producer() if value is not None else None
            if value is None or value in angles or node in ends:
                continue
            if node is None:
                angles.add(value)
            elif self._is_float(node) and "Norm" not in node.op_type and not is_op(node, "Softmax", "Attention"):
                angles.add(value)
                waiting += [
                    *node.inputs,
                    *(inner for graph in graphs_inside(node) for n in graph.all_nodes() for inner in n.inputs),
                ]
        return angles

    def _scales_beyond(self, node: ir.Node) -> bool:
        """Whether the type would change a constant of the node.

        A constant would become zero, or it is out of range and does not hide masked tokens.
        """
        for value in node.inputs:
            tensor = constant_tensor(value)
            if tensor is None or tensor.dtype != FLOAT or tensor.size > _SMALL:
                continue
            array = elements(tensor)
            beyond = np.isfinite(array) & (np.abs(array) > self._limit)
            if ((array != 0) & (np.where(beyond, 1, array).astype(self.dtype.numpy()) == 0)).any():
                return True
            if beyond.any() and (node.op_type not in _HIDES or (array[beyond] > 0).any()):
                return True
        return False

    def _is_float(self, node: ir.Node) -> bool:
        return any(self.facts[value].dtype == FLOAT for value in (*node.inputs, *node.outputs) if value is not None)

    def _float_value(self, value: ir.Value | None) -> bool:
        return value is not None and (dtype := self.facts[value].dtype) is not None and dtype.is_floating_point()

    def _widen_captured(self, node: ir.Node) -> None:
        """Cast the values that subgraphs of the node read from outside to fp32: subgraphs stay in fp32."""
        self.build.before = node
        for graph in graphs_inside(node):
            for user in graph.all_nodes():
                for index, value in enumerate(user.inputs):
                    if value is not None and self._types.get(value, FLOAT) != FLOAT:
                        user.replace_input_with(index, self._as(value, FLOAT))
            for index, value in enumerate(list(graph.outputs)):
                if self._types.get(value, FLOAT) != FLOAT:
                    graph.outputs[index] = self._as(value, FLOAT)

    def _rewrite(self, node: ir.Node, wide: bool) -> bool:
        self._widen_captured(node)
        if not self._is_float(node) or is_op(node, "Constant", "Shape", "Size"):
            return False
        self.build.before = node
        dtype = FLOAT if wide else self.dtype
        for index, value in enumerate(node.inputs):
            if value is not None and self.facts[value].dtype == FLOAT and not is_op(node, "Cast"):
                node.replace_input_with(
                    index, self._as(value, dtype if _is_free(node, index, self.dtype, self.model.opset) else FLOAT)
                )
        for index, value in enumerate(node.outputs):
            if self.facts[value].dtype == FLOAT:
                # The mean and the deviation of a norm are fp32.
                statistic = node.op_type.endswith("LayerNormalization") and index in (1, 2)
                self._types[value] = value.dtype = FLOAT if statistic else dtype
        if not wide:
            self._retype(node)
        return not wide

    def _retype(self, node: ir.Node) -> None:
        """Rewrite the attributes that name the type or hold a tensor of it."""
        for name in ("to", "dtype", "output_dtype"):
            if attribute(node, name) == FLOAT.value:
                node.attributes[name] = ir.AttrInt64(name, self.dtype.value)
        if is_op(node, "ConstantOfShape") and "value" not in node.attributes:
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(np.zeros(1, self.dtype.numpy())))
        tensor = node.attributes.get("value")
        if tensor is not None and tensor.type == ir.AttributeType.TENSOR and tensor.as_tensor().dtype == FLOAT:
            node.attributes["value"] = ir.AttrTensor(
                "value", ir.Tensor(self._narrow(tensor.as_tensor().numpy(), node.name or ""), dtype=self.dtype)
            )
        if is_op(node, "Attention") and attribute(node, "softmax_precision") is None:
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", FLOAT.value)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        tensor = constant_tensor(value)
        if tensor is not None:
            return value if dtype == tensor.dtype else self._constant(value, tensor)
        if self._types.get(value, FLOAT) == dtype:
            return value
        source = value.producer()
        if (
            is_op(source, "Cast")
            and source is not None
            and source.inputs[0] is not None
            and self._types.get(source.inputs[0]) == dtype
        ):
            return source.inputs[0]  # no cast to fp32 and back
        if (value, dtype) not in self._casts:
            result = self.build.op("Cast", [value], f"{value.name}/{dtype.name.lower()}", dtype=dtype, to=dtype.value)
            result.shape = value.shape
            self._types[result] = dtype
            self._casts[value, dtype] = result
        return self._casts[value, dtype]

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        key = (value, self.dtype)
        if key not in self._weights:
            name = value.name or "constant"
            if tensor.size <= _SMALL:
                self._weights[key] = self.build.constant(
                    self._narrow(elements(tensor), name), f"{name}_{self.dtype.name.lower()}", self.dtype
                )
            else:
                narrow = self._narrowed_mask(tensor, name) if self._hides(value) else cast(tensor, self.dtype)
                initializer = self.build.initializer(narrow, f"{name}_{self.dtype.name.lower()}")
                initializer.metadata_props.update(value.metadata_props)
                self._weights[key] = initializer
        return self._weights[key]

    def _hides(self, value: ir.Value) -> bool:
        """Whether a table, or a slice of it, is a mask: it is added to scores, or replaces them, and is no weight."""
        uses = readers(value)
        for reader in uses:
            if is_op(reader.node, "Slice", "Gather") and reader.index == 0 and reader.node is not None:
                uses += readers(reader.node.outputs[0])
        looked_up = any(is_op(reader.node, "Gather") for reader in uses)
        ends = [reader.node for reader in uses if not is_op(reader.node, "Slice", "Gather")]
        return all(is_op(node, *_HIDES) and (not looked_up or _meets_softmax(node)) for node in ends)

    def _narrowed_mask(self, tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
        """A large mask table in the narrow type, converted when it is written.

        Numbers below the type's lowest hide masked tokens and are cut; a number above its largest is a ModelError.
        """

        def rows(block: np.ndarray, _: int) -> np.ndarray:
            with np.errstate(invalid="ignore"):
                if (np.isfinite(block) & (block > self._limit)).any():
                    raise ModelError(
                        f"constant {name!r} has values beyond {self.dtype.name}; use bf16, or keep it in fp32"
                    )
                return self._lowered(block).astype(self.dtype.numpy())

        return StreamedTensor(tensor, rows, dtype=self.dtype, name=name)

    def _lowered(self, array: np.ndarray) -> np.ndarray:
        """`array` with half the type's lowest number for finite elements below it: the sum of two masks is finite."""
        return np.where(np.isfinite(array) & (array < -self._limit), np.float32(-self._limit / 2), array)

    def _narrow(self, array: np.ndarray, name: str) -> np.ndarray:
        """A small constant in the narrow type; an element below the type's lowest hides masked tokens and is cut."""
        lowered = self._lowered(array)
        if not np.array_equal(lowered, array, equal_nan=True):
            self._cut.append(name)
        with np.errstate(over="ignore"):
            return lowered.astype(self.dtype.numpy())

    def _output(self, index: int, value: ir.Value, is_present: bool) -> None:
        """Cast output `index` to fp32 if it is the logits, and to the type of its input if it is a cache.

        With `keep_io` cast every output to fp32.
        """
        dtype = self._types.get(value)
        wanted = FLOAT if self.keep_io or value.name == "logits" else self.dtype if is_present else dtype
        if dtype is None or dtype == wanted or wanted is None:
            return
        self.build.before = None
        name, value.name = value.name, self.build.names(f"{value.name}/{dtype.name.lower()}")
        output = self.build.op("Cast", [value], f"{name}/Cast", dtype=wanted, to=wanted.value)
        output.name, output.shape = name, value.shape
        self.model.graph.outputs[index] = output


def _meets_softmax(node: ir.Node | None) -> bool:
    """Whether only masking operators lie between the node and a softmax.

    This tells a mask from an embedding, which is looked up and added too.
    """
    waiting, seen = [node] if node is not None else [], {node}
    while waiting:
        users = {user for value in waiting.pop().outputs for user, _ in value.uses()}
        if not all(is_op(user, "Softmax", "Attention", "Cast", *_HIDES) for user in users) or not users:
            return False
        further = {user for user in users - seen if not is_op(user, "Softmax", "Attention")}
        waiting += further
        seen |= further
    return True


@functools.cache
def _schema(op_type: str, domain: str, opset: int) -> Any:
    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None


def _is_free(node: ir.Node, index: int, dtype: ir.DataType, opset: int) -> bool:
    """Whether the operator's schema lets input `index` have `dtype`; the scales of Resize are always fp32."""
    schema = _schema(node.op_type, "", opset) if node.domain in ("", "ai.onnx") else None
    if schema is None or not schema.inputs:
        return True
    formal = schema.inputs[min(index, len(schema.inputs) - 1)].type_str
    allowed = next((c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == formal), [formal])
    return f"tensor({dtype.name.lower()})" in allowed


def _takes(node: ir.Node, dtype: ir.DataType, opset: int) -> bool:
    """Whether the operator's schema allows `dtype` wherever it allows float; contributed operators always do."""
    if node.domain not in ("", "ai.onnx"):
        return True
    schema = _schema(node.op_type, "", opset)
    if schema is None:
        return True
    wide, narrow = "tensor(float)", f"tensor({dtype.name.lower()})"
    if any(formal.type_str == wide for formal in schema.outputs):
        return False  # its result is float32 whatever goes in
    # A sequence or an optional of the type counts too.
    return all(
        text.replace(wide, narrow) in constraint.allowed_type_strs
        for constraint in schema.type_constraints
        for text in constraint.allowed_type_strs
        if wide in text
    )
