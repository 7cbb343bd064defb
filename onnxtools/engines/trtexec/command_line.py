"""The trtexec line that builds the same engine, with the options of each version."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxtools.base.errors import UsageError
from onnxtools.engines.build.profiles import Profile, Range
from onnxtools.engines.build.spec import PRECISIONS, EngineSpec, pool_size
from onnxtools.engines.build.versions import Version, check_options, is_strongly_typed

NEWEST: Version = (11, 4)

_WORDS: dict[str, Callable[[Any], list[str]]] = {
    "sparsity": lambda value: [f"--sparsity={value}"],
    "timing_cache": lambda value: [f"--timingCacheFile={value}"],
    "error_on_cache_miss": lambda _: ["--errorOnTimingCacheMiss"],
    "mem_pool_size": lambda value: [f"--memPoolSize={','.join(_mebibytes(text) for text in value)}"],
    "builder_optimization_level": lambda value: [f"--builderOptimizationLevel={value}"],
    "tiling_optimization_level": lambda value: [
        f"--tilingOptimizationLevel={['none', 'fast', 'moderate', 'full'].index(value)}"
    ],
    "hardware_compatibility_level": lambda value: [f"--hardwareCompatibilityLevel={value}"],
    "version_compatible": lambda _: ["--versionCompatible"],
    "refit": lambda _: ["--refit"],
    "strip_weights": lambda _: ["--stripWeights"],
    "allow_weight_streaming": lambda _: ["--allowWeightStreaming"],
    "tf32": lambda value: [] if value else ["--noTF32"],
    "profiling_verbosity": lambda value: [f"--profilingVerbosity={value}"],
    "tactic_sources": lambda value: [f"--tacticSources={value}"],
    "plugins": lambda value: [f"--staticPlugins={path}" for path in value],
    "device": lambda value: [f"--device={value}"],
}
"""trtexec's options by field of `EngineSpec`; they are written if the value is not trtexec's default."""
_QUIET = {
    "sparsity": "disable",
    "hardware_compatibility_level": "none",
    "profiling_verbosity": "layer_names_only",
    "device": 0,
    "tf32": True,
}


def trtexec_line(
    model_path: Path,
    engine_path: Path,
    spec: EngineSpec,
    profiles: Sequence[Profile],
    version: Version = NEWEST,
    *,
    mixed: bool = True,
) -> str:
    """One shell command for trtexec of `version`.

    trtexec builds for the GPU that it runs on, so `--compute-capability` has no counterpart. trtexec does not make the
    changes that onnxtools makes on the parsed network.

    Args:
        mixed: whether the graph has Q/DQ or more than one floating-point type.

    Raises:
        UsageError: this version does not have one of the options, or cannot build several profiles.
    """
    return shlex.join(trtexec_words(model_path, engine_path, spec, profiles, version, mixed=mixed))


def trtexec_words(
    model_path: Path, engine_path: Path, spec: EngineSpec, profiles: Sequence[Profile], version: Version, *, mixed: bool
) -> list[str]:
    """The words of `trtexec_line`, unquoted."""
    check_options(spec, "trtexec", version)
    words = ["trtexec", f"--onnx={model_path}", f"--saveEngine={engine_path}", "--skipInference"]
    words += _typing(spec, version, mixed)
    for field, say in _WORDS.items():
        value = getattr(spec, field)
        if (value not in (None, (), False) and value != _QUIET.get(field)) or (field == "tf32" and not value):
            words += say(value)
    if len(profiles) > 1 and version < (9,):
        names = ", ".join(profile.name for profile in profiles)
        raise UsageError(
            f"trtexec {'.'.join(map(str, version))} builds one profile, not {names}; use --backend tensorrt, or one of "
            "--min-shapes"
        )
    for index, profile in enumerate(profiles):  # the shapes must follow their --profile, which counts from 0
        words += [f"--profile={index}"] if len(profiles) > 1 else []
        for bound in ("min", "opt", "max"):
            shapes = (
                f"{name}:{'x'.join(map(str, shape))}" for name, shape in _shapes(profile.shapes, bound, version).items()
            )
            words.append(f"--{bound}Shapes={','.join(shapes)}")
    return words


def _typing(spec: EngineSpec, version: Version, mixed: bool) -> list[str]:
    """The option for strong typing, or the precision flags; TensorRT 11 has neither."""
    if version >= (11,):
        return []
    if is_strongly_typed(spec, "trtexec", version, mixed):
        return ["--stronglyTyped"]
    return [f"--{name}" for name in PRECISIONS if getattr(spec, name)]


def _mebibytes(text: str) -> str:
    """POOL:SIZE in MiB without a unit: trtexec of 8.6 knows no units."""
    pool, size = pool_size(text)
    return f"{pool}:{size / (1 << 20):g}"


def _shapes(shapes: Mapping[str, Range], bound: str, version: Version) -> dict[str, tuple[int, ...]]:
    """Shapes by name; layers with the same shape share one wildcard.

    8.6 has no wildcards; later versions take one in a name.
    """
    by_name: dict[str, tuple[int, ...]] = {}
    patterns: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, span in shapes.items():
        if span.min:
            patterns.setdefault(re.sub(r"\d+", "*", name), []).append((name, getattr(span, bound)))
    for pattern, members in patterns.items():
        matching = [name for name in shapes if re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name)]
        same = (
            len({shape for _, shape in members}) == 1
            and len(members) > 1
            and len(matching) == len(members)
            and pattern.count("*") == 1
            and version >= (9,)
        )
        by_name.update({pattern: members[0][1]} if same else dict(members))
    return by_name
