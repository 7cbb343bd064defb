"""Plots of a benchmark: the distribution of latencies, and the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.extras import install_line
from onnxtools.evaluate.timing import Timing
from onnxtools.storage.files import make_parent

_FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Check before any work that a plot can be written to `path`, and create its folder.

    Raises:
        UsageError: the suffix is no format that is written.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"--plot {path}: it writes {', '.join(_FORMATS)}; name such a file")
    make_parent(path)


def benchmark_plot(path: Path, suffix: str, result: Mapping[str, Any], timings: Sequence[Timing]) -> None:
    """Write the plot to `path` in the format that `suffix` (such as `.png`) names.

    Args:
        result: the JSON result of `benchmark`.
        timings: timings of `result["runtimes"]`, in the same order.

    Raises:
        JobError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise JobError(f"--plot needs matplotlib; {install_line('scores')}") from None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name, timing in zip(result["runtimes"], timings, strict=True):
        ordered = np.sort(np.array(timing.total)) * 1e3
        left.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", label=name)
    left.set(xlabel="ms per batch", ylabel="share of runs", title="Latency", ylim=(0, 1.02))
    left.legend()
    _roofline(right, result)
    figure.tight_layout()
    figure.savefig(path, format=suffix[1:], dpi=120)
    plt.close(figure)


def _roofline(axes: Any, result: Mapping[str, Any]) -> None:
    """Operations per byte against operations per second: prefill and step of each runtime, under the machine's roof."""
    options = result["options"]
    drawn = False
    for name, block in result["runtimes"].items():
        limit = block.get("limits")
        if not limit:
            continue
        roof, slope = limit["flops_per_s"], limit["bytes_per_s"]
        if not drawn:
            x = np.logspace(-1, 4, 200)
            axes.loglog(x, np.minimum(roof, slope * x), color="black", label="measured roof")
            drawn = True
        flops_token = limit["prefill_flops"] / (options["batch_size"] * options["input_seq_len"])
        points = [("prefill", limit["prefill_flops"], block["time_to_first_token_s"])]
        if block["time_per_output_token_s"]:
            points.append(("step", flops_token * options["batch_size"], block["time_per_output_token_s"]))
        for phase, flops, seconds in points:
            axes.scatter(flops / limit["step_bytes"], flops / seconds, label=f"{name} {phase}", zorder=3)
    axes.set(
        xlabel="operations per byte of weights and cache",
        ylabel="operations per second",
        title="Roofline" if drawn else "Roofline (no ONNX model)",
    )
    if drawn:
        axes.legend(fontsize="small")
