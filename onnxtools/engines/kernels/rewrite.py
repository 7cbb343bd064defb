"""Replaces ONNX Runtime's operators by onnxtools' CUDA kernels for a decode step, in the graph of a session.

The file is not changed. A decode step reads each weight once for a few rows, and ONNX Runtime launches a kernel each
for product, bias, activation, unpacking of queries and normalization. The operators of the domain `onnxtools`
(engines/kernels/cuda) launch one kernel each, which starts while the kernel before still runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.products import Product, weight_products
from onnxtools.ir.edit import Builder, remove_unused, rename_or_bypass
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, constant_tensor, is_op, small_constant
from onnxtools.storage.lazy import shape_of

DOMAIN = "onnxtools"
_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_GQA_DEFAULTS = {
    "local_window_size": -1,
    "softcap": 0.0,
    "smooth_softmax": 0,
    "qk_output": 0,
    "k_quant_type": "NONE",
    "v_quant_type": "NONE",
}
_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_PLAIN_NORMS = {"LayerNormalization": _NORMS[0], "RMSNormalization": _NORMS[1]}
_EPSILON = dict.fromkeys(_NORMS, 1e-12) | dict.fromkeys(_PLAIN_NORMS, 1e-5)
"""Default epsilon of each norm."""


def use_kernels(model: Model) -> Counter[str]:
    """Replace operators of `model` by those of the domain `onnxtools`, where they compute the same.

    - Gemm of rows and a weight [N, K] in fp16 or bf16, K a multiple of 64: Linear, with the bias and the tanh GELU that
      follow it;
    - com.microsoft.GroupQueryAttention of packed queries without a window, cap or quantized cache: GroupQueryAttention;
    - the nodes with which `export --logits last` picks each row's last token, where caches are shared buffers:
      LastToken;
    - com.microsoft.Skip(Simplified)LayerNormalization, LayerNormalization and RMSNormalization of up to 16384 channels:
      the first two.

    Returns:
        How many `products`, `attentions`, `norms` and `picks` were replaced.
    """
    build, counts = Builder(model), Counter[str]()
    for product in list(weight_products(model)):
        if _is_linear(product):
            _to_linear(build, product)
            counts["products"] += 1
    for node in list(model.graph):
        if is_op(node, "GroupQueryAttention", domain="com.microsoft") and _is_packed(node):
            _to_attention(build, node)
            counts["attentions"] += 1
        elif is_op(node, *_NORMS, domain="com.microsoft") and _is_norm(node, node.inputs[2:]):
            _to_norm(build, node, node.op_type, node.inputs)
            counts["norms"] += 1
        elif is_op(node, *_PLAIN_NORMS) and attribute(node, "axis", -1) == -1 and _is_norm(node, node.inputs[1:]):
            _to_norm(build, node, _PLAIN_NORMS[node.op_type], [node.inputs[0], None, *node.inputs[1:]])
            counts["norms"] += 1
        elif (mask := _mask_of_last(node)) is not None:
            build.before = node
            _replace(
                build,
                node.outputs,
                [build.op("LastToken", [node.inputs[0], mask], f"{node.name}/LastToken", domain=DOMAIN)],
            )
            counts["picks"] += 1
    if counts:
        model.graph.opset_imports[DOMAIN] = 1
        remove_unused(model)
    return counts


def _is_linear(product: Product) -> bool:
    node, tensor = product.node, product.tensor
    plain = (
        is_op(node, "Gemm")
        and not product.path
        and product.index == 1
        and product.axis == 1
        and not attribute(node, "transA", 0)
    )
    if not plain or tensor.dtype not in _TYPES or len(tensor.shape) != 2 or shape_of(tensor)[1] % 64:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0 and (
        bias is None or _is_bias(bias, shape_of(tensor)[0])
    )


def _is_bias(value: ir.Value | None, size: int) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and tensor.dtype in _TYPES and shape_of(tensor) in ((size,), (1, size))


def _to_linear(build: Builder, product: Product) -> None:
    node, size = product.node, shape_of(product.tensor)[0]
    bias, end, activation = node.inputs[2] if len(node.inputs) > 2 else None, node, "NONE"
    gelu = _only_user(node)
    if gelu is not None and bias is None and is_op(gelu, "FastGelu", domain="com.microsoft"):
        added = gelu.inputs[1] if len(gelu.inputs) > 1 else None
        if added is None or _is_bias(added, size):
            bias, end, activation = added, gelu, "GELU"
    elif gelu is not None and is_op(gelu, "Gelu") and attribute(gelu, "approximate", "none") == "tanh":
        end, activation = gelu, "GELU"
    # Queries, keys and values: the graph adds the bias after the reshape to [batch, sequence, size]; Linear adds it
    # before.
    shaped = _only_user(node) if end is node and bias is None else None
    later = (
        _only_user(shaped)
        if shaped is not None and is_op(shaped, "Reshape") and _last_of(shaped.inputs[1]) == size
        else None
    )
    if (
        shaped is not None
        and later is not None
        and is_op(later, "Add")
        and later.inputs[0] is shaped.outputs[0]
        and _is_bias(later.inputs[1], size)
    ):
        bias = later.inputs[1]
        rename_or_bypass(build.graph, later.outputs[0], shaped.outputs[0])
    build.before = end
    inputs = [product.activation, product.weight, *([bias] if bias is not None else [])]
    value = build.op("Linear", inputs, f"{node.name}/Linear", domain=DOMAIN, activation=activation)
    _replace(build, end.outputs, [value])


def _replace(build: Builder, old: Sequence[ir.Value], new: Sequence[ir.Value]) -> None:
    """Let each value of `new` take the place, type and shape of its value of `old`."""
    for before, after in zip(old, new, strict=True):
        after.type, after.shape = before.type, before.shape
        rename_or_bypass(build.graph, before, after)


def _only_user(node: ir.Node) -> ir.Node | None:
    """The only node that reads the first output of `node`, if it is in the same graph; else None."""
    uses = list(node.outputs[0].uses())
    single = len(uses) == 1 and not node.outputs[0].is_graph_output() and uses[0].node.graph is node.graph
    return uses[0].node if single else None


def _last_of(shape: ir.Value | None) -> int | None:
    """The last dimension of a Reshape's target, if it is stored; else None."""
    while shape is not None and is_op(shape.producer(), "Concat"):
        shape = shape.producer().inputs[-1]  # type: ignore[union-attr]
    dims = small_constant(shape)
    return int(dims.ravel()[-1]) if dims is not None and dims.size else None


def _is_packed(node: ir.Node) -> bool:
    past = node.inputs[3] if len(node.inputs) > 3 else None
    more = [value for value in node.inputs[9:] if value is not None]
    if past is None or past.shape is None or not isinstance(past.shape[-1], int):
        return False
    if past.dtype not in _TYPES or node.inputs[1] is not None or node.inputs[2] is not None or more:
        return False
    return len(node.outputs) == 3 and all(
        attribute(node, name, default) == default for name, default in _GQA_DEFAULTS.items()
    )


def _to_attention(build: Builder, node: ir.Node) -> None:
    past = node.inputs[3]
    assert past is not None and past.shape is not None
    size, rotary = past.shape[3], attribute(node, "do_rotary", 0)
    assert isinstance(size, int)
    inputs = [node.inputs[0], *node.inputs[3:7], *(node.inputs[7:9] if rotary else [])]
    build.before = node
    outputs = build.ops(
        "GroupQueryAttention",
        inputs,
        f"{node.name}/onnxtools",
        outputs=3,
        domain=DOMAIN,
        num_heads=attribute(node, "num_heads"),
        kv_num_heads=attribute(node, "kv_num_heads"),
        do_rotary=rotary,
        rotary_interleaved=attribute(node, "rotary_interleaved", 0),
        scale=float(attribute(node, "scale", 0.0) or size**-0.5),
    )
    _replace(build, node.outputs, outputs)


def _is_norm(node: ir.Node, constants: Sequence[ir.Value | None]) -> bool:
    """Whether the norm kernel can replace `node`.

    The kernel fetches `constants` (the scale and optional biases) ahead, so they must be stored vectors. It does not
    compute the statistics outputs.
    """
    scale = constant_tensor(constants[0])
    if (
        scale is None
        or len(scale.shape) != 1
        or any(value.uses() or value.is_graph_output() for value in node.outputs[1:3])
    ):
        return False
    width = shape_of(scale)[0]
    return (
        0 < width <= 16384 and width % 16 == 0 and all(value is None or _is_bias(value, width) for value in constants)
    )


def _to_norm(build: Builder, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None]) -> None:
    build.before = node
    epsilon = float(attribute(node, "epsilon", _EPSILON[node.op_type]))
    # The norm, and the sum if it is used.
    outputs = [node.outputs[0], *(value for value in node.outputs[3:] if value.uses() or value.is_graph_output())]
    results = build.ops(
        op_type, list(inputs), f"{node.name}/onnxtools", outputs=len(outputs), domain=DOMAIN, epsilon=epsilon
    )
    _replace(build, outputs, results)


_INDEX_OF_LAST: tuple[tuple[str, tuple[int | None, ...]], ...] = (
    ("Expand", (None,)), ("Unsqueeze", (2,)), ("Max", (0,)), ("Sub", (1,)), ("ReduceSum", (1,)),
    ("Slice", (None, np.iinfo(np.int64).max, 1)),
)  # fmt: skip
"""The operators of max(sum(mask[:, -new:]) - 1, 0), from the last one back to the mask.

Each has the constants that follow its first input; None is any value.
"""


def _mask_of_last(node: ir.Node) -> ir.Value | None:
    """The mask int64 [batch, total], if `node` picks each row's last token of [batch, new, width] by it; else None."""
    if not is_op(node, "GatherElements") or attribute(node, "axis", 0) != 1:
        return None
    mask, steps = node.inputs[1], []
    for op_type, constants in _INDEX_OF_LAST:
        steps.append(_inputs(mask, op_type, *constants))
        if not steps[-1]:
            return None
        mask = steps[-1][0]
    rows, new = _inputs(node.inputs[0], "Reshape", None), _inputs(steps[-1][1], "Neg")
    shape, target = _inputs(rows[1], "Concat", None, None) if rows else [], _inputs(steps[0][1], "Concat", None)
    if not (new and shape and target) or shape[1] is not new[0] or target[0] is not shape[0]:
        return None
    width, picked = small_constant(shape[2]), small_constant(target[1])
    if width is None or picked is None or width.size != 1 or picked.tolist() != [1, width.item()] or width.item() % 8:
        return None
    source: ir.Node | None = rows[0].producer()
    while source is not None and is_op(source, "Reshape"):
        source = source.inputs[0].producer() if source.inputs[0] is not None else None
    ours = source is not None and source.domain == DOMAIN  # its type is then one that the kernel takes
    return mask if ours and mask is not None and mask.dtype == ir.DataType.INT64 else None


def _inputs(value: ir.Value | None, op_type: str, *constants: int | None) -> list[ir.Value]:
    """The inputs of the node that makes `value`, if it is an `op_type` with these constants; else none.

    The inputs after the first must equal `constants`, one each; None stands for any value.
    """
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, op_type) or len(node.inputs) != 1 + len(constants):
        return []
    fit = all(
        constant is None or _only_element(operand) == constant
        for operand, constant in zip(node.inputs[1:], constants, strict=True)
    )
    return [operand for operand in node.inputs if operand is not None] if fit and None not in node.inputs else []


def _only_element(value: ir.Value | None) -> int | None:
    elements = small_constant(value)
    return int(elements.item()) if elements is not None and elements.size == 1 else None
