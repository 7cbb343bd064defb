"""Lower bounds of a model's latency: the bytes and operations that it needs, over rates that ONNX Runtime reaches here.

A decode step reads every weight once and the cache once: its floor is those bytes over the copy bandwidth. A prefill
multiplies every weight with every token: its floor is 2 x weights x tokens operations over the matrix rate (roofline
model: Williams et al., CACM 52, 2009).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxtools.base.dtypes import itemsize, of
from onnxtools.base.onnx_runtime import onnxruntime
from onnxtools.check.sessions import CPU, CUDA, open_session, session_options
from onnxtools.evaluate.timing import BenchmarkOptions, Timing
from onnxtools.ir.description import described
from onnxtools.ir.model import Model

_TIMED = ("float", "float16", "bfloat16")
"""Element types, by ONNX's names, whose rates are measured."""
_TABLES = {
    ("Gather", 0),
    ("RotaryEmbedding", 1),
    ("RotaryEmbedding", 2),
    ("GroupQueryAttention", 7),
    ("GroupQueryAttention", 8),
}
"""(operator, input index) whose weight is a table of embeddings, cosines or sines."""


@dataclass(frozen=True)
class Work:
    """The work that one batch needs.

    Attributes:
        step_bytes: bytes that one decode step reads: weights, and the cache at its mean length.
        prefill_flops: multiplications and additions of the prompt.
        dtype: type of most of the weights (by bytes), ONNX's name in lower case.
    """

    step_bytes: int
    prefill_flops: int
    dtype: str


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device.

    Attributes:
        bytes_per_s: bytes per second.
        flops_per_s: floating-point operations per second.
        by: what the rates were measured with: a copy (bytes read and written), a matrix product, or the model itself.
    """

    bytes_per_s: float
    flops_per_s: float
    by: str = "a copy and a matrix product"


def work(path: Path, options: BenchmarkOptions) -> Work:
    """The work of an ONNX decoder for the sizes of `options`, computed from its graph."""
    from onnxtools.analysis.decoder_io import decoder_io
    from onnxtools.engines.runtimes.onnxrt.ort_session import ports

    model = Model.load(path)
    io = decoder_io(path, *ports(model))
    weights = matrices = head = 0
    types: dict[str, int] = {}
    for value, tensor in model.weights():
        users = [(node.op_type, index) for node, index in value.uses()]
        if all(user in _TABLES for user in users):
            continue  # a step reads only a row of a table
        weights += tensor.nbytes
        types[tensor.dtype.name.lower()] = types.get(tensor.dtype.name.lower(), 0) + tensor.nbytes
        if len(tensor.shape) == 2:
            size = int(np.prod(tensor.shape.numpy()))
            if io.vocab_size in tensor.shape.numpy():
                head += size
            else:
                matrices += size
    mean = options.input_seq_len + options.output_seq_len / 2
    cache = sum(int(np.prod(c.shape(1, 1))) * itemsize(c.past.dtype) for c in io.caches) * options.batch_size * mean
    tokens = options.batch_size * options.input_seq_len
    # Scores and values of half the pairs (causal): 2 products x 2 operations x queries x keys x channels / 2.
    attention = 2 * tokens * options.input_seq_len * _query_channels(model)
    flops = 2 * matrices * tokens + 2 * head * (tokens if io.logits_all else options.batch_size) + attention
    return Work(int(weights + cache), int(flops), max(types, key=types.__getitem__) if types else "float")


def _query_channels(model: Model) -> int:
    """Heads x channels summed over layers, from onnxtools.json; 0 if unknown (attention is a small part)."""
    c = described(model).get("model", {})
    sizes = [
        size
        for name in ("num_hidden_layers", "num_attention_heads", "head_dim")
        if isinstance(size := c.get(name), int)
    ]
    return math.prod(sizes) if len(sizes) == 3 else 0


def measure_rates(device: str, dtype: str, threads: int = 0) -> Rates:
    """Measure an elementwise copy and a matrix product in ONNX Runtime; the best of 6 runs of each counts.

    The copy has 2^29 elements (CPU: 2^26), the matrices are 8192 x 8192 (CPU: 1536 x 1536).

    Args:
        device: `cpu` or `cuda`.
        dtype: ONNX's name in lower case; float16 on CUDA and float on the CPU stand in for unsupported types.
        threads: threads of the CPU; 0 is all cores.
    """
    if dtype not in _TIMED or (device != "cuda" and dtype == "bfloat16"):
        dtype = "float16" if device == "cuda" else "float"
    elements, size = (1 << 29, 8192) if device == "cuda" else (1 << 26, 1536)
    copied = _best(_session(device, dtype, "Neg", 1, threads), [[elements]], device, dtype)
    multiplied = _best(_session(device, dtype, "MatMul", 2, threads), [[size, size]] * 2, device, dtype)
    return Rates(2 * elements * itemsize(dtype) / copied, 2 * size**3 / multiplied)


def raised(rates: Rates, needed: Work, timings: Sequence[Timing], steps: int) -> Rates:
    """`rates`, raised to what a model reached, so that no share of the limit is above 1.

    A model can exceed the measured rates because reading alone is faster than copying.

    Args:
        timings: timings of the runtimes on the device, at least one.
        steps: number of steps of an iteration after its first token.
    """
    firsts = [min(timing.first) for timing in timings]
    means = [
        min(min(np.reshape(timing.steps, (-1, steps)).mean(1)), statistics.median(timing.steps))
        for timing in timings
        if timing.steps
    ]
    reached = (
        max((needed.step_bytes / seconds for seconds in means), default=0.0),
        max((needed.prefill_flops / seconds for seconds in firsts), default=0.0),
    )
    by = [
        "the model's steps" if reached[0] > rates.bytes_per_s else "a copy",
        "its prefill" if reached[1] > rates.flops_per_s else "a matrix product",
    ]
    return Rates(float(max(rates.bytes_per_s, reached[0])), float(max(rates.flops_per_s, reached[1])), " and ".join(by))


def _session(device: str, dtype: str, op: str, inputs: int, threads: int) -> Any:
    rank = 1 if op == "Neg" else 2
    names = ["a", "b"][:inputs]
    info = [onnx.helper.make_tensor_value_info(name, of(dtype).value, [None] * rank) for name in [*names, "y"]]
    graph = onnx.helper.make_graph([onnx.helper.make_node(op, names, ["y"])], op, info[:-1], info[-1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    return open_session(model.SerializeToString(), CUDA if device == "cuda" else CPU, session_options(threads=threads))


def _best(session: Any, shapes: list[list[int]], device: str, dtype: str, runs: int = 6) -> float:
    ort = onnxruntime()
    binding = session.io_binding()
    generator = np.random.default_rng(0)
    inputs = []
    for name, shape in zip(("a", "b"), shapes, strict=False):
        array = generator.standard_normal(shape, np.float32)
        inputs.append(
            ort.OrtValue.ortvalue_from_numpy(array if dtype == "float" else array.astype(np.float16), device, 0)
        )
        if dtype == "bfloat16":  # bits of a float16 are a valid bfloat16 of another value; the time is the same
            inputs[-1] = ort.OrtValue.ortvalue_from_shape_and_type(shape, of(dtype).value, device, 0)
        binding.bind_ortvalue_input(name, inputs[-1])
    output = ort.OrtValue.ortvalue_from_shape_and_type(shapes[0], of(dtype).value, device, 0)
    binding.bind_ortvalue_output("y", output)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append(time.perf_counter() - start)
    return min(times)
