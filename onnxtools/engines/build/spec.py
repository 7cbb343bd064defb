"""`EngineSpec`: all options of a build, independent of the builder and its version."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from onnxtools.base.errors import UsageError
from onnxtools.base.options import option


@dataclass(frozen=True)
class EngineSpec:
    """The options of `onnxtools build`; the fields are the command-line flags and the recipe keys.

    Shapes are trtexec's text, `input_ids:1x1,past_key_values.*.key:1x8x0x64`; each repetition of the three options is
    one more optimization profile. Without them profiles are derived from the graph and the `max_*` and `opt_*` fields.

    Raises:
        UsageError: a value out of range, or a different number of min, opt and max shapes.
    """

    backend: Literal["auto", "tensorrt", "tensorrt-rtx", "trtexec"] = option(
        "auto", "Which builder makes the engine; auto takes the first of them that is installed."
    )
    tensorrt_version: str | None = option(
        None, "Version that a trtexec line is written for, as 10.13. [default: that of the trtexec found, else 11.4]"
    )
    fp8: bool = option(False, "Demand FP8: refuse a graph without it; weakly typed networks get the builder's flag.")
    fp16: bool = option(False, "Demand FP16, likewise.")
    bf16: bool = option(False, "Demand BF16, likewise.")
    int8: bool = option(False, "Demand INT8, likewise.")
    int4: bool = option(False, "Demand INT4, likewise.")
    strongly_typed: bool | None = option(
        None,
        "Types as the graph says. [default: on where the graph has Q/DQ or several types; TensorRT 11 and "
        "TensorRT-RTX know nothing else]",
    )
    sparsity: Literal["disable", "enable", "force"] = option(
        "disable",
        "enable (the flag alone): let the builder use 2:4 sparse kernels, and refuse a graph without 2:4 weights; "
        "force: prune first.",
        bare="enable",
    )
    timing_cache: str | None = option(
        None,
        "Timing cache: a file, read and merged into, or a folder with one for each GPU and version (TensorRT-RTX "
        "has none).",
    )
    error_on_cache_miss: bool = option(False, "Fail where a timing is not in the timing cache.")
    compute_capability: tuple[str, ...] = option(
        (),
        "Compute capability to build for, such as 8.9 or 12.0 (TensorRT builds for its own GPU). [default: of this "
        "machine's GPU, else 8.9]",
    )
    min_shapes: tuple[str, ...] = option((), "Smallest input shapes of a profile, in trtexec's syntax.")
    opt_shapes: tuple[str, ...] = option((), "Input shapes that a profile is tuned for.")
    max_shapes: tuple[str, ...] = option((), "Largest input shapes of a profile.")
    profiles: str | None = option(
        None,
        "YAML or JSON file of profiles, as the manifest lists them: name, and min, opt and max of each of its inputs.",
    )
    max_batch_size: int = option(8, "Largest batch of derived profiles.")
    opt_batch_size: int | None = option(None, "Batch that derived profiles are tuned for. [default: the largest]")
    max_seq_len: int | None = option(
        None, "Longest sequence, cache included, of derived profiles. [default: the model's positions, at most 1024]"
    )
    max_input_len: int | None = option(None, "Longest prompt of derived profiles. [default: --max-seq-len]")
    max_output_len: int | None = option(
        None, "Most tokens generated after a prompt; with --max-input-len it decides --max-seq-len."
    )
    opt_seq_len: int | None = option(None, "Sequence length that derived profiles are tuned for. [default: half]")
    builder_optimization_level: int | None = option(
        None, "0 (fast build) to 5 (fast engine); else the builder's default."
    )
    tiling_optimization_level: Literal["none", "fast", "moderate", "full"] | None = option(
        None, "How long tilings over several layers are searched."
    )
    mem_pool_size: tuple[str, ...] = option(
        (), "Memory limit of the builder, trtexec's POOL:SIZE, as workspace:4G; MiB without a unit."
    )
    hardware_compatibility_level: Literal["none", "ampere+", "sameComputeCapability"] = option(
        "none", "GPUs that the engine may run on."
    )
    version_compatible: bool = option(False, "An engine that later minor versions of TensorRT run.")
    refit: bool = option(False, "An engine whose weights can be exchanged.")
    strip_weights: bool = option(False, "A plan without the weights that refitting brings.")
    allow_weight_streaming: bool = option(False, "An engine that may keep weights in host memory.")
    tf32: bool = option(True, "Allow TF32 in fp32 matrix products.")
    profiling_verbosity: Literal["layer_names_only", "detailed", "none"] = option(
        "detailed", "What the engine tells its inspector; the audit needs detailed."
    )
    tactic_sources: str | None = option(None, "trtexec's list, as -CUDNN,+CUBLAS.")
    plugins: tuple[str, ...] = option((), "Plugin library to load.")
    device: int = option(0, "CUDA device that TensorRT builds on.")

    def __post_init__(self) -> None:
        for text in self.compute_capability:
            if not re.fullmatch(r"\d{1,2}\.\d", text):
                raise UsageError(f"--compute-capability {text!r} is not a capability; write it as 8.9 or 12.0")
        if len(set(self.compute_capability)) < len(self.compute_capability):
            raise UsageError(f"--compute-capability {', '.join(self.compute_capability)}: name each once")
        counts = (len(self.min_shapes), len(self.opt_shapes), len(self.max_shapes))
        if len(set(counts)) > 1:
            raise UsageError(
                f"--min-shapes, --opt-shapes and --max-shapes are given {counts[0]}, {counts[1]} and {counts[2]} "
                "times; give all three once for each profile"
            )
        derived = ("opt_batch_size", "max_seq_len", "max_input_len", "max_output_len", "opt_seq_len")
        unused = next(
            (name for name in derived if getattr(self, name) is not None),
            "max_batch_size" if self.max_batch_size != EngineSpec.max_batch_size else "",
        )
        source = (
            "--min-shapes, --opt-shapes and --max-shapes give"
            if self.min_shapes
            else "--profiles gives"
            if self.profiles
            else ""
        )
        if self.min_shapes and self.profiles:
            raise UsageError(
                "--profiles and --min-shapes, --opt-shapes, --max-shapes say the same thing; leave one out"
            )
        if source and unused:
            raise UsageError(f"--{unused.replace('_', '-')} is for derived profiles, and {source} them; leave one out")
        for name in ("max_batch_size", "max_seq_len", "max_input_len", "max_output_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.max_output_len is not None and self.max_input_len is None:
            raise UsageError("--max-output-len counts from a prompt of --max-input-len; give both, or --max-seq-len")
        if self.max_output_len is not None and self.max_seq_len is not None:
            raise UsageError(
                "--max-seq-len follows from --max-input-len and --max-output-len; leave one or the other out"
            )
        if self.max_input_len is not None and self.longest is not None and self.max_input_len > self.longest:
            raise UsageError(
                f"--max-input-len {self.max_input_len} is more than --max-seq-len {self.max_seq_len}; raise one, or "
                "give --max-output-len"
            )
        if self.opt_seq_len is not None and not 1 <= self.opt_seq_len <= (self.longest or self.opt_seq_len):
            raise UsageError(
                f"--opt-seq-len is {self.opt_seq_len}; it must lie between 1 and the longest sequence, {self.longest}"
            )
        if self.opt_batch_size is not None and not 1 <= self.opt_batch_size <= self.max_batch_size:
            raise UsageError(
                f"--opt-batch-size is {self.opt_batch_size}; it must lie between 1 and --max-batch-size "
                f"{self.max_batch_size}"
            )
        if self.error_on_cache_miss and self.timing_cache is None:
            raise UsageError("--error-on-cache-miss needs a --timing-cache to look into")
        if self.strongly_typed and self.tensorrt_version is not None and version_of(self.tensorrt_version) < (9,):
            raise UsageError(
                f"--strongly-typed: TensorRT {self.tensorrt_version} has weakly typed networks alone; leave it out"
            )
        for text in self.mem_pool_size:
            pool_size(text)
        if self.builder_optimization_level is not None and not 0 <= self.builder_optimization_level <= 5:
            raise UsageError(f"--builder-optimization-level is {self.builder_optimization_level}; it goes from 0 to 5")

    @property
    def longest(self) -> int | None:
        """Longest sequence in tokens, cache included; None if no option gives it."""
        return self.max_seq_len if self.max_output_len is None else (self.max_input_len or 0) + self.max_output_len

    @property
    def demanded(self) -> list[str]:
        """The demanded precisions, in the order of `PRECISIONS`."""
        return [name for name in PRECISIONS if getattr(self, name)]

    def as_json(self) -> dict[str, Any]:
        """Field names and values as plain data, for the manifest."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }


def capability(text: str) -> tuple[int, int]:
    """'8.9' as (8, 9), so that capabilities compare."""
    major, _, minor = text.partition(".")
    return int(major), int(minor)


PRECISIONS = ("fp16", "bf16", "fp8", "int8", "int4")

_POOLS = {
    "workspace": "WORKSPACE", "dlaSRAM": "DLA_MANAGED_SRAM", "dlaLocalDRAM": "DLA_LOCAL_DRAM",
    "dlaGlobalDRAM": "DLA_GLOBAL_DRAM", "tacticSharedMem": "TACTIC_SHARED_MEMORY",
}  # fmt: skip
"""MemoryPoolType by trtexec's name."""
_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def pool_size(text: str) -> tuple[str, int]:
    """'workspace:4G' as (pool, bytes), with trtexec's name of the pool; a number without a unit is MiB, as in trtexec.

    Raises:
        UsageError: no such pool, or no size.
    """
    pool, _, size = text.partition(":")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([BKMG]?)", size)
    if pool not in _POOLS or match is None or not float(match[1]):
        raise UsageError(
            f"--mem-pool-size {text!r}: write POOL:SIZE, as workspace:4G; the pools are {', '.join(sorted(_POOLS))}"
        )
    return pool, int(float(match[1]) * _UNITS[match[2] or "M"])


def pool_type(pool: str) -> str:
    """The name of the MemoryPoolType member that trtexec calls `pool`."""
    return _POOLS[pool]


def version_of(text: str) -> tuple[int, ...]:
    """'10.13.3' as (10, 13, 3).

    Raises:
        UsageError: it is no version.
    """
    if not re.fullmatch(r"\d+(\.\d+)*", text):
        raise UsageError(f"--tensorrt-version {text!r} is no version; write it as 10.13")
    return tuple(map(int, text.split(".")))
