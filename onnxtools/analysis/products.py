"""Weight products: the MatMul, Gemm and Conv nodes of a graph and the stored weight behind each."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, constant_tensor, is_constant_expression, is_op

_THROUGH = {
    "QuantizeLinear",
    "DequantizeLinear",
    "Cast",
    "Identity",
    "TRT_FP8QuantizeLinear",
    "TRT_FP8DequantizeLinear",
}


@dataclass(frozen=True)
class Product:
    """One product of activations with a stored weight.

    Attributes:
        node: MatMul, Gemm or Conv.
        weight: the initializer, behind Q/DQ, Cast, Identity and Transpose.
        axis: the axis of the stored weight that the product sums over (K).
        index: the index of the weight among the node's inputs.
        path: the nodes between weight and product, product side first.
    """

    node: ir.Node
    weight: ir.Value
    axis: int
    index: int
    path: tuple[ir.Node, ...]

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The stored weight."""
        tensor = constant_tensor(self.weight)
        assert tensor is not None
        return tensor

    @property
    def activation(self) -> ir.Value:
        """The other operand."""
        activation = self.node.inputs[1 - self.index]
        assert activation is not None
        return activation

    @property
    def obstacle(self) -> str:
        """The reason why the rows of the activation are not its tokens; "" if they are.

        Without such rows nothing can be learnt about the channels.
        """
        if is_constant_expression(self.activation):
            return "both operands are constants (fold-constants multiplies them)"
        if self.index == 0 and self.node.op_type != "Conv":
            return "the weight is the first operand of the product"
        return (
            "its activation is transposed (transA)"
            if self.node.op_type == "Gemm" and attribute(self.node, "transA", 0)
            else ""
        )

    @property
    def quantized(self) -> bool:
        """Whether the weight is dequantized on its path to the product."""
        return any(node.op_type.endswith("DequantizeLinear") for node in self.path)


def weight_products(model: Model) -> Iterator[Product]:
    """Yields every MatMul, Gemm and Conv of the main graph with a constant operand of rank 2 or more, in graph order.

    A node with two such operands is yielded twice.
    """
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        for index in (1, 0) if node.op_type != "Conv" else (1,):
            product = _trace(node, index)
            if product is not None:
                yield product


@dataclass(frozen=True)
class Unreached:
    """An operator with weights that no pass for products reaches.

    Attributes:
        node: its name.
        weight: name of the weight, "" if it is computed.
        reason: why, for people.
    """

    node: str
    weight: str
    reason: str


_OTHER_PRODUCTS = {
    "ConvTranspose": "transposed convolution", "LSTM": "recurrent", "GRU": "recurrent", "RNN": "recurrent",
}  # fmt: skip


def unreached(model: Model) -> Iterator[Unreached]:
    """Yields the operators with stored weights that `weight_products` leaves out, so that no pass hides them."""
    products = ("MatMul", "Gemm", "Conv")
    for node in model.graph.all_nodes():
        if not is_op(node, *products, *_OTHER_PRODUCTS):
            continue
        weight = next((v for v in node.inputs[:2] if v is not None and constant_tensor(v) is not None), None)
        place = (node.name or "", (weight.name if weight is not None else "") or "")
        if node.op_type in _OTHER_PRODUCTS:
            if weight is not None:
                yield Unreached(*place, _OTHER_PRODUCTS[node.op_type])
        elif node.graph is not model.graph:
            if weight is not None:
                yield Unreached(*place, "inside If, Loop or Scan (fold-constants takes a branch that is known)")
        elif weight is None and any(is_constant_expression(v) for v in node.inputs[:2]) and not _traced(node):
            yield Unreached(*place, "its weight is computed from constants (fold-constants --max-elements does it)")
    for function in model.ir.functions.values():
        for node in function:
            if is_op(node, *products, *_OTHER_PRODUCTS):
                name = f"{function.domain}.{function.name}"
                yield Unreached(node.name or "", "", f"inside the function {name} (inline-functions first)")


def _traced(node: ir.Node) -> bool:
    return any(_trace(node, index) is not None for index in ((1, 0) if node.op_type != "Conv" else (1,)))


def products_behind(value: ir.Value | None, products: Collection[ir.Node]) -> set[ir.Node]:
    """Returns the nearest of `products` that `value` is computed from, through any other nodes."""
    nearest: set[ir.Node] = set()
    waiting: list[ir.Value | None] = [value]
    seen: set[ir.Node] = set()
    while waiting:
        node = current.producer() if (current := waiting.pop()) is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in products:
            nearest.add(node)
        else:
            waiting += node.inputs
    return nearest


def _trace(node: ir.Node, index: int) -> Product | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    path: list[ir.Node] = []
    while value is not None and constant_tensor(value) is None:
        producer = value.producer()
        if producer is None or producer.op_type not in _THROUGH | {"Transpose"}:
            return None
        path.append(producer)
        value = producer.inputs[0]
    tensor = constant_tensor(value)
    if value is None or tensor is None or len(tensor.shape) < 2:
        return None
    rank = len(tensor.shape)
    axis = _reduction_axis(node, index, rank)
    for producer in path:  # from the product up to the weight
        if producer.op_type == "Transpose":
            perm = attribute(producer, "perm", list(range(rank))[::-1])
            axis = perm[axis]
    return Product(node, value, axis, index, tuple(path))


def _reduction_axis(node: ir.Node, index: int, rank: int) -> int:
    if node.op_type == "Conv":
        return 1
    if node.op_type == "Gemm":
        transposed = attribute(node, "transA" if index == 0 else "transB", 0)
        return (0 if transposed else 1) if index == 0 else (1 if transposed else 0)
    return rank - 1 if index == 0 else rank - 2
