"""Are our CUDA kernels right? Each operator of the domain `onnxtools` on a GPU against NumPy in float64, over types,
shapes and options.

The relative error ‖out - reference‖ / ‖reference‖ must stay under 1e-3 in fp16 and 8e-3 in bf16: some roundings of the
result. Outputs are filled with NaN before each run, inputs are drawn anew. Exits with 1 where one is off.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from onnxtools.engines.kernels.library import device_capability, find_nvcc, kernel_library
from onnxtools.engines.kernels.rewrite import DOMAIN
from onnxtools.engines.runtimes.onnxrt.ort_session import choose_device

Array = np.ndarray[Any, Any]
DTYPES = {
    "fp16": (np.dtype(np.float16), onnx.TensorProto.FLOAT16, 1e-3),
    "bf16": (np.dtype(ml_dtypes.bfloat16), onnx.TensorProto.BFLOAT16, 8e-3),
}
RANDOM = np.random.default_rng(0)


def session(
    library: str, nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
) -> Any:
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(helper.make_graph(nodes, "case", inputs, outputs), opset_imports=opsets, ir_version=9)
    settings = ort.SessionOptions()
    settings.register_custom_ops_library(library)
    return ort.InferenceSession(model.SerializeToString(), settings, providers=["CUDAExecutionProvider"])


class Case:
    """One node in a session of its own."""

    def __init__(
        self,
        library: str,
        op: str,
        dtype: str,
        inputs: dict[str, Array | None],
        outputs: dict[str, tuple[int, ...]],
        **attributes: Any,
    ) -> None:
        self.numpy, self.onnx, _ = DTYPES[dtype]
        self.values = {name: self._value(array) for name, array in inputs.items() if array is not None}
        kinds = {"tensor(int32)": onnx.TensorProto.INT32, "tensor(int64)": onnx.TensorProto.INT64}
        infos = [
            helper.make_tensor_value_info(name, kinds.get(value.data_type(), self.onnx), [None] * len(value.shape()))
            for name, value in self.values.items()
        ]
        # ONNX Runtime hands out no bf16 to NumPy: fp32 beside it, and the node's own outputs where they share memory
        # with an input.
        casts = [helper.make_node("Cast", [name], [f"{name}_fp32"], to=onnx.TensorProto.FLOAT) for name in outputs]
        results = [
            helper.make_tensor_value_info(name, self.onnx, [None] * len(shape)) for name, shape in outputs.items()
        ]
        results += [
            helper.make_tensor_value_info(f"{name}_fp32", onnx.TensorProto.FLOAT, [None] * len(shape))
            for name, shape in outputs.items()
        ]
        node = helper.make_node(
            op,
            [name if array is not None else "" for name, array in inputs.items()],
            list(outputs),
            domain=DOMAIN,
            **attributes,
        )
        self.session = session(library, [node, *casts], infos, results)
        self.outputs = outputs

    def _value(self, array: Array) -> Any:
        if array.dtype.kind == "i":
            return ort.OrtValue.ortvalue_from_numpy(array, *(("cuda", 0) if array.ndim else ("cpu", 0)))
        kept = np.ascontiguousarray(array.astype(self.numpy))
        made = ort.OrtValue.ortvalue_from_shape_and_type(list(kept.shape), self.onnx, "cuda", 0)
        made.update_inplace(kept if self.numpy == np.float16 else kept.view(np.uint16))
        return made

    def run(self, shared: dict[str, str] | None = None) -> list[Array]:
        """Outputs in float64; `shared` names the input whose memory an output takes."""
        binding = self.session.io_binding()
        for name, value in self.values.items():
            binding.bind_ortvalue_input(name, value)
        made = {}
        for name, shape in self.outputs.items():
            source = (shared or {}).get(name)
            made[name] = self.values[source] if source else self._value(np.full(shape, np.nan))
            binding.bind_ortvalue_output(name, made[name])
        for name in self.outputs:
            binding.bind_output(f"{name}_fp32", "cpu", 0)
        self.session.run_with_iobinding(binding)
        return [value.numpy().astype(np.float64) for value in binding.get_outputs()[len(made) :]]


def rounded(dtype: str, *shape: int, scale: float = 1.0) -> Array:
    """Random numbers as the type holds them."""
    return (RANDOM.standard_normal(shape) * scale).astype(DTYPES[dtype][0]).astype(np.float64)


def error(out: Array, reference: Array) -> float:
    return float(np.linalg.norm(out - reference) / np.linalg.norm(reference))


def gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def linear(library: str, dtype: str, m: int, n: int, k: int, bias: bool, activation: str) -> float:
    x, w, b = rounded(dtype, m, k), rounded(dtype, n, k, scale=k**-0.5), rounded(dtype, 1, n) if bias else None
    expected = x @ w.T + (b if b is not None else 0)
    case = Case(
        library, "Linear", dtype, {"x": x, "w": w, **({"b": b} if bias else {})}, {"y": (m, n)}, activation=activation
    )
    return error(case.run()[0], gelu(expected) if activation == "GELU" else expected)


def norm(library: str, dtype: str, rows: int, width: int, rms: bool, shift: bool, bias: bool, given: str) -> float:
    x, skip, scale = rounded(dtype, rows, width), rounded(dtype, rows, width) if given else None, rounded(dtype, width)
    s, b = rounded(dtype, width) if shift else None, rounded(dtype, width) if bias else None
    total = x + (skip if skip is not None else 0) + (b if b is not None else 0)
    centred = total if rms else total - total.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * scale + (s if s is not None else 0)
    inputs = {"x": x, "skip": skip, "scale": scale, **({} if rms else {"shift": s}), "bias": b}
    while inputs[last := list(inputs)[-1]] is None:
        del inputs[last]
    op = "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization"
    outputs = {"y": x.shape} | ({"sum": x.shape} if given == "skip and sum" else {})
    found = Case(library, op, dtype, inputs, outputs, epsilon=1e-5).run()
    return max(error(*pair) for pair in zip(found, (expected, total), strict=False))


def rotate(x: Array, positions: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """`x` [batch, tokens, heads, size], `positions` [batch, tokens]."""
    c, s = cos[positions][:, :, None], sin[positions][:, :, None]
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    parts = (a * c - b * s, b * c + a * s)
    return np.stack(parts, axis=-1).reshape(x.shape) if interleaved else np.concatenate(parts, axis=-1)


def attention(
    library: str, dtype: str, batch: int, tokens: int, heads: int, kv: int, size: int, rope: str, slots: int
) -> float:
    """One token after caches of random lengths, or prompts from the beginning; caches must hold old and new keys and
    values.
    """
    width, decode = (heads + 2 * kv) * size, tokens == 1
    qkv = rounded(dtype, batch, tokens, width)
    past = RANDOM.integers(0, slots, batch) if decode else np.zeros(batch, np.int64)
    keys, values = rounded(dtype, batch, kv, slots, size), rounded(dtype, batch, kv, slots, size)
    angles = np.arange(slots)[:, None] / 10000 ** (np.arange(size // 2) / (size // 2))
    cos, sin = (f(angles).astype(DTYPES[dtype][0]).astype(np.float64) for f in (np.cos, np.sin))
    inputs: dict[str, Array | None] = {
        "query": qkv, "past_key": keys, "past_value": values, "lengths": (past + tokens - 1).astype(np.int32),
        "total": np.array(slots if decode else tokens, np.int32),
    }  # fmt: skip
    if rope:
        inputs |= {"cos": cos, "sin": sin}
    case = Case(
        library, "GroupQueryAttention", dtype, inputs,
        {"y": (batch, tokens, heads * size), "key": keys.shape, "value": values.shape}, num_heads=heads,
        kv_num_heads=kv, do_rotary=int(bool(rope)), rotary_interleaved=int(rope == "interleaved"), scale=size**-0.5,
    )  # fmt: skip
    y, new_keys, new_values = case.run({"key": "past_key", "value": "past_value"})
    q, k, v = np.split(qkv.reshape(batch, tokens, heads + 2 * kv, size), [heads, heads + kv], axis=2)
    positions = past[:, None] + np.arange(tokens)
    if rope:
        q, k = (rotate(x, positions, cos, sin, rope == "interleaved") for x in (q, k))
    every = np.arange(batch)[:, None]
    keys[every, :, positions], values[every, :, positions] = k, v
    scores = np.einsum("bthd,bhsd->bhts", q, np.repeat(keys, heads // kv, axis=1)) * size**-0.5
    scores = np.where(np.arange(slots) <= positions[:, None, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = np.einsum(
        "bhts,bhsd->bthd", weights / weights.sum(axis=-1, keepdims=True), np.repeat(values, heads // kv, axis=1)
    )
    return max(error(y, expected.reshape(y.shape)), error(new_keys, keys), error(new_values, values))


def last_token(library: str, dtype: str, rows: int, tokens: int, total: int, width: int) -> float:
    x, real = rounded(dtype, rows, tokens, width), RANDOM.integers(0, min(tokens, total) + 1, rows)
    real[0], real[-1] = min(tokens, total), 0  # all of them; none, which takes the first
    mask = (np.arange(total) < (max(total - tokens, 0) + real)[:, None]).astype(np.int64)
    case = Case(library, "LastToken", dtype, {"x": x, "mask": mask}, {"y": (rows, 1, width)})
    return error(case.run()[0][:, 0], x[np.arange(rows), np.maximum(real - 1, 0)])


def next_token(library: str, rows: int, tokens: int, vocabulary: int, slots: int, spoilt: bool) -> float:
    """0 where the tokens, the longer mask and the tokens so far are right, else 1."""
    logits = RANDOM.standard_normal((rows, tokens, vocabulary)).astype(np.float32)
    logits[0, -1, vocabulary // 3] = logits[0, -1, vocabulary // 2] = 9  # the first of equals
    expected = logits.argmax(axis=-1)
    if spoilt:
        logits[-1, -1, -1], expected[-1, -1] = np.nan, -1
    lengths = RANDOM.integers(1, slots - 1, rows)
    mask = (np.arange(slots) < lengths[:, None]).astype(np.int64)
    past = RANDOM.integers(0, 99, (rows, slots))
    infos = [
        helper.make_tensor_value_info(name, kind, [None] * rank)
        for name, kind, rank in (
            ("logits", onnx.TensorProto.FLOAT, 3),
            ("mask", onnx.TensorProto.INT64, 2),
            ("past", onnx.TensorProto.INT64, 2),
        )
    ]
    results = [
        helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [None, None])
        for name in ("next", "longer", "tokens")
    ]
    node = helper.make_node("NextToken", ["logits", "mask", "past"], ["next", "longer", "tokens"], domain=DOMAIN)
    found, longer, appended = session(library, [node], infos, results).run(
        None, {"logits": logits, "mask": mask, "past": past}
    )
    past[np.arange(rows), lengths] = expected[:, -1]
    right = (
        (found == expected).all()
        and (longer == (np.arange(slots) <= lengths[:, None])).all()
        and (appended == past).all()
    )
    return 0.0 if right else 1.0


def main() -> None:
    choose_device("cuda", [])
    nvcc = find_nvcc()
    if nvcc is None or not device_capability():
        sys.exit("this wants a CUDA device and nvcc")
    library = str(kernel_library(nvcc, device_capability()))
    groups: dict[str, list[tuple[Any, tuple[Any, ...]]]] = {
        "Linear, up to 16 rows": [
            (linear, (d, m, n, k, b, a))
            for d, (m, n, k), b, a in itertools.product(
                DTYPES,
                [
                    (1, 512, 64),
                    (5, 777, 128),
                    (8, 2048, 4096),
                    (13, 12288, 512),
                    (16, 16384, 256),
                    (16, 4096, 2048),
                    (16, 31, 192),
                ],
                (False, True),
                ("NONE", "GELU"),
            )
        ],
        "Linear, more rows, odd sizes or a large head (cublasLt)": [
            (linear, (d, m, n, k, b, a))
            for d, (m, n, k), b, a in itertools.product(
                DTYPES,
                [(17, 512, 64), (300, 1024, 1024), (4, 64, 72), (16, 51200, 256)],
                (False, True),
                ("NONE", "GELU"),
            )
        ],
        "SkipLayerNormalization, SkipSimplifiedLayerNormalization": [
            (norm, (d, rows, width, rms, shift, bias, given))
            for d, (rows, width), (rms, shift), bias, given in itertools.product(
                DTYPES,
                [(1, 64), (16, 4096), (3, 576), (7, 16384)],
                [(False, True), (False, False), (True, False)],
                (False, True),
                ("", "skip", "skip and sum"),
            )
        ],
        "GroupQueryAttention, a step": [
            (attention, (d, b, 1, h, kv, size, rope, slots))
            for d, (b, h, kv), size, rope, slots in itertools.product(
                DTYPES,
                [(34, 4, 4), (70, 4, 2), (45, 9, 3), (40, 16, 4)],
                (64, 128),
                ("", "halves", "interleaved"),
                (9, 200),
            )
        ],
        "GroupQueryAttention, few rows (ONNX Runtime's)": [
            (attention, (d, 2, 1, 8, 4, 64, rope, 90)) for d in DTYPES for rope in ("", "halves")
        ],
        "GroupQueryAttention, prompts": [
            (attention, (d, 3, tokens, h, kv, size, rope, 520))
            for d, tokens, (h, kv), size, rope in itertools.product(
                DTYPES, (2, 64, 65, 130, 512), [(4, 4), (6, 2)], (64, 128), ("", "halves", "interleaved")
            )
        ],
        "LastToken": [
            (last_token, (d, rows, tokens, total, width))
            for d, (rows, tokens, total), width in itertools.product(
                DTYPES, [(3, 1, 40), (16, 128, 128), (5, 700, 900), (3, 9, 5)], (64, 4096)
            )
        ],
        "GroupQueryAttention, long prompts (ONNX Runtime's)": [
            (attention, (d, 1, 600, 4, 2, 64, "halves", 640)) for d in DTYPES
        ],
    }
    shapes = [(1, 1, 7, 9), (16, 1, 51200, 148), (3, 5, 1000, 2000), (2, 1, 128256, 33)]
    wrong = [(shape, spoilt) for shape in shapes for spoilt in (False, True) if next_token(library, *shape, spoilt)]
    print(
        f"NextToken, {2 * len(shapes)} cases: "
        f"{'WRONG: ' + str(wrong) if wrong else 'the same tokens, masks and histories as NumPy'}\n"
    )
    print("| operator | cases | worst error, fp16 | bf16 | |\n| --- | ---: | ---: | ---: | --- |")
    good = not wrong
    for name, cases in groups.items():
        worst = dict.fromkeys(DTYPES, (0.0, ""))
        for check, arguments in cases:
            try:
                found = check(library, *arguments)
            except Exception as failure:  # the next cases say more
                print(f"{name} {arguments}: {failure}", file=sys.stderr)
                found = float("nan")
            if not found <= worst[arguments[0]][0]:
                worst[arguments[0]] = (found, str(arguments[1:]))
        off = [f"{d} {shape}" for d, (found, shape) in worst.items() if not found <= DTYPES[d][2]]
        good = good and not off
        print(
            f"| {name} | {len(cases)} | "
            + " | ".join(f"{found:.1e}" for found, _ in worst.values())
            + f" | {'WRONG: ' + '; '.join(off) if off else 'right'} |",
            flush=True,
        )
    sys.exit(not good)


if __name__ == "__main__":
    main()
