"""`EngineSpec`: everything a build can be asked for, independent of the builder and its version."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from onnxtools.errors import UsageError
from onnxtools.passbase import option


@dataclass(frozen=True)
class EngineSpec:
    """The options of `onnxtools build`; the fields are the command-line flags and the recipe keys.

    Shapes are trtexec's text, `input_ids:1x1,past_key_values.*.key:1x8x0x64`; each repetition of the three options is one
    more optimization profile. Without them profiles are derived from the graph and the `max_*` and `opt_*` fields.

    Raises:
        UsageError: a value out of range, or a different number of min, opt and max shapes.
    """

    backend: Literal["tensorrt-rtx"] = option("tensorrt-rtx", "Which builder makes the engine.")
    fp8: bool = option(False, "Demand FP8: refuse a graph without FP8 quantization.")
    sparsity: bool = option(False, "Let the builder use 2:4 sparse kernels; refuse a graph without 2:4 weights.")
    timing_cache: str | None = option(None, "Timing cache file (TensorRT-RTX has no timing cache and leaves it as it is).")
    compute_capability: tuple[str, ...] = option(("8.9",), "Compute capability to build for, such as 8.9 or 12.0.")
    min_shapes: tuple[str, ...] = option((), "Smallest input shapes of a profile, in trtexec's syntax.")
    opt_shapes: tuple[str, ...] = option((), "Input shapes that a profile is tuned for.")
    max_shapes: tuple[str, ...] = option((), "Largest input shapes of a profile.")
    max_batch_size: int = option(8, "Largest batch of derived profiles.")
    max_seq_len: int = option(1024, "Longest sequence, cache included, of derived profiles.")
    opt_seq_len: int | None = option(None, "Sequence length that derived profiles are tuned for (default: half).")
    builder_optimization_level: int | None = option(None, "0 (fast build) to 5 (fast engine); else the builder's default.")
    tf32: bool = option(True, "Allow TF32 in fp32 matrix products.")

    def __post_init__(self) -> None:
        for text in self.compute_capability:
            if not re.fullmatch(r"\d{1,2}\.\d", text):
                raise UsageError(f"--compute-capability {text!r} is not a capability; write it as 8.9 or 12.0")
        if not self.compute_capability or len(set(self.compute_capability)) < len(self.compute_capability):
            raise UsageError(f"--compute-capability {', '.join(self.compute_capability)}: name at least one, each once")
        counts = (len(self.min_shapes), len(self.opt_shapes), len(self.max_shapes))
        if len(set(counts)) > 1:
            raise UsageError(
                f"--min-shapes, --opt-shapes and --max-shapes are given {counts[0]}, {counts[1]} and {counts[2]} times; give all three once for each profile"
            )
        for name in ("max_batch_size", "max_seq_len"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.opt_seq_len is not None and not 1 <= self.opt_seq_len <= self.max_seq_len:
            raise UsageError(f"--opt-seq-len is {self.opt_seq_len}; it must lie between 1 and --max-seq-len {self.max_seq_len}")
        if self.builder_optimization_level is not None and not 0 <= self.builder_optimization_level <= 5:
            raise UsageError(f"--builder-optimization-level is {self.builder_optimization_level}; it goes from 0 to 5")

    def as_json(self) -> dict[str, Any]:
        """Field names and values as plain data, for the manifest."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}


def capability(text: str) -> tuple[int, int]:
    """'8.9' as (8, 9), so that capabilities compare."""
    major, _, minor = text.partition(".")
    return int(major), int(minor)
