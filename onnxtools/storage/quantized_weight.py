"""`QuantizedWeight`: a weight that a checkpoint stores quantized, as the codes and scales that ONNX knows.

As a tensor it is the matrix [out, in] in float32, de-quantized row by row; a graph takes its codes instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxtools.storage.rows import RowTensor, Scratch, read_rows

Tensor = ir.TensorProtocol


@dataclass(frozen=True)
class Codes:
    """Codes q and scales of a weight (q - zero) x scale.

    Attributes:
        codes: FP8, INT8 or INT4, [out, in], or [in, out] with `in_out`.
        scale: one number [], one for each output [out], or with `block` one for each block, shaped like the codes.
        zero: zero points in the codes' type and the scale's shape; None for 0.
        block: inputs of a block; 0 without blocks.
        in_out: the codes are [in, out].
        input_scale: the scale of the activation; None leaves it as it is.
        input_factors: factors of the inputs, [in] (AWQ's pre_quant_scale).
        input_order: the inputs in the order of the codes' inputs, int64 [in] (GPTQ's act-order).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    block: int = 0
    in_out: bool = False
    input_scale: float | None = None
    input_factors: Tensor | None = None
    input_order: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        first, second = (int(extent) for extent in self.codes.shape.numpy())
        return (second, first) if self.in_out else (first, second)


class QuantizedWeight(RowTensor):
    """A weight [out, in], float32 as a tensor."""

    __slots__ = ("parts",)

    def __init__(self, parts: Codes, name: str) -> None:
        super().__init__(parts.shape, ir.DataType.FLOAT, name)
        self.parts = parts

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        p = self.parts
        if p.in_out:
            return np.ascontiguousarray(self._decoded(0, p.shape[1])[:, start:stop].T)
        return self._decoded(start, stop)

    def _decoded(self, start: int, stop: int) -> np.ndarray:
        """(q - zero) x scale of rows of the codes, float32; with `in_out` of all rows, in the order of the inputs."""
        p = self.parts
        wide = read_rows(p.codes, start, stop).astype(np.float32)
        along = not p.in_out
        if p.zero is not None:
            wide -= _spread(p.zero, p.block, wide.shape, start, along=along)
        wide *= _spread(p.scale, p.block, wide.shape, start, along=along)
        if p.input_order is not None:
            ordered = np.empty_like(wide)
            ordered[(slice(None), p.input_order) if along else p.input_order] = wide
            wide = ordered
        if p.input_factors is not None:
            factors = read_rows(p.input_factors, 0, p.shape[1]).astype(np.float32)
            wide *= factors if along else factors[:, None]
        return wide


def _spread(scale: Tensor, block: int, shape: tuple[int, ...], start: int, *, along: bool) -> np.ndarray:
    """Scales or zero points of rows of the codes, in a shape that broadcasts with them.

    `along` is whether the inputs are the second axis of the codes.
    """
    if not scale.shape.numpy():
        return np.asarray(scale.numpy()).astype(np.float32)
    rows = shape[0] if along or not block else shape[0] // block
    part = read_rows(
        scale, start if along else start // max(block, 1), (start if along else start // max(block, 1)) + rows
    )
    wide = part.astype(np.float32)
    if block:
        return np.repeat(wide, block, axis=1 if along else 0)
    return wide[:, None] if along else wide[None, :]
