"""INT8 and INT4 of ONNX Runtime's own tools, on the model and the texts of `benchmarks/quantize.py`: what they cost,
and how long they take.

Their static INT8 calibrates with the same texts (MinMax, one scale for each channel of a weight, activations UINT8,
QDQ). Their MatMulNBits takes MatMul alone and our export has Gemm, so it gets the same model with MatMul of transposed
weights; `ours` beside it are the rows of our own tool in the same run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, MatMulNBitsQuantizer

from onnxtools.calibration.data import read_samples
from onnxtools.evaluate.lambada import read_lambada
from onnxtools.ir.model import Model
from onnxtools.passes.quantize.quantize_pass import Quantize
from onnxtools.passes.selection import head_product

from benchmarks.decode import gguf  # isort: skip
from benchmarks.quantize import CALIB, SHARED, line, onnxtools, score, written  # isort: skip


class Texts(CalibrationDataReader):  # type: ignore[misc]
    """The texts that our own calibration reads."""

    def __init__(self, source: Path, count: int) -> None:
        options = Quantize(scheme="int8", calib=CALIB[1], calib_size=count)
        self._feeds: Iterator[dict[str, Any]] = iter(list(read_samples(Model.load(source), options)))

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def head(source: Path) -> list[str]:
    """The language-model head, which ours leaves alone too."""
    node = head_product(Model.load(source))
    return [node.name or ""] if node is not None else []


def with_matmul(source: Path, target: Path) -> None:
    """Gemm(x, W, transB=1) as MatMul(x, W^T), what MatMulNBitsQuantizer looks for.

    The head becomes MatMul(x, Transpose(W)): quantize_dynamic transposes a Gemm's weight in place, and the embedding is
    the same tensor.
    """
    model = onnx.load(source)
    tensors, left = {t.name: t for t in model.graph.initializer}, head(source)
    for node in list(model.graph.node):
        if node.op_type != "Gemm" or len(node.input) != 2:
            continue
        x, weight = node.input
        if node.name in left:
            model.graph.node.append(helper.make_node("Transpose", [weight], [f"{weight}_t"], perm=[1, 0]))
            weight = f"{weight}_t"
        else:
            tensors[weight].CopyFrom(
                numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(tensors[weight]).T), weight)
            )
        node.CopyFrom(helper.make_node("MatMul", [x, weight], list(node.output), name=node.name))
    nodes = sorted(model.graph.node, key=lambda node: node.op_type != "Transpose" or node.input[0] not in tensors)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # it has the shapes of before
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data")


def static_int8(source: Path, target: Path, count: int) -> None:
    quantize_static(
        source, target, Texts(source, count), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"], calibrate_method=CalibrationMethod.MinMax,
        use_external_data_format=True,
        nodes_to_exclude=head(source),
        extra_options={"WeightSymmetric": True},
    )  # fmt: skip


def dynamic_int8(source: Path, target: Path, _: int) -> None:
    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        use_external_data_format=True,
        nodes_to_exclude=head(source),
    )


def n_bits(config: Any = None) -> Callable[[Path, Path, int], None]:
    def make(source: Path, target: Path, _: int) -> None:
        options = {"algo_config": config} if config is not None else {"block_size": 64, "is_symmetric": True}
        made = MatMulNBitsQuantizer(onnx.load(source), nodes_to_exclude=head(source), **options)
        made.process()
        made.model.save_model_to_file(str(target), use_external_data_format=True)

    return make


THEIRS: dict[str, tuple[str, Callable[[Path, Path, int], None]]] = {
    "onnxruntime.quantization static INT8, per channel": ("model", static_int8),
    "onnxruntime.quantization dynamic INT8, per channel": ("matmul", dynamic_int8),
    "MatMulNBitsQuantizer RTN, block 64": ("matmul", n_bits()),
    "MatMulNBitsQuantizer HQQ, block 64 (with zero points)": (
        "matmul",
        n_bits(HQQWeightOnlyQuantConfig(block_size=64)),
    ),
}
OURS: dict[str, list[str]] = {
    "ours: INT8 per channel": ["--int8", "--per-channel", "--all-layers", *CALIB],
    "ours: SmoothQuant 0.5 per token, per channel": [
        "--smoothquant",
        "0.5",
        "--per-token",
        "--per-channel",
        "--all-layers",
        *CALIB,
    ],
    "ours: INT4 RTN, block 64, --lower ort": ["--int4-rtn", "--block-size", "64", "--lower", "ort"],
    "ours: INT4 AWQ and GPTQ, block 64, --lower ort": [
        "--int4-awq",
        "--gptq",
        "--block-size",
        "64",
        "--lower",
        "ort",
        *CALIB,
    ],
}


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--only", nargs="*", default=[*THEIRS, *OURS])
    args = parser.parse_args()
    count = int(CALIB[CALIB.index("--calib-size") + 1])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = {"model": folder / "model.onnx", "matmul": folder / "matmul.onnx"}
        onnxtools("export", gguf(), "-o", sources["model"], "--dtype", "fp32")
        with_matmul(sources["model"], sources["matmul"])
        rows = read_lambada(SHARED / "lambada_openai.jsonl", args.rows)
        print(
            f"{date.today()}, onnxruntime {version('onnxruntime')}; SmolLM2-135M, first {len(rows)} rows of LAMBADA\n"
        )
        print(
            "| tool | acc (whole word) | difference, points | top1 | difference | ppl(token) | weights MB | seconds to "
            "make | seconds to score |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        reference, seconds = score(sources["model"], rows)
        print(line("fp32", reference, reference, 0, written(sources["model"])), f"{seconds:.0f} |", flush=True)
        for name in args.only:
            out = folder / f"{''.join(c if c.isalnum() else '_' for c in name)}.onnx"
            began = time.perf_counter()
            if name in THEIRS:
                source, make = THEIRS[name]
                make(sources[source], out, count)
            else:
                onnxtools("quantize", sources["model"], out, "--no-check", *OURS[name])
            made = time.perf_counter() - began
            results, seconds = score(out, rows)
            print(line(name, results, reference, made, written(out)), f"{seconds:.0f} |", flush=True)
            for path in folder.glob(f"{out.name}*"):
                path.unlink()


if __name__ == "__main__":
    run()
