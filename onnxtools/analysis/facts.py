"""Static facts about every value of a graph: dtype, shape, and elements if they follow from constants and shapes.

Symbolic dimensions get stand-in sizes (distinct primes that divide no constant dimension), so shape arithmetic,
position ids and masks can be evaluated with plain numpy. Values that are equal under several sets of stand-ins do not
depend on them: `constants` returns these values, and they may be folded. One set is small, one is larger than any
length that a graph compares with, and one is all ones, so that neither a crop nor a special case for one token looks
constant.

Weights are never read: floating-point constants beyond `FLOAT_LIMIT` elements have a shape and no elements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxtools.analysis.operators import SHAPE_RULES, UNKNOWN, VALUE_RULES, Disputed, Fact, output_dtypes
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, constant_tensor
from onnxtools.storage.rows import elements

FLOAT_LIMIT = 1 << 16
"""Most elements of a floating-point or one-byte constant that is read."""
VALUE_LIMIT = 1 << 25
"""Most elements of a computed value."""
CONSTANT_LIMIT = 1 << 22
"""Most elements of another constant that is read."""
LONG = 100_003
"""Stand-ins above it are longer than any length that a graph compares with."""

Array = np.ndarray[Any, Any]


class Facts:
    """Facts of all values of the main graph. `facts[value]` is the fact of a value, `UNKNOWN` if there is none.

    Attributes:
        dims: sizes of the symbolic dimensions by name.
        limit: values with more elements are not computed.
    """

    def __init__(self, dims: dict[str, int], limit: int = VALUE_LIMIT) -> None:
        self.dims = dims
        self.limit = limit
        self._facts: dict[ir.Value, Fact] = {}

    def __getitem__(self, value: ir.Value | None) -> Fact:
        if value is None:
            return UNKNOWN
        if value not in self._facts:
            tensor = constant_tensor(value)
            if tensor is not None:
                self._facts[value] = _constant_fact(tensor)
        return self._facts.get(value, UNKNOWN)

    def __setitem__(self, value: ir.Value, fact: Fact) -> None:
        self._facts[value] = fact

    def __contains__(self, value: ir.Value) -> bool:
        """Whether a fact of `value` has been computed or read."""
        return value in self._facts


def _constant_fact(tensor: ir.TensorProtocol) -> Fact:
    fact = Fact(tensor.dtype, tuple(int(d) for d in tensor.shape.numpy()))
    if tensor.dtype not in _WHOLE_TYPES:
        return fact
    small = tensor.dtype.is_floating_point() or (tensor.dtype.itemsize == 1 and tensor.dtype != ir.DataType.BOOL)
    if tensor.size <= (FLOAT_LIMIT if small else CONSTANT_LIMIT):
        fact.value = elements(tensor)
    return fact


_WHOLE_TYPES = {
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.BOOL,
    ir.DataType.INT8, ir.DataType.INT16,
    ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
}  # fmt: skip


def stand_ins(model: Model, above: int = 10) -> dict[str, int]:
    """Returns a prime for every symbolic dimension of the inputs, by name. Unnamed ones are called `<input>:<axis>`.

    All are larger than `above`. In integer inputs of rank 2 (token ids, position ids, attention masks), axis 0 is one
    batch and axis 1 one sequence, whatever names the exporter chose, since they meet in the same broadcasts. A mask
    over a growing cache is as long as past and new tokens together, so its size is their sum.
    """
    constants = {int(d) for _, tensor in model.weights() for d in tensor.shape.numpy() if d}
    primes = _primes(constants, above)
    sizes: dict[str, int] = {}
    roles: dict[int, int] = {}
    totals: list[str] = []
    past = _growing_past(model)
    for value in model.graph.inputs:
        ids = is_ids_like(value) or (len(value.shape or ()) == 2 and "mask" in (value.name or "").lower())
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, int):
                continue
            name = dim_name(value, axis)
            if len(dim_terms(name)) > 1 or (ids and axis == 1 and "total" in name.lower() and past is not None):
                totals.append(name)
                continue
            if name not in sizes:
                sizes[name] = roles[axis] if ids and axis in roles else next(primes)
            if ids:
                roles.setdefault(axis, sizes[name])
    for name in totals:
        terms = dim_terms(name)
        if len(terms) == 1:
            sizes[name] = sizes[past or ""] + roles.get(1, 0)
        elif all(isinstance(term, int) or term in sizes for term in terms):
            sizes[name] = sum(term if isinstance(term, int) else sizes[term] for term in terms)
        else:
            sizes[name] = next(primes)
    return sizes


def dim_terms(name: str) -> list[int | str]:
    """Returns the terms of a dimension whose name is a sum, such as optimum's `past_sequence_length + sequence_length`.

    For another name it returns the name alone.
    """
    terms = [term.strip() for term in name.split("+")]
    return [int(term) if term.isdigit() else term for term in terms] if all(terms) else [name]


def is_past_length(dim: str) -> bool:
    """Whether a dimension called `dim` is the number of tokens in a cache."""
    return "past" in dim.lower()


def _growing_past(model: Model) -> str | None:
    """Returns the dimension name of the length of the cache inputs, or None."""
    for value in model.graph.inputs:
        for dim in value.shape or ():
            if isinstance(dim, ir.SymbolicDim) and dim.value and is_past_length(dim.value) and not is_ids_like(value):
                return dim.value
    return None


def is_ids_like(value: ir.Value) -> bool:
    """Whether `value` has the type and rank of token ids, position ids or an attention mask: integers of rank 2."""
    return value.shape is not None and len(value.shape) == 2 and value.dtype in (ir.DataType.INT64, ir.DataType.INT32)


@dataclass(frozen=True)
class Tokens:
    """The token ids of a model; `axis` is the sequence axis, the other one the batch axis."""

    value: ir.Value
    axis: int

    @property
    def batch_axis(self) -> int:
        """The batch axis."""
        return 1 - self.axis


_BESIDE_TOKENS = ("mask", "position", "type", "segment")
"""Parts of the names of inputs that have a number for each token other than its id. Some exporters sort inputs."""


def token_input(model: Model) -> Tokens | None:
    """Returns the token ids: the first integer input of rank 2; masks, positions and token types come last.

    They are [batch, sequence], or [sequence, batch] if the dimensions are named so. None if there is no such input.
    """
    for value in sorted(
        model.graph.inputs, key=lambda v: any(part in (v.name or "").lower() for part in _BESIDE_TOKENS)
    ):
        if is_ids_like(value):
            names = [dim.value or "" if isinstance(dim, ir.SymbolicDim) else "" for dim in value.shape or ()]
            return Tokens(value, 0 if "seq" in names[0].lower() and "seq" not in names[1].lower() else 1)
    return None


def dim_name(value: ir.Value, axis: int) -> str:
    """Returns the name of a symbolic dimension of an input, or `<input>:<axis>` if it has none."""
    assert value.shape is not None
    dim = value.shape[axis]
    text = dim.value if isinstance(dim, ir.SymbolicDim) else None
    return text or f"{value.name}:{axis}"


def _primes(avoid: set[int], above: int) -> Iterator[int]:
    for candidate in itertools.count(above | 1, 2):
        prime = all(candidate % d for d in range(3, math.isqrt(candidate) + 1, 2))
        if prime and not any(constant % candidate == 0 for constant in avoid):
            yield candidate


def analyse(model: Model, dims: Mapping[str, int] | None = None, limit: int = VALUE_LIMIT) -> Facts:
    """Computes the facts of the main graph in one pass, in graph order.

    Args:
        model: a model whose graph is sorted.
        dims: sizes of the symbolic input dimensions by name; `stand_ins(model)` by default.
        limit: values with more elements are not computed.
    """
    facts = Facts(dict(dims) if dims is not None else stand_ins(model), limit)
    for value in model.graph.inputs:
        if value.shape is not None:
            sizes = tuple(
                d if isinstance(d, int) else facts.dims[dim_name(value, axis)] for axis, d in enumerate(value.shape)
            )
            facts[value] = Fact(value.dtype, sizes)
    for node in model.graph:
        infer_node(node, facts, model)
    return facts


def constants(model: Model) -> tuple[list[Facts], dict[ir.Value, Array]]:
    """Returns the facts under three sets of sizes, and the elements of every node output on which they agree.

    A graph without symbolic dimensions has one set.
    """
    small, large = stand_ins(model), stand_ins(model, above=LONG)
    views = [analyse(model, small)]
    if small:  # a static graph has only one set of sizes
        views += [analyse(model, large, limit=2 * LONG), analyse(model, dict.fromkeys(small, 1))]
    agreed: dict[ir.Value, Array] = {}
    for node in model.graph:
        for output in node.outputs:
            arrays = [view[output].value for view in views]
            first = arrays[0]
            if first is not None and all(other is not None and _same(first, other) for other in arrays[1:]):
                agreed[output] = first
    return views, agreed


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def infer_node(node: ir.Node, facts: Facts, model: Model) -> None:
    """Set the facts of the outputs of one node. Unknown operators get the recorded types and no shapes."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    if domain == "" and node.op_type == "Constant":
        return
    inputs = [facts[value] for value in node.inputs]
    if domain == "trt":
        _infer_te(node, inputs, facts)
        return
    if domain == "com.microsoft":
        _infer_contributed(node, inputs, facts)
        return
    if domain == "" and node.op_type == "Shape" and inputs[0].shape is not None:
        _infer_shape_op(node, inputs[0], facts)
        return
    if domain == "" and node.op_type == "SequenceAt":
        _infer_sequence_at(node, inputs, facts)
        return
    if domain == "" and node.op_type in ("If", "Loop", "Scan"):
        _infer_branches(node, inputs, facts, model)
        return
    inputs_known = domain == "" and all(
        i.value is not None for v, i in zip(node.inputs, inputs, strict=True) if v is not None
    )
    if inputs_known and node.op_type not in _OPAQUE and _evaluate(node, inputs, facts, model):
        return
    shapes: list[tuple[int, ...]] | None = None
    if domain == "" and node.op_type in SHAPE_RULES:
        try:
            shapes = SHAPE_RULES[node.op_type](node, inputs)
        except Disputed:
            for output in node.outputs:
                facts[output] = Fact(inputs[0].dtype)
            return
        except (ValueError, TypeError, IndexError, KeyError, RuntimeError):  # numpy broadcasts 32 dimensions at most
            shapes = None
        if shapes is not None:
            dtypes = output_dtypes(node, inputs)
            for output, shape, dtype in zip(node.outputs, shapes, dtypes, strict=False):
                facts[output] = Fact(dtype or output.dtype, tuple(int(d) for d in shape))
            return
    _infer_by_schema(node, inputs, facts, model)


_OPAQUE = {"MaxPool", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli",
    "Multinomial", "If", "Loop", "Scan",
           "SplitToSequence", "SequenceAt", "SequenceConstruct", "ConcatFromSequence", "QuantizeLinear",
           "DequantizeLinear"}  # fmt: skip
"""Operators that are not evaluated: random ones, or e.g. MaxPool, whose indices onnx's reference counts wrongly."""


def _infer_te(node: ir.Node, inputs: list[Fact], facts: Facts) -> None:
    shape = inputs[0].shape
    if node.op_type.endswith("DequantizeLinear"):
        facts[node.outputs[0]] = Fact(ir.DataType.FLOAT, shape)
        return
    facts[node.outputs[0]] = Fact(ir.DataType.FLOAT8E4M3FN, shape)
    if len(node.outputs) > 1 and shape is not None:
        facts[node.outputs[1]] = Fact(ir.DataType.FLOAT8E8M0, (*shape[:-1], -(-shape[-1] // 32)))


_LIKE_FIRST = {
    "SkipSimplifiedLayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization", "FastGelu",
    "BiasGelu", "QuickGelu", "Gelu", "RotaryEmbedding", "MoE", "QMoE", "BiasAdd",
}  # fmt: skip
"""ONNX Runtime's operators whose outputs have the shape of their first input."""


def _infer_contributed(node: ir.Node, inputs: list[Fact], facts: Facts) -> None:
    """Infer ONNX Runtime's own operators, which `export --kv-cache gqa`, `lower-ort` and GenAI's builder write.

    Others have their recorded types and no shapes.
    """
    first, op = inputs[0], node.op_type
    shapes: list[tuple[int, ...] | None] = [None] * len(node.outputs)
    dtypes: list[ir.DataType | None] = [None] * len(node.outputs)
    if op == "GroupQueryAttention" and first.shape is not None and len(first.shape) == 3:
        shapes, dtypes = _grouped_attention(node, inputs, first.shape)
    elif op == "MatMulNBits" and first.shape is not None:
        shapes, dtypes = [(*first.shape[:-1], attribute(node, "N"))], [first.dtype]
    elif op == "GatherBlockQuantized" and first.shape is not None and inputs[1].shape is not None:
        packed = 8 // attribute(node, "bits", 4) if first.dtype == ir.DataType.UINT8 else 1
        plain = not attribute(node, "gather_axis", 0)
        shapes = [(*inputs[1].shape, *first.shape[1:-1], first.shape[-1] * packed) if plain else None]
        dtypes = [inputs[2].dtype]
    elif op in _LIKE_FIRST:
        shapes, dtypes = [first.shape] * len(node.outputs), [first.dtype] * len(node.outputs)
    for output, shape, dtype in zip(node.outputs, shapes, dtypes, strict=True):
        facts[output] = Fact(output.dtype or dtype, shape)


def _grouped_attention(
    node: ir.Node, inputs: list[Fact], query: tuple[int, ...]
) -> tuple[list[tuple[int, ...] | None], list[ir.DataType | None]]:
    """Returns shapes and types of a GroupQueryAttention's outputs: the context, and the caches if it has any."""
    heads, shared = attribute(node, "num_heads"), attribute(node, "kv_num_heads")
    width = query[2] if inputs[1].shape is not None else query[2] * heads // (heads + 2 * shared)
    past = inputs[3].shape if len(inputs) > 3 else None
    present = (*past[:2], past[2] + query[1], past[3]) if past is not None and len(past) == 4 else None
    others = len(node.outputs) - 1
    cached = inputs[3].dtype if len(inputs) > 3 else inputs[0].dtype
    return [(*query[:2], width), *[present] * others], [inputs[0].dtype, *[cached] * others]


def _infer_shape_op(node: ir.Node, source: Fact, facts: Facts) -> None:
    assert source.shape is not None
    dims = np.array(source.shape, dtype=np.int64)
    start, end = attribute(node, "start", 0), attribute(node, "end", None)
    part = slice(start, end)
    facts[node.outputs[0]] = Fact(ir.DataType.INT64, (len(dims[part]),), dims[part])


def _infer_sequence_at(node: ir.Node, inputs: list[Fact], facts: Facts) -> None:
    """Infer one piece of a SplitToSequence, the only use that exporters make of sequences."""
    split = node.inputs[0].producer() if node.inputs[0] is not None else None
    if split is None or split.op_type != "SplitToSequence":
        return
    data, index = facts[split.inputs[0]], inputs[1].value
    if data.shape is None or index is None:
        return
    axis = attribute(split, "axis", 0) % len(data.shape)
    sizes = sequence_sizes(split, data.shape[axis], facts)
    if sizes is None:
        return
    shape = list(data.shape)
    shape[axis] = sizes[int(index)]
    if len(split.inputs) < 2 and not attribute(split, "keepdims", 1):
        del shape[axis]
    facts[node.outputs[0]] = Fact(data.dtype, tuple(shape))


def _infer_branches(node: ir.Node, inputs: list[Fact], facts: Facts, model: Model) -> None:
    """Infer the output types of a node with inner graphs from the outputs of the first of these graphs."""
    inner = next((a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH), None)
    if inner is not None:
        # A body of Loop takes a count and a condition first, a node of Loop its limit and a condition.
        for value, fact in zip(inner.inputs, inputs, strict=False):
            facts[value] = Fact(value.dtype or fact.dtype)
        for each in inner:
            infer_node(each, facts, model)
    branch_outputs = list(inner.outputs)[1 if node.op_type == "Loop" else 0 :] if inner is not None else []
    for index, output in enumerate(node.outputs):
        facts[output] = Fact(
            output.dtype or (facts[branch_outputs[index]].dtype if index < len(branch_outputs) else None)
        )


def sequence_sizes(split: ir.Node, size: int, facts: Facts) -> list[int] | None:
    """Returns the sizes of the pieces of a SplitToSequence along an axis of `size`; None if computed at run time."""
    if len(split.inputs) < 2 or split.inputs[1] is None:
        return [1] * size
    split_sizes = facts[split.inputs[1]].value
    if split_sizes is None:
        return None
    if split_sizes.ndim == 0:
        return [min(int(split_sizes), size - start) for start in range(0, size, int(split_sizes))]
    return [int(s) for s in split_sizes]


def _evaluate(node: ir.Node, inputs: list[Fact], facts: Facts, model: Model) -> bool:
    """Compute the elements with numpy, or with onnx's reference kernels; False if they are too many or it fails."""
    rule = VALUE_RULES.get(node.op_type)
    try:
        if rule is not None:
            if _too_large(node, inputs, facts.limit):
                return False
            result: Any = rule(node, [i.value for i in inputs])
            dtypes = output_dtypes(node, inputs)
        else:
            typed = _by_schema(node, inputs, model)
            if not _is_small(node, inputs, typed, facts.limit):
                return False
            result, dtypes = _reference(node, inputs, model), [fact.dtype for fact in typed]
    except Exception:  # an operator numpy or the reference cannot do stays unknown
        return False
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    grown = node.op_type in _GROWERS or any(i.grown for i in inputs)
    new_facts: list[Fact] = []
    for array, inferred in zip(map(np.asarray, results), dtypes, strict=False):
        dtype = inferred or ir.DataType.from_numpy(array.dtype)
        if array.size > facts.limit:
            return False
        new_facts.append(Fact(dtype, array.shape, array.astype(dtype.numpy(), copy=False), grown and array.size > 1))
    for output, fact in zip(node.outputs, new_facts, strict=False):
        facts[output] = fact
    return True


FILTERS = {"NonZero", "Compress", "Unique", "NonMaxSuppression"}
"""Operators whose result is at most as large as their inputs. Its size depends on the elements."""
_REFERENCE_LIMIT = 1 << 18
"""Most elements for onnx's reference kernels. Some of them are loops in Python."""


def _is_small(node: ir.Node, inputs: list[Fact], typed: list[Fact], limit: int) -> bool:
    """Whether the reference kernel may run: the sizes of inputs and outputs are bounded before the computation."""
    if sum(i.value.size for i in inputs if i.value is not None) > _REFERENCE_LIMIT or not typed:
        return False
    if node.op_type in FILTERS:
        return True
    return all(fact.shape is not None and math.prod(fact.shape) <= min(limit, _REFERENCE_LIMIT) for fact in typed)


def _too_large(node: ir.Node, inputs: list[Fact], limit: int) -> bool:
    """Whether the result would have too many elements. The computation must wait for the answer."""
    rule = SHAPE_RULES.get(node.op_type)
    if rule is None or (
        node.op_type not in _GROWERS and sum(i.value.size for i in inputs if i.value is not None) < 4096
    ):
        return False
    try:
        return any(math.prod(shape) > limit for shape in rule(node, inputs))
    except (ValueError, TypeError, IndexError, KeyError):
        return False


_GROWERS = {"Range", "Expand", "ConstantOfShape", "Trilu", "EyeLike", "Tile", "OneHot"}
"""Operators whose result may be much larger than their inputs."""


def _reference(node: ir.Node, inputs: list[Fact], model: Model) -> list[Array]:
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    assert isinstance(proto, onnx.NodeProto)
    names = [v.name if v is not None else "" for v in node.inputs]
    graph = onnx.helper.make_graph(
        [proto], "one", [onnx.helper.make_tensor_value_info(n, i.dtype.value, i.shape) for n, i in zip(names, inputs,
            strict=True) if n and i.dtype],
        [onnx.ValueInfoProto(name=v.name) for v in node.outputs if v.name],
    )  # fmt: skip
    evaluator = ReferenceEvaluator(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", model.opset)])
    )
    feeds = {n: i.value for n, i in zip(names, inputs, strict=True) if n}
    return list(evaluator.run(None, feeds))


def _infer_by_schema(node: ir.Node, inputs: list[Fact], facts: Facts, model: Model) -> None:
    """Infer one node by onnx's own inference, which is slower but knows every operator."""
    inferred = _by_schema(node, inputs, model)
    for index, output in enumerate(node.outputs):
        if index < len(inferred) and inferred[index].dtype is not None:
            facts[output] = inferred[index]
        else:  # stand-in sizes that do not fit say nothing about the type
            facts[output] = Fact(output.dtype or _same_type(node, index, inputs, model))


def _same_type(node: ir.Node, index: int, inputs: list[Fact], model: Model) -> ir.DataType | None:
    """Returns the type of the inputs that output `index` shares its type with by the operator's schema."""
    try:
        version = model.ir.opset_imports.get(node.domain, 1)
        schema = onnx.defs.get_schema(node.op_type, version, "" if node.domain == "ai.onnx" else node.domain)
    except (onnx.defs.SchemaError, TypeError):  # an unknown operator, or a version beyond 64 bits
        return None
    formals, results = schema.inputs, schema.outputs
    if not formals or not results:
        return None
    wanted = results[min(index, len(results) - 1)].type_str
    types = (i.dtype for place, i in enumerate(inputs) if formals[min(place, len(formals) - 1)].type_str == wanted)
    return next((dtype for dtype in types if dtype is not None), None)


def _by_schema(node: ir.Node, inputs: list[Fact], model: Model) -> list[Fact]:
    """Returns the types and, if known, the shapes of the outputs by onnx's schema.

    The list is empty if the operator or an input type is unknown.
    """
    try:
        version = model.ir.opset_imports.get(node.domain, 1)
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        proto = ir.to_proto(node)
        types, data = {}, {}
        for value, fact in zip(node.inputs, inputs, strict=True):
            if value is None or value.name is None:
                continue
            if fact.dtype is None:
                return []
            types[value.name] = onnx.helper.make_tensor_type_proto(fact.dtype.value, fact.shape)
            if fact.value is not None and fact.value.size <= 1024:
                data[value.name] = onnx.numpy_helper.from_array(fact.value)
        opsets = [onnx.helper.make_opsetid(d, v) for d, v in model.ir.opset_imports.items()]
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, proto, types, data, opset_imports=opsets, ir_version=10
        )
    except Exception:  # an unknown operator or a sequence type
        return []
    return [_fact_of(inferred.get(output.name or "")) for output in node.outputs]


def _fact_of(proto: onnx.TypeProto | None) -> Fact:
    if proto is None or not proto.HasField("tensor_type") or not proto.tensor_type.elem_type:
        return Fact()
    kind = proto.tensor_type
    dims = [d.dim_value for d in kind.shape.dim if d.HasField("dim_value")]
    has_shape = kind.HasField("shape") and len(dims) == len(kind.shape.dim)
    return Fact(ir.DataType(kind.elem_type), tuple(dims) if has_shape else None)
