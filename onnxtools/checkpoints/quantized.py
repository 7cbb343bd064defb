"""Checkpoints that are quantized already: packed weights become `QuantizedWeight`s with the same codes and scales.

The layouts are told by the names beside a module's weight, as each tool writes them:

- FP8, INT8 of compressed-tensors, modelopt and DeepSeek: `weight` with `weight_scale` (one number, one for each output,
  or one for each block) or `weight_scale_inv` (blocks of 128 x 128), and `input_scale`;
- INT4 of compressed-tensors: `weight_packed`, `weight_scale`, `weight_shape`, and `weight_zero_point`, `weight_g_idx`;
- INT4 of modelopt (AWQ): `weight` of bytes, `weight_scale`, `pre_quant_scale`;
- AutoAWQ and GPTQ: `qweight`, `qzeros`, `scales`, and `g_idx`;
- bitsandbytes NF4: `weight` of bytes with `weight.absmax` and `weight.quant_map`; it is de-quantized;
- MXFP4 of gpt-oss: stacks of experts, `X_blocks` and `X_scales`; they are de-quantized.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.storage.lazy import Tensor, cast, plane, shape_of
from onnxtools.storage.quantized_weight import Codes, QuantizedWeight
from onnxtools.storage.rows import RowTensor, Scratch, StreamedTensor, elements, read_rows

_INT4, _FP8 = ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column that each nibble of AutoAWQ's words holds (AutoAWQ, awq/utils/packing_utils.py)."""


METHODS = ("fp8", "compressed-tensors", "modelopt", "awq", "gptq", "bitsandbytes", "mxfp4")
"""The quant_methods that are read."""


@dataclass(frozen=True)
class Unpacked:
    """The weights of a quantized checkpoint.

    Attributes:
        tensors: the checkpoint's tensors, with `QuantizedWeight`s in place of their packed parts.
        notes: what became of them, for people.
        spare: biases of zeros, which GPTQ writes for layers that have none.
    """

    tensors: dict[str, Tensor]
    notes: list[str]
    spare: tuple[str, ...]


def unpacked(tensors: Mapping[str, Tensor], config: Mapping[str, Any], label: str) -> Unpacked:
    """The weights of a quantized checkpoint.

    Args:
        tensors: the checkpoint's tensors by name.
        config: its quantization_config.
        label: its path, for errors.

    Raises:
        ModelError: a layout that is not supported, or parts that do not fit each other.
    """
    reader = _Reader(tensors, config, label)
    read = reader.read()
    if not reader.kinds:
        raise ModelError(
            f"{label}: its quantization_config says {shown(config.get('quant_method'))}, and no weight is packed like "
            "that; fetch the checkpoint again"
        )
    return Unpacked(read, reader.notes(), tuple(reader.spare))


class _Reader:
    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], label: str) -> None:
        self.left, self.config, self.label = dict(tensors), config, label
        self.kinds = Counter[str]()
        self.unused: set[str] = set()
        self.spare: list[str] = []

    def read(self) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for module in sorted({name.rpartition(".")[0] for name in self.left}):
            read = self._layout(module)
            if read is not None:
                made[f"{module}.weight"] = read(module)
        for name in [name.removesuffix("_blocks") for name in self.left if name.endswith("_blocks")]:
            blocks, scales = self._take(f"{name}_blocks"), self._take(f"{name}_scales")
            if len(shape_of(blocks)) != 4 or shape_of(scales) != shape_of(blocks)[:3]:
                raise ModelError(f"{self.label}: {name}_blocks is {list(shape_of(blocks))}; fetch it again")
            made[name] = Mxfp4(blocks, scales, name)
            self.kinds["MXFP4, de-quantized"] += 1
        for name in [name for name in self.left if name.endswith((".k_scale", ".v_scale", ".output_scale"))]:
            self.left.pop(name)
            self.unused.add("scales of the cache")
        return {**self.left, **made}

    def notes(self) -> list[str]:
        kept = [
            f"{count} weights {'were ' if 'de-quantized' in kind else 'keep the checkpoint' + chr(39) + 's '}{kind}"
            for kind, count in self.kinds.items()
        ]
        return kept + [f"warning: {what} are left out" for what in sorted(self.unused)]

    def _layout(self, module: str) -> Callable[[str], Tensor] | None:
        if f"{module}.qweight" in self.left:
            method = str(self.config.get("quant_method", "gptq"))
            if method not in ("awq", "gptq"):
                raise ModelError(
                    f"{self.label}: quantization_config's quant_method {shown(method)} is not supported with qweight; "
                    "awq and gptq are"
                )
            return self._awq if method == "awq" else self._gptq
        if f"{module}.weight_packed" in self.left:
            return self._packed
        weight = self.left.get(f"{module}.weight")
        if weight is None:
            return None
        if f"{module}.weight.absmax" in self.left:
            return self._nf4
        if weight.dtype == ir.DataType.UINT8 and f"{module}.weight_scale" in self.left:
            return self._modelopt_int4
        if weight.dtype in (_FP8, ir.DataType.INT8):
            return self._eight_bits
        return None

    # --- parts -------------------------------------------------------------------------------------------------------

    def _take(self, name: str) -> Tensor:
        if name not in self.left:
            raise ModelError(f"{self.label}: {name} is missing beside its packed weight; fetch the checkpoint again")
        return self.left.pop(name)

    def _number(self, name: str) -> float | None:
        """A tensor of one positive number; None where there is none."""
        tensor = self.left.pop(name, None)
        if tensor is None:
            return None
        numbers = elements(tensor).astype(np.float64).reshape(-1)
        if len(numbers) != 1 or not 0 < numbers[0] < np.inf:
            raise ModelError(f"{self.label}: {name} is {shown(numbers.tolist())}; it must be one positive number")
        return float(numbers[0])

    def _made(self, module: str, kind: str, codes: Codes) -> QuantizedWeight:
        self.kinds[kind] += 1
        rows, columns = (int(extent) for extent in codes.codes.shape.numpy())
        along = rows if codes.in_out else columns
        if codes.block and along % codes.block:
            raise ModelError(
                f"{self.label}: {module} has {along} inputs, no multiple of its block of {codes.block}; fetch it again"
            )
        return QuantizedWeight(codes, f"{module}.weight")

    def _words(self, name: str) -> Tensor:
        """A tensor of int32 words of eight codes."""
        tensor = self._take(name)
        if tensor.dtype != ir.DataType.INT32:
            raise ModelError(f"{self.label}: {name} is {tensor.dtype.name}; words of eight codes are INT32")
        return tensor

    # --- layouts -----------------------------------------------------------------------------------------------------

    def _eight_bits(self, module: str) -> QuantizedWeight:
        weight = self._take(f"{module}.weight")
        if len(shape_of(weight)) != 2:
            raise ModelError(
                f"{self.label}: {module}.weight is {weight.dtype.name} of rank {len(shape_of(weight))}; only matrices "
                "are read"
            )
        rows, columns = shape_of(weight)
        scale = self._eight_bit_scale(module)
        name = "FP8" if weight.dtype == _FP8 else "INT8"
        activation = self._number(f"{module}.input_scale")
        for extra in ("input_zero_point", "weight_zero_point"):
            zero = self.left.pop(f"{module}.{extra}", None)
            if zero is not None and elements(zero).astype(np.int64).any():
                raise ModelError(f"{self.label}: {module}.{extra} is not 0, which is not supported; symmetric ones are")
        shape = shape_of(scale)
        if int(np.prod(shape)) == 1:
            codes = Codes(weight, _reshaped(scale, ()), input_scale=activation)
            return self._made(module, f"{name}, one scale a weight", codes)
        if shape in ((rows,), (rows, 1)):
            codes = Codes(weight, _reshaped(scale, (rows,)), input_scale=activation)
            return self._made(module, f"{name}, one scale an output", codes)
        high, wide = self._block(rows, columns, shape)
        if len(shape) != 2 or shape != (-(-rows // high), -(-columns // wide)):
            raise ModelError(
                f"{self.label}: {module} has scales {list(shape)} for {rows} x {columns} in blocks of {high} x {wide}; "
                "correct the block size in quantization_config"
            )
        blocks = Codes(weight, _RepeatedRows(scale, high, rows), block=wide, input_scale=activation)
        return self._made(module, f"{name}, blocks of {high} x {wide}", blocks)

    def _eight_bit_scale(self, module: str) -> Tensor:
        factors = self.left.pop(f"{module}.SCB", None)  # bitsandbytes: the largest magnitude of each output
        if factors is not None:
            self.left.pop(f"{module}.weight_format", None)
            return ir.Tensor(elements(factors).astype(np.float32) / np.float32(127), name=f"{module}.weight_scale")
        inverse = self.left.pop(f"{module}.weight_scale_inv", None)
        return self._take(f"{module}.weight_scale") if inverse is None else inverse

    def _block(self, rows: int, columns: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """Outputs and inputs of a block, by quantization_config, or where the scales say it without a remainder."""
        groups = self.config.get("config_groups")
        weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
        said = [w["block_structure"] for w in weights if isinstance(w, dict) and w.get("block_structure")]
        size = self.config.get("weight_block_size") or (said[0] if said else None)
        if size is None and len(shape) == 2 and all(shape) and not rows % shape[0] and not columns % shape[1]:
            size = [rows // shape[0], columns // shape[1]]
        pair = size if isinstance(size, list) and len(size) == 2 else [0, 0]
        if not all(type(extent) is int and 0 < extent <= 1 << 20 for extent in pair):
            raise ModelError(
                f"{self.label}: the blocks of its scales are {shown(size)} in quantization_config; they must be two "
                "positive integers"
            )
        return pair[0], pair[1]

    def _packed(self, module: str) -> QuantizedWeight:
        """compressed-tensors, pack-quantized: eight codes + 8 in a word, along the inputs."""
        if self.left[f"{module}.weight_packed"].dtype == ir.DataType.UINT8:
            raise ModelError(f"{self.label}: {module} is NVFP4, which is not supported; INT4 and FP8 are")
        words = self._words(f"{module}.weight_packed")
        rows, columns = (int(n) for n in elements(self._take(f"{module}.weight_shape")))
        scale, zeros = self._take(f"{module}.weight_scale"), self.left.pop(f"{module}.weight_zero_point", None)
        order = self._order(self.left.pop(f"{module}.weight_g_idx", None), columns)
        if shape_of(words) != (rows, -(-columns // 8)):
            raise ModelError(
                f"{self.label}: {module}.weight_packed is {list(shape_of(words))}, which holds no {rows} x {columns} "
                "weights of 4 bits; other widths are not supported"
            )
        places = np.arange(columns) if order is None else order
        codes = StreamedTensor(
            words, lambda part, _: np.ascontiguousarray(_nibbles(part)[:, places]), dtype=_INT4,
            name=f"{module}.codes", shape=(rows, columns),
        )  # fmt: skip
        count = int(np.prod(shape_of(scale)))
        if zeros is None and count in (1, rows) and shape_of(scale)[-1:] in ((), (1,), (rows,)):
            kind = "output" if count == rows else "weight"
            plain = Codes(codes, _reshaped(scale, (rows,) if count == rows else ()))
            return self._made(module, f"INT4, one scale {'an' if count == rows else 'a'} {kind}", plain)
        groups = shape_of(scale)[-1]
        if shape_of(scale) != (rows, groups) or columns % groups:
            raise ModelError(
                f"{self.label}: {module} has scales {list(shape_of(scale))} for {rows} x {columns}; fetch it again"
            )
        zero = None if zeros is None else self._zero_points(module, zeros, rows, groups)
        parts = Codes(codes, scale, zero, block=columns // groups, input_order=order)
        return self._made(module, f"INT4, blocks of {columns // groups}", parts)

    def _zero_points(self, module: str, zeros: Tensor, rows: int, groups: int) -> Tensor:
        """compressed-tensors' zero points [out, groups]: int8, or packed in words of eight outputs."""
        if zeros.dtype == ir.DataType.INT8 and shape_of(zeros) == (rows, groups):
            points = elements(zeros).astype(np.int8).view(ml_dtypes.int4)
        elif zeros.dtype == ir.DataType.INT32 and shape_of(zeros) == (-(-rows // 8), groups):
            points = np.ascontiguousarray(_nibbles(elements(zeros).T)[:, :rows].T)
        else:
            raise ModelError(
                f"{self.label}: {module}.weight_zero_point is {zeros.dtype.name} {list(shape_of(zeros))}; INT32 words "
                "of eight outputs or INT8 are read"
            )
        return ir.Tensor(points, dtype=_INT4, name=f"{module}.zeros")

    def _order(self, groups: Tensor | None, inputs: int) -> np.ndarray | None:
        """The inputs sorted by their group; None where they are sorted (or there are no groups: -1)."""
        if groups is None:
            return None
        index = elements(groups).astype(np.int64).reshape(-1)
        if (index == -1).all():
            return None
        fits = len(index) == inputs and (index >= 0).all() and index.max() < inputs
        if not fits or len(set(np.bincount(index).tolist())) > 1:
            raise ModelError(
                f"{self.label}: a g_idx does not put {inputs} inputs into groups of one size; fetch it again"
            )
        return None if (np.diff(index) >= 0).all() else np.argsort(index, kind="stable")

    def _modelopt_int4(self, module: str) -> QuantizedWeight:
        """modelopt, W4A16_AWQ: [out / 2, in] bytes of two neighbouring outputs, the first in the low nibble."""
        packed, scale = self._take(f"{module}.weight"), self._take(f"{module}.weight_scale")
        if scale.dtype in (_FP8, ir.DataType.UINT8) or len(shape_of(scale)) != 2:
            raise ModelError(f"{self.label}: {module} is NVFP4 or MXFP4, which is not supported; INT4 (W4A16_AWQ) is")
        half, columns = shape_of(packed)

        def rows(part: np.ndarray, _: int) -> np.ndarray:
            return np.stack([part & 15, part >> 4], axis=1).reshape(-1, columns).astype(np.int8)

        codes = _TwiceTheRows(packed, lambda part, start: _signed(rows(part, start)), (2 * half, columns), module)
        groups = shape_of(scale)[1]
        factors = self.left.pop(f"{module}.pre_quant_scale", None)
        parts = Codes(codes, scale, block=columns // groups, input_factors=factors)
        return self._made(module, f"INT4 (AWQ), blocks of {columns // groups}", parts)

    def _awq(self, module: str) -> QuantizedWeight:
        """AutoAWQ's GEMM: words [in, out / 8] of eight columns in `_AWQ_ORDER`; zero points likewise."""
        if self.config.get("version", "gemm") not in ("gemm", "GEMM"):
            raise ModelError(
                f"{self.label}: AWQ of version {shown(self.config.get('version'))} is not supported; gemm is"
            )
        self._bits()
        words, zeros = self._words(f"{module}.qweight"), self._words(f"{module}.qzeros")
        scale = self._take(f"{module}.scales")
        inputs, outputs = shape_of(words)[0], 8 * shape_of(words)[1]
        columns = np.argsort(np.arange(outputs).reshape(-1, 8)[:, _AWQ_ORDER].reshape(-1), kind="stable")
        codes = StreamedTensor(
            words, lambda part, _: np.ascontiguousarray(_nibbles(part)[:, columns]), dtype=_INT4,
            name=f"{module}.codes", shape=(inputs, outputs),
        )  # fmt: skip
        return self._blocked(module, codes, scale, _nibbles(elements(zeros))[:, columns], "INT4 (AWQ)")

    def _gptq(self, module: str) -> QuantizedWeight:
        """GPTQ: words [in / 8, out] of eight inputs, zero points [groups, out / 8], stored minus 1 before v2."""
        self._bits()
        words, zeros = self._words(f"{module}.qweight"), self._words(f"{module}.qzeros")
        scale = self._take(f"{module}.scales")
        outputs, inputs = shape_of(words)[1], 8 * shape_of(words)[0]
        order = self._order(self.left.pop(f"{module}.g_idx", None), inputs)
        bias = self.left.get(f"{module}.bias")
        if bias is not None and not elements(bias).any():
            self.spare.append(f"{module}.bias")
        codes: Tensor = _Inputs(words, (inputs, outputs), order, f"{module}.codes")
        minus = 0 if self.config.get("checkpoint_format") == "gptq_v2" else 1
        points = (_nibbles(elements(zeros)).astype(np.int8) + minus).astype(np.int8)  # may be 16 - 8 = 8
        if (points > 7).any():
            raise ModelError(f"{self.label}: {module}.qzeros holds zero points of 16, which INT4 does not have")
        return self._blocked(module, codes, scale, _signed(points), "INT4 (GPTQ)", order)

    def _bits(self) -> None:
        bits = self.config.get("bits", self.config.get("w_bit", 4))
        if str(bits) != "4":
            raise ModelError(f"{self.label}: weights of {shown(bits)} bits are not supported; 4 bits are")

    def _blocked(
        self, module: str, codes: Tensor, scale: Tensor, points: np.ndarray, kind: str, order: np.ndarray | None = None
    ) -> QuantizedWeight:
        """Codes [in, out] with scales and zero points [groups, out]."""
        inputs, outputs = shape_of(codes)
        groups = shape_of(scale)[0]
        if shape_of(scale) != (groups, outputs) or points.shape != (groups, outputs) or inputs % groups:
            raise ModelError(
                f"{self.label}: {module} has scales {list(shape_of(scale))} and zero points {list(points.shape)} for "
                f"{inputs} x {outputs}; fetch it again"
            )
        zero = ir.Tensor(np.ascontiguousarray(points), dtype=_INT4, name=f"{module}.zeros")
        symmetric = not points.astype(np.int8).any()
        size = inputs // groups
        parts = Codes(codes, scale, None if symmetric else zero, block=size, in_out=True, input_order=order)
        return self._made(module, f"{kind}, blocks of {size}{'' if symmetric else ', zero points'}", parts)

    def _nf4(self, module: str) -> Tensor:
        """bitsandbytes: bytes of two codes, the first in the high nibble; absmax of blocks may be quantized itself."""
        packed, name = self._take(f"{module}.weight"), f"{module}.weight"
        state = next((n for n in self.left if n.startswith(f"{name}.quant_state.bitsandbytes__")), None)
        if state is None:
            raise ModelError(f"{self.label}: {name} has no quant_state; fetch the checkpoint again")
        said = json.loads(bytes(elements(self.left.pop(state)).astype(np.uint8)))
        if packed.dtype != ir.DataType.UINT8:
            packed = _bytes_of(packed)
        table = elements(self._take(f"{name}.quant_map")).astype(np.float32)
        absmax = elements(self._take(f"{name}.absmax"))
        if f"{name}.nested_absmax" in self.left:
            nested = elements(self._take(f"{name}.nested_absmax")).astype(np.float32)
            steps = elements(self._take(f"{name}.nested_quant_map")).astype(np.float32)
            size = int(said["nested_blocksize"])
            absmax = steps[absmax] * np.repeat(nested, size)[: len(absmax)] + np.float32(said["nested_offset"])
        shape, block = tuple(int(n) for n in said["shape"]), int(said["blocksize"])
        if absmax.dtype.kind != "f" or len(absmax) != -(-int(np.prod(shape)) // block):
            raise ModelError(
                f"{self.label}: {name}.absmax does not fit {list(shape)} in blocks of {block}; fetch it again"
            )
        self.kinds["NF4, de-quantized"] += 1
        dtype = {"bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16}.get(
            said.get("dtype"), ir.DataType.FLOAT
        )
        return cast(_Nf4(packed, table, absmax.astype(np.float32), block, shape, name), dtype)


def _nibbles(words: np.ndarray) -> np.ndarray:
    """Eight codes of each int32 word along the last axis, lowest bits first, as int4: the stored code minus 8."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    codes = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts & 15
    return (codes.reshape(*words.shape[:-1], -1).astype(np.int8) - 8).view(ml_dtypes.int4)


def _signed(codes: np.ndarray) -> np.ndarray:
    """int8 codes whose low nibble is a signed value, as int4."""
    return (((codes & 15) ^ 8) - 8).astype(np.int8).view(ml_dtypes.int4)


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Scales of one number or of the outputs, in memory."""
    return ir.Tensor(elements(tensor).reshape(shape), dtype=tensor.dtype, name=tensor.name)


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor that another type stands for (bnb_4bit_quant_storage), [bytes, 1]."""
    data = elements(tensor).reshape(-1).view(np.uint8)
    return ir.Tensor(data.reshape(-1, 1), dtype=ir.DataType.UINT8, name=tensor.name)


class _RepeatedRows(RowTensor):
    """Scales of blocks of `high` rows, one row for each row of the weight."""

    __slots__ = ("_high",)

    def __init__(self, scale: Tensor, high: int, rows: int) -> None:
        super().__init__((rows, shape_of(scale)[1]), scale.dtype, scale.name or "", [scale])
        self.row_multiple, self._high = 1, high

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        first = start // self._high
        part = read_rows(self.sources[0], first, -(-stop // self._high))
        return np.repeat(part, self._high, axis=0)[start - first * self._high :][: stop - start]


class _TwiceTheRows(RowTensor):
    """Rows that are packed in pairs."""

    __slots__ = ("_function",)

    def __init__(
        self, packed: Tensor, function: Callable[[np.ndarray, int], np.ndarray], shape: tuple[int, int], module: str
    ) -> None:
        super().__init__(shape, _INT4, f"{module}.codes", [packed])
        self._function = function

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        first = start // 2
        whole = self._function(read_rows(self.sources[0], first, -(-stop // 2)), first)
        return np.ascontiguousarray(whole[start - 2 * first : stop - 2 * first])


class _Inputs(RowTensor):
    """GPTQ's codes [in, out] from words of eight inputs, in the order of the groups."""

    __slots__ = ("_order",)

    def __init__(self, words: Tensor, shape: tuple[int, int], order: np.ndarray | None, name: str) -> None:
        super().__init__(shape, _INT4, name, [words])
        self._order = order

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        places = np.arange(start, stop) if self._order is None else self._order[start:stop]
        low, high = int(places.min()) // 8, int(places.max()) // 8 + 1
        words = read_rows(self.sources[0], low, high).view(np.uint32)
        codes = words[places // 8 - low] >> (4 * (places % 8)).astype(np.uint32)[:, None] & 15
        return (codes.astype(np.int8) - 8).view(ml_dtypes.int4)


class Mxfp4(RowTensor):
    """De-quantized rows [..., out, in] of blocks of 32 E2M1 codes with an E8M0 scale (OCP MX specification 1.0, 5.3).

    Args:
        blocks: uint8 [..., out, in / 32, 16], the first of two codes in the low nibble.
        scales: uint8 [..., out, in / 32].
        name: the weight's name.
    """

    _TABLE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

    def __init__(self, blocks: Tensor, scales: Tensor, name: str) -> None:
        *leading, count, _ = shape_of(blocks)
        super().__init__((*leading, 32 * count), ir.DataType.BFLOAT16, name, [blocks, scales])

    def plane(self, index: int) -> Mxfp4:
        """The weight of one expert."""
        return Mxfp4(plane(self.sources[0], index), plane(self.sources[1], index), self.name or "")

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        packed, scales = (read_rows(source, start, stop) for source in self.sources)
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 32)
        wide = self._TABLE[codes] * np.exp2(scales.astype(np.float32) - 127)[..., None]
        return wide.reshape(stop - start, *shape_of(self)[1:]).astype(ml_dtypes.bfloat16)


class _Nf4(RowTensor):
    """De-quantized rows: two codes of a table in a byte, with one magnitude for each block of elements."""

    __slots__ = ("_absmax", "_block", "_table")

    def __init__(
        self, packed: Tensor, table: np.ndarray, absmax: np.ndarray, block: int, shape: tuple[int, ...], name: str
    ) -> None:
        super().__init__(shape, ir.DataType.FLOAT, name, [packed])
        self.row_multiple = 2 if shape[1] % 2 else 1
        self._table, self._absmax, self._block = table, absmax, block

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> np.ndarray:
        width = shape_of(self)[1]
        first, last = start * width, stop * width
        packed = read_rows(self.sources[0], first // 2, -(-last // 2)).reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: last - first]
        scale = self._absmax[np.arange(first, last) // self._block]
        return np.asarray(self._table[codes] * scale).reshape(-1, width)
