"""`convert` of a TransformerEngine FP8 export: the weights behind trt Q/DQ are stored as FP8, in one streamed pass.

Against `cp` of the bytes that it reads; it writes a half (fp16) or a quarter (fp32) of them. Target: peak <= 200 MB.
"""

from __future__ import annotations

from pathlib import Path

from _measure import MEMORY_TARGET, Row, against_cp, parser, report, scratch, tool
from onnx import TensorProto
from synthetic import make, weights_path


def fold(folder: Path, name: str, dtype: int, gigabytes: float, runs: int) -> list[Row]:
    source, out = folder / f"{name}.onnx", folder / "out"
    make(source, gigabytes, fp8=True, dtype=dtype)
    data = weights_path(source)
    command = [tool("onnxtools"), "convert", str(source), str(out / "qdq.onnx"), "--opset19"]
    rows = against_cp(data, out, {f"convert, {name} weights to FP8": command}, runs, MEMORY_TARGET)
    data.unlink()
    return rows


def main() -> None:
    made = parser(__doc__, runs=5)
    made.add_argument("--gb", type=float, default=2.5, help="bytes of weights, before folding [2.5]")
    options = made.parse_args()
    with scratch(options.folder) as folder:
        rows = [
            r
            for name, dtype in (("fp16", TensorProto.FLOAT16), ("fp32", TensorProto.FLOAT))
            for r in fold(folder, name, dtype, options.gb, options.runs)
        ]
    report("fp8_fold", "Folding the weights of an FP8 export", rows, ["GB/s counts the bytes read."], options)


if __name__ == "__main__":
    main()
