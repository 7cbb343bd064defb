"""Operators in numpy, for `facts`: output elements from known elements, and output shapes and types without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxtools.ir.query import attribute

Array = np.ndarray[Any, Any]


@dataclass
class Fact:
    """The static facts of one value; None means unknown.

    Attributes:
        dtype: element type.
        shape: sizes with stand-ins in place of symbolic dimensions.
        value: the elements, an array of `shape`.
        grown: computed by Range, Expand or a similar operator. Folding it would store elements that a node computes for
            free.
    """

    dtype: ir.DataType | None = None
    shape: tuple[int, ...] | None = None
    value: Array | None = None
    grown: bool = False


UNKNOWN = Fact()
_MOST_DIMENSIONS = 64
"""Most dimensions of a numpy array."""


def _axes(node: ir.Node, arrays: Sequence[Array | None]) -> tuple[int, ...] | None:
    """Returns `axes` of Squeeze, Unsqueeze and Reduce*: an input since opset 13/18, an attribute before."""
    axes = arrays[1] if len(arrays) > 1 and arrays[1] is not None else attribute(node, "axes")
    if axes is not None and np.size(axes) > _MOST_DIMENSIONS:
        raise ValueError(f"{np.size(axes)} axes")
    return None if axes is None else tuple(int(a) for a in np.atleast_1d(axes))


def _unsqueeze(node: ir.Node, arrays: Sequence[Any]) -> Array:
    axes = _axes(node, arrays) or ()
    rank = arrays[0].ndim + len(axes)
    return np.expand_dims(arrays[0], tuple(a % rank for a in axes))


def reshape_target(shape: tuple[int, ...], target: Sequence[int], allowzero: int = 0) -> tuple[int, ...]:
    """Returns the output sizes of ONNX's Reshape: 0 copies (unless `allowzero`), -1 is the remaining size.

    Args:
        shape: sizes of the data.
        target: the second input.
        allowzero: the attribute.

    Raises:
        ValueError: the numbers of elements differ.
    """
    sizes = [shape[i] if d == 0 and not allowzero else int(d) for i, d in enumerate(target)]
    if -1 in sizes:
        rest = math.prod(d for d in sizes if d != -1)
        sizes[sizes.index(-1)] = math.prod(shape) // rest if rest else 0
    if math.prod(sizes) != math.prod(shape):
        raise ValueError(f"cannot reshape {shape} to {sizes}")
    return tuple(sizes)


def _reshape(node: ir.Node, arrays: Sequence[Any]) -> Array:
    return np.asarray(arrays[0]).reshape(
        reshape_target(arrays[0].shape, arrays[1].tolist(), attribute(node, "allowzero", 0))
    )


class Disputed(ValueError):
    """ONNX Runtime and ONNX disagree about the result, so it counts as unknown."""


def _slice_index(node: ir.Node, shape: Sequence[int], arrays: Sequence[Any]) -> tuple[slice, ...]:
    """Returns the numpy index of a Slice of an array of `shape`.

    Bounds are clamped by the rules of ONNX's Slice-13, which differ from numpy's for negative steps.
    """
    starts, ends = arrays[1].tolist(), arrays[2].tolist()
    axes = arrays[3].tolist() if len(arrays) > 3 and arrays[3] is not None else list(range(len(starts)))
    steps = arrays[4].tolist() if len(arrays) > 4 and arrays[4] is not None else [1] * len(starts)
    index = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0 and end >= 2**31 - 1:
            raise Disputed(
                "ONNX Runtime's kernel takes such an end for the beginning, its shape inference and ONNX do not"
            )
        size = shape[axis]
        low, high = (0, size) if step > 0 else (-1, size - 1)
        first = min(max(start + size if start < 0 else start, max(low, 0)), high)
        last = min(max(end + size if end < 0 else end, low), high)
        index[axis] = slice(0, 0) if not size else slice(first, None if last < 0 else last, step)
    return tuple(index)


def _divide(node: ir.Node, arrays: Sequence[Any]) -> Array:
    a, b = arrays
    if np.issubdtype(a.dtype, np.integer):
        # ONNX truncates towards zero
        return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)), dtype=a.dtype)
    return np.divide(a, b)  # type: ignore[no-any-return]


def _split_sizes(node: ir.Node, size: int, arrays: Sequence[Any]) -> list[int]:
    sizes = arrays[1] if len(arrays) > 1 and arrays[1] is not None else attribute(node, "split")
    if sizes is not None:
        return [int(s) for s in sizes]
    parts = len(node.outputs)
    chunk = -(-size // parts)
    return [min(chunk, size - i * chunk) for i in range(parts)]


def _split(node: ir.Node, arrays: Sequence[Any]) -> list[Array]:
    axis = attribute(node, "axis", 0)
    sizes = _split_sizes(node, arrays[0].shape[axis], arrays)
    return np.split(arrays[0], np.cumsum(sizes)[:-1], axis=axis)


def _cast(node: ir.Node, arrays: Sequence[Any]) -> Array:
    return _as(arrays[0], ir.DataType(attribute(node, "to")).numpy(), bool(attribute(node, "saturate", 1)))


def _cast_like(node: ir.Node, arrays: Sequence[Any]) -> Array:
    return _as(arrays[0], arrays[1].dtype, bool(attribute(node, "saturate", 1)))


def _as(array: Array, dtype: np.dtype[Any], saturate: bool) -> Array:
    """Converts `array` to `dtype` by ONNX's Cast.

    Numbers beyond a float8 type, infinity included, become its largest number unless `saturate` is off.

    Raises:
        ValueError: the integer type cannot hold a float; ONNX does not define the result.
    """
    if np.dtype(array.dtype).kind == "f" and np.dtype(dtype).kind in "iu":
        whole, bounds = np.trunc(array.astype(np.float64)), np.iinfo(dtype)
        if not ((whole >= bounds.min) & (whole <= bounds.max)).all():
            raise ValueError("out of range")
    if saturate and "float8" in dtype.name and "e8m0" not in dtype.name:
        top = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
        array = np.clip(array.astype(np.float32), -top, top)
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)


def _squeeze(node: ir.Node, arrays: Sequence[Any]) -> Array:
    return np.asarray(np.squeeze(arrays[0], _axes(node, arrays)))


_LONGEST = 1 << 27
"""Most elements of a Range."""


def _range(node: ir.Node, arrays: Sequence[Any]) -> Array:
    start, limit, delta = (a.item() for a in arrays)
    if not delta or abs((limit - start) / delta) > _LONGEST:
        raise ValueError("too long, or endless")
    return np.arange(start, limit, delta, dtype=arrays[0].dtype)


def _constant_of_shape(node: ir.Node, arrays: Sequence[Any]) -> Array:
    fill = attribute(node, "value")
    content = fill.numpy().reshape(()) if fill is not None else np.float32(0)
    return np.full(arrays[0].tolist(), content)


def _expand(node: ir.Node, arrays: Sequence[Any]) -> Array:
    shape = np.broadcast_shapes(arrays[0].shape, tuple(arrays[1].tolist()))
    return np.broadcast_to(arrays[0], shape).copy()


def _trilu(node: ir.Node, arrays: Sequence[Any]) -> Array:
    k = int(arrays[1]) if len(arrays) > 1 and arrays[1] is not None else 0
    return np.triu(arrays[0], k) if attribute(node, "upper", 1) else np.tril(arrays[0], k)


def _gather_nd(node: ir.Node, arrays: Sequence[Any]) -> Array:
    data, index = arrays
    batch = data.shape[: attribute(node, "batch_dims", 0)]
    pieces = [data[place][tuple(np.moveaxis(index[place], -1, 0))] for place in np.ndindex(*batch)]
    return np.asarray(np.reshape(pieces, (*batch, *index.shape[len(batch) : -1], *data.shape[len(batch)
        + index.shape[-1] :])))  # fmt: skip


_SCATTERS: dict[str, np.ufunc] = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _scatter_nd(node: ir.Node, arrays: Sequence[Any]) -> Array:
    data, index, updates = arrays
    result, places = np.array(data), tuple(np.moveaxis(index, -1, 0))
    reduction = attribute(node, "reduction", "none")
    if reduction == "none":
        result[places] = updates
    else:
        _SCATTERS[reduction].at(result, places, updates)
    return result


def _cum_sum(node: ir.Node, arrays: Sequence[Any]) -> Array:
    data, axis = arrays[0], int(arrays[1])
    data = np.flip(data, axis) if attribute(node, "reverse", 0) else data
    total = np.cumsum(data, axis=axis, dtype=data.dtype)
    total = total - data if attribute(node, "exclusive", 0) else total
    return np.asarray(np.flip(total, axis) if attribute(node, "reverse", 0) else total)


def _ufunc(function: Callable[..., Any]) -> Callable[[ir.Node, Sequence[Any]], Any]:
    return lambda node, arrays: function(*arrays)


_BINARY: dict[str, Callable[..., Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "And": np.logical_and, "Or": np.logical_or,
    "Xor": np.logical_xor,
    "Equal": np.equal, "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Pow": np.power, "Where": np.where,
}  # fmt: skip
_UNARY: dict[str, Callable[..., Any]] = {
    "Not": np.logical_not, "Neg": np.negative, "Sqrt": np.sqrt, "Abs": np.abs, "Floor": np.floor, "Ceil": np.ceil,
    "Exp": np.exp, "Log": np.log,
    "Cos": np.cos, "Sin": np.sin, "Identity": lambda x: x, "Reciprocal": lambda x: (1 / x).astype(x.dtype),
    "Sign": np.sign,
}  # fmt: skip
_SAME_SHAPE_ONLY = {
    "Tanh", "Erf", "Sigmoid", "Relu", "Gelu", "Softmax", "LogSoftmax", "Clip", "LayerNormalization", "RMSNormalization",
    "SimplifiedLayerNormalization", "GroupNormalization", "InstanceNormalization", "Trilu", "QuantizeLinear",
    "DequantizeLinear", "Dropout", "CumSum", "Swish", "IsNaN", "Elu", "LeakyRelu", "Softplus", "HardSwish",
    "BitwiseNot",
}  # fmt: skip
_BROADCAST_ONLY = {"Div", "Max", "Min", "Mod", "PRelu", "BitwiseAnd", "BitwiseOr", "Sum", "Mean"}

VALUE_RULES: dict[str, Callable[[ir.Node, Sequence[Any]], Any]] = {
    **{name: _ufunc(function) for name, function in (_BINARY | _UNARY).items()},
    "Div": _divide, "Cast": _cast, "CastLike": _cast_like, "Reshape": _reshape, "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze, "Concat": lambda n, a: np.concatenate(a, attribute(n, "axis")), "Transpose": lambda n,
    a: np.transpose(a[0], attribute(n, "perm")),
    "Gather": lambda n, a: np.take(a[0], a[1], axis=attribute(n, "axis", 0)), "Slice": lambda n,
    a: a[0][_slice_index(n, a[0].shape, a)],
    "Split": _split, "Range": _range, "ConstantOfShape": _constant_of_shape, "Expand": _expand, "Trilu": _trilu,
    "Size": lambda n, a: np.int64(a[0].size), "Flatten": lambda n,
    a: a[0].reshape(math.prod(a[0].shape[: attribute(n, "axis", 1)]), -1),
    "Tile": lambda n, a: np.tile(a[0], a[1]), "GatherND": _gather_nd, "ScatterND": _scatter_nd, "CumSum": _cum_sum,
}  # fmt: skip

# --- shapes -----------------------------------------------------------------------------------------------------------

Shapes = list[tuple[int, ...]]


def _shape(fact: Fact) -> tuple[int, ...]:
    if fact.shape is None:
        raise ValueError("unknown shape")
    return fact.shape


def _value(fact: Fact) -> list[int]:
    if fact.value is None:
        raise ValueError("unknown elements")
    return [int(v) for v in np.atleast_1d(fact.value)]


def _matmul_shape(node: ir.Node, i: list[Fact]) -> Shapes:
    a, b = _shape(i[0]), _shape(i[1])
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
        raise ValueError("vector or mismatch")
    return [(*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])]


def _gemm_shape(node: ir.Node, i: list[Fact]) -> Shapes:
    a, b = _shape(i[0]), _shape(i[1])
    return [(a[1] if attribute(node, "transA", 0) else a[0], b[0] if attribute(node, "transB", 0) else b[1])]


def _reshape_shape(node: ir.Node, i: list[Fact]) -> Shapes:
    return [reshape_target(_shape(i[0]), _value(i[1]), attribute(node, "allowzero", 0))]


def _concat_shape(node: ir.Node, i: list[Fact]) -> Shapes:
    shapes = [list(_shape(f)) for f in i]
    axis = attribute(node, "axis")
    shapes[0][axis] = sum(s[axis] for s in shapes)
    return [tuple(shapes[0])]


def _gather_shape(node: ir.Node, i: list[Fact]) -> Shapes:
    data, index = _shape(i[0]), _shape(i[1])
    axis = attribute(node, "axis", 0) % len(data)
    return [(*data[:axis], *index, *data[axis + 1 :])]


def _split_shape(node: ir.Node, i: list[Fact]) -> Shapes:
    shape = list(_shape(i[0]))
    axis = attribute(node, "axis", 0)
    sizes = _split_sizes(node, shape[axis], [f.value for f in i])
    return [tuple(size if a == axis % len(shape) else d for a, d in enumerate(shape)) for size in sizes]


def _slice_shape(node: ir.Node, i: list[Fact]) -> Shapes:
    for fact, bound in zip(i[1:], node.inputs[1:], strict=True):
        if bound is not None and fact.value is None:
            raise ValueError("unknown bounds")
    shape = _shape(i[0])
    index = _slice_index(node, shape, [None, *(f.value for f in i[1:])])
    return [tuple(len(range(*part.indices(d))) for part, d in zip(index, shape, strict=True))]


def _dummy(shape: tuple[int, ...]) -> Array:
    """Returns an array of `shape` that takes no memory, for numpy's shape arithmetic."""
    return np.broadcast_to(np.zeros((), dtype=bool), shape)


def _by_numpy(node: ir.Node, i: list[Fact]) -> Shapes:
    arrays = [_dummy(_shape(i[0])), *(f.value for f in i[1:])]
    if any(v is not None and f.value is None for v, f in zip(node.inputs[1:], i[1:], strict=True)):
        raise ValueError("unknown elements")
    return [np.shape({"Unsqueeze": _unsqueeze, "Squeeze": _squeeze}[node.op_type](node, arrays))]


def _reduce_shape(node: ir.Node, i: list[Fact]) -> Shapes:
    shape = _shape(i[0])
    if len(node.inputs) > 1 and node.inputs[1] is not None and i[1].value is None:
        raise ValueError("unknown axes")
    axes = _axes(node, [f.value for f in i])
    if not axes:
        if attribute(node, "noop_with_empty_axes", 0):
            return [shape]
        axes = tuple(range(len(shape)))
    axes = tuple(a % len(shape) for a in axes)
    reduced = [1 if a in axes else d for a, d in enumerate(shape)]
    return [tuple(d for a, d in enumerate(reduced) if attribute(node, "keepdims", 1) or a not in axes)]


def _broadcast(node: ir.Node, i: list[Fact]) -> Shapes:
    return [np.broadcast_shapes(*(_shape(f) for f in i))]


SHAPE_RULES: dict[str, Callable[[ir.Node, list[Fact]], Shapes]] = {
    **dict.fromkeys([*_BINARY, *_BROADCAST_ONLY], _broadcast),
    **{name: lambda n, i: [_shape(i[0])] for name in (*_UNARY, *_SAME_SHAPE_ONLY, "Cast", "CastLike")},
    "MatMul": _matmul_shape, "Gemm": _gemm_shape, "Reshape": _reshape_shape, "Concat": _concat_shape,
    "Gather": _gather_shape,
    "Split": _split_shape, "Slice": _slice_shape, "Unsqueeze": _by_numpy, "Squeeze": _by_numpy,
    "Transpose": lambda n, i: [tuple(_shape(i[0])[p] for p in attribute(n, "perm", range(len(_shape(i[0])))[::-1]))],
    "Expand": lambda n, i: [np.broadcast_shapes(_shape(i[0]), tuple(_value(i[1])))],
    "ConstantOfShape": lambda n, i: [tuple(_value(i[0]))],
    "Flatten": lambda n, i: [(math.prod(_shape(i[0])[: attribute(n, "axis", 1)]), math.prod(_shape(i[0])[attribute(n,
        "axis", 1) :]))],
    "ScatterND": lambda n, i: [_shape(i[0])],
    **dict.fromkeys(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceSumSquare", "ReduceL2", "ReduceProd"],
        _reduce_shape),
    "Tile": lambda n, i: [tuple(a * b for a, b in zip(_shape(i[0]), _value(i[1]), strict=True))],
}  # fmt: skip

_BOOLEAN = {"Not", "And", "Or", "Xor", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN"}


def _dtype(number: Any) -> ir.DataType | None:
    """Returns the element type of an attribute's number, or None if there is no such type."""
    try:
        return ir.DataType(number)
    except ValueError:
        return None


def output_dtypes(node: ir.Node, inputs: list[Fact]) -> list[ir.DataType | None]:
    """Returns the element type of each output (the same for all outputs of the operators with a rule here)."""
    op = node.op_type
    if op in _BOOLEAN:
        dtype: ir.DataType | None = ir.DataType.BOOL
    elif op == "Cast":
        dtype = _dtype(attribute(node, "to"))
    elif op in ("CastLike", "Where"):
        dtype = inputs[1].dtype
    elif op in ("Shape", "Size"):
        dtype = ir.DataType.INT64
    elif op == "ConstantOfShape":
        fill = attribute(node, "value")
        dtype = fill.dtype if fill is not None else ir.DataType.FLOAT
    elif op == "DequantizeLinear":
        dtype = _dtype(attribute(node, "output_dtype", 0)) if attribute(node, "output_dtype", 0) else inputs[1].dtype
    elif op == "QuantizeLinear":
        output_dtype = attribute(node, "output_dtype", 0)
        dtype = inputs[2].dtype if len(inputs) > 2 else (_dtype(output_dtype) if output_dtype else ir.DataType.UINT8)
    else:
        dtype = inputs[0].dtype if inputs else None
    return [dtype] * len(node.outputs)
