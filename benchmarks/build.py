"""`build` as a whole process against TensorRT-RTX's own interface on the same file: time and peak memory.

Targets (issue 6): within 5% of the time and 10% of the memory; 2.5 GB of weights within twice their size of memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

from _measure import Command, empty, interleave, parser, report, row, scratch, times_faster, tool, warm
from synthetic import make, weights_path

RAW = """
import sys
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1])
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
profile = builder.create_optimization_profile()
for tensor in map(network.get_input, range(network.num_inputs)):
    shapes = [[size if d < 0 else d for d in tensor.shape] for size in (1, 128, 256)]
    for shape, batch in zip(shapes, (1, 8, 8)):
        if tensor.shape[0] < 0:
            shape[0] = batch
    profile.set_shape(tensor.name, *shapes)
config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
with open(sys.argv[2], "wb") as file:
    file.write(plan)
"""


def main() -> None:
    made = parser(__doc__, runs=3)
    made.add_argument("--gb", type=float, nargs="*", default=[0.5, 2.5], help="sizes of the model [0.5 2.5]")
    options = made.parse_args()
    rows = []
    with scratch(options.folder) as folder:
        raw = folder / "raw.py"
        raw.write_text(RAW)
        for gigabytes in options.gb:
            source, out = folder / "gpt.onnx", folder / "out"
            size = make(source, gigabytes)
            commands: dict[str, Command] = {
                "TensorRT-RTX's interface": [sys.executable, str(raw), str(source), str(out / "raw.engine")],
                "onnxtools build": [tool("onnxtools"), "build", str(source), str(out / "gpt.engine"),
                    *["--backend", "tensorrt-rtx", "--max-seq-len", "256"]],
            }  # fmt: skip

            def before(out: Path = out, source: Path = source) -> None:
                empty(out)
                warm(weights_path(source))

            found = interleave(commands, options.runs, before)
            theirs, ours = found.values()
            peak = max(r.peak_mb for r in ours) / max(r.peak_mb for r in theirs)
            rows.append(row("TensorRT-RTX's interface", size, theirs))
            ratio = (
                f"{1 / times_faster(theirs, ours):.2f} x the time, {peak:.2f} x the memory, "
                f"{max(r.peak_mb for r in ours) * 1e6 / size:.2f} x the weights"
            )
            rows.append(row("onnxtools build", size, ours, ratio, "<= 1.05 x, <= 1.10 x; <= 2 x the weights at 2.5 GB"))
            weights_path(source).unlink()
    report(
        "build",
        "Building an engine",
        rows,
        ["onnxtools also hashes graph, weights and plan, and checks the graph before."],
        options,
    )


if __name__ == "__main__":
    main()
