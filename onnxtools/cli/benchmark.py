"""Time a model in one or several runtimes, and say how near the machine's limit it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxtools.base.options import option
from onnxtools.base.progress import counted
from onnxtools.cli.flags import from_parameters
from onnxtools.cli.runtimes import RuntimeChoice, open_tokenizer, opened, runtime_command, say_notes
from onnxtools.evaluate.timing import BenchmarkOptions
from onnxtools.generation.runtime import RuntimeOptions
from onnxtools.storage.files import replacing

if TYPE_CHECKING:
    from onnxtools.checkpoints.tokenizer import Tokenizer
    from onnxtools.evaluate.timing import Timing
    from onnxtools.generation.runtime import Runtime

_HELP = """Time MODEL: greedy tokens after random prompts.

    Several runtimes are timed by turns in one run, and their ratio is printed. The share of the limit compares
    with what the machine was measured to copy and to multiply, just before.

    \b
    Examples:
      onnxtools benchmark model.onnx --batch-size 16 --input-seq-len 128 --output-seq-len 20 --iterations 100
      onnxtools benchmark model.onnx --runtime onnxrt --runtime frameworks --checkpoint ./SmolLM2 --plot latency.png
    """


@dataclass(frozen=True)
class ReportOptions:
    """What `benchmark` adds to the times."""

    limits: bool = option(True, "Measure the machine's limits and compare.")
    plot: Path | None = option(None, "Draw latencies and the roofline (.png, .svg or .pdf).", path=True)


def _callback(model: Path, as_json: bool, **values: Any) -> None:
    from onnxtools.cli.render import console, print_json
    from onnxtools.evaluate.plots import check_plot
    from onnxtools.evaluate.timing import time_runtimes

    report: ReportOptions = from_parameters(ReportOptions, values)
    if report.plot is not None:
        check_plot(report.plot)
    options: BenchmarkOptions = from_parameters(BenchmarkOptions, values)
    choice: RuntimeChoice = from_parameters(RuntimeChoice, values)
    how: RuntimeOptions = from_parameters(RuntimeOptions, values)
    with opened(model, choice.runtime, how) as runtimes:
        say_notes(runtimes)
        if how.device == "auto" and all(runtime.device == "cpu" for runtime in runtimes):
            click.echo("note: no CUDA device: this is a benchmark of the CPU", err=True)
        tokenizers = [_tokenizer(choice.tokenizer, runtime, model) for runtime in runtimes]
        with counted("benchmark", (options.warmup + options.iterations) * len(runtimes)) as tick:
            timings = time_runtimes(runtimes, tokenizers, options, tick)
        result = _result(model, runtimes, timings, options)
        if report.limits:
            _add_limits(result, model, list(zip(runtimes, timings, strict=True)), options, how.threads)
    if report.plot is not None:
        _plot(report.plot, result, timings)
    if as_json:
        print_json(result)
        return
    out = console()
    for name, block in result["runtimes"].items():
        for line in _lines(name, block, options):
            out.print(line, markup=False, soft_wrap=True)
    for line in _ratios(result["runtimes"]):
        out.print(line, markup=False, soft_wrap=True)


def _tokenizer(path: Path | None, runtime: Runtime, model: Path) -> Tokenizer | None:
    from onnxtools.base.errors import JobError

    try:
        return open_tokenizer(path, runtime, model)
    except JobError:
        if path is not None:
            raise
        return None


def _result(
    model: Path, runtimes: Sequence[Runtime], timings: Sequence[Timing], options: BenchmarkOptions
) -> dict[str, Any]:
    import dataclasses

    return {
        "model": str(model), "options": dataclasses.asdict(options),
        "runtimes": {
            runtime.name: {"device": runtime.device, **timing.as_json(options),
                "peak_memory_bytes": _peak_memory(runtime.device)}
            for runtime, timing in zip(runtimes, timings, strict=True)
        },
    }  # fmt: skip


def _peak_memory(device: str) -> int | None:
    """Used bytes of the card now (allocators do not give back); on the CPU the peak of the process.

    Of all runtimes together.
    """
    from onnxtools.base.memory import peak_mib
    from onnxtools.engines.runtimes.onnxrt.ort_session import device_memory

    memory = device_memory() if device.startswith("cuda") else None
    return memory[0] if memory else int(peak_mib() * (1 << 20))


def _add_limits(
    result: dict[str, Any],
    model: Path,
    timed: Sequence[tuple[Runtime, Timing]],
    options: BenchmarkOptions,
    threads: int,
) -> None:
    """The floor of an ONNX model on each device, and what share of it was reached."""
    from onnxtools.evaluate.limits import measure_rates, raised, work

    if model.suffix != ".onnx":
        return
    needed = work(model, options)
    rates = {
        device: measure_rates(device, needed.dtype, threads)
        for device in {"cuda" if r.device.startswith("cuda") else "cpu" for r, _ in timed}
    }
    for device, rate in rates.items():
        those = [timing for runtime, timing in timed if runtime.device.startswith(device)]
        rates[device] = raised(rate, needed, those, options.output_seq_len - 1)
    for runtime, _ in timed:
        block = result["runtimes"][runtime.name]
        rate = rates["cuda" if runtime.device.startswith("cuda") else "cpu"]
        step, prefill = needed.step_bytes / rate.bytes_per_s, needed.prefill_flops / rate.flops_per_s
        block["limits"] = {
            "bytes_per_s": rate.bytes_per_s, "flops_per_s": rate.flops_per_s, "measured_by": rate.by,
            "step_bytes": needed.step_bytes,
            "prefill_flops": needed.prefill_flops, "step_floor_s": step, "prefill_floor_s": prefill,
            "prefill_share": prefill / block["time_to_first_token_s"],
            "step_share": step / block["time_per_output_token_s"] if block["time_per_output_token_s"] else None,
            "share": (prefill + step * (options.output_seq_len - 1)) / block["without_tokenizer"]["median_s"],
        }  # fmt: skip


def _lines(name: str, block: Mapping[str, Any], options: BenchmarkOptions) -> list[str]:
    """The demo's block, then ours."""
    lines = [
        f"***************************** {name} on {block['device']}: batch {options.batch_size}, "
        f"{options.input_seq_len} in, {options.output_seq_len} out"
    ]
    for title, key in (("E2E inference", "end_to_end"), ("Without tokenizer", "without_tokenizer")):
        times = block.get(key)
        if not times:
            lines.append(f"[{title}] not timed: there is no tokenizer beside the model")
            continue
        lines.append(
            f"[{title}] Total Time: {times['total_s']:.5f} s, Average Time: {times['average_s']:.5f} s, 95th "
            f"Percentile Time: {times['p95_s']:.5f} s,"
            f" 99th Percentile Time: {times['p99_s']:.5f} s, Throughput: {times['throughput_tokens_per_s']:.2f} "
            "tokens/s"
        )
    step = block["time_per_output_token_s"]
    lines.append(
        f"time to first token {block['time_to_first_token_s'] * 1e3:.2f} ms"
        + (f", time per output token {step * 1e3:.3f} ms" if step else "")
    )
    if block["peak_memory_bytes"]:
        lines.append(
            f"peak memory {block['peak_memory_bytes'] / 1e9:.2f} GB "
            f"({'device in use' if block['device'] != 'cpu' else 'process'})"
        )
    limit = block.get("limits")
    if limit:
        lines.append(
            f"limit of the machine: {limit['bytes_per_s'] / 1e9:.1f} GB/s, {limit['flops_per_s'] / 1e12:.2f} TFLOP/s "
            f"(best of {limit['measured_by']});"
            f" prefill at {limit['prefill_share']:.0%} of it"
            + (f", step at {limit['step_share']:.0%} ({limit['step_bytes'] / 1e9:.2f} GB)" if step else "")
            + f", all at {limit['share']:.0%}"
        )  # fmt: skip
    return lines


def _ratios(blocks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How much faster the first runtime is than each other, by the total times that stand above, then by medians: one
    may contradict the other.
    """
    first, *others = blocks.items()
    lines = []
    for name, block in others:
        total, median = (
            block["without_tokenizer"][key] / first[1]["without_tokenizer"][key] for key in ("average_s", "median_s")
        )
        prefill = block["time_to_first_token_s"] / first[1]["time_to_first_token_s"]
        steps = (block["time_per_output_token_s"], first[1]["time_per_output_token_s"])
        lines.append(
            f"{first[0]} is {total:.2f} x as fast as {name} by average time (by medians: all {median:.2f} x, prefill "
            f"{prefill:.2f} x" + (f", step {steps[0] / steps[1]:.2f} x)" if all(steps) else ")")
        )
    return lines


def _plot(path: Path, result: Mapping[str, Any], timings: Sequence[Timing]) -> None:
    from onnxtools.evaluate.plots import benchmark_plot

    with replacing(path) as tmp:
        benchmark_plot(tmp, path.suffix, result, timings)


command = runtime_command("benchmark", _HELP, _callback, [ReportOptions, BenchmarkOptions])
