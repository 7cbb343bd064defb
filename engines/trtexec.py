"""The trtexec line that builds the same engine with TensorRT 11."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from onnxtools.engines.profiles import Profile
from onnxtools.engines.spec import EngineSpec


def trtexec_line(model_path: Path, engine_path: Path, spec: EngineSpec, profiles: Sequence[Profile]) -> str:
    """One shell command.

    TensorRT 11 networks are strongly typed: there is no precision flag, so `--fp8` leaves no trace. trtexec builds for the
    GPU it runs on, so `--compute-capability` leaves none either. What we mend on the parsed network, trtexec does not.
    """
    words = ["trtexec", f"--onnx={model_path}", f"--saveEngine={engine_path}", "--skipInference"]
    if spec.sparsity:
        words.append("--sparsity=enable")
    if spec.timing_cache is not None:
        words.append(f"--timingCacheFile={spec.timing_cache}")
    if spec.builder_optimization_level is not None:
        words.append(f"--builderOptimizationLevel={spec.builder_optimization_level}")
    if not spec.tf32:
        words.append("--noTF32")
    for index, profile in enumerate(profiles):
        words += [f"--profile={index}"] if len(profiles) > 1 else []
        for which in ("min", "opt", "max"):
            shapes = (f"{name}:{'x'.join(map(str, getattr(span, which)))}" for name, span in profile.shapes.items() if span.min)
            words.append(f"--{which}Shapes={','.join(shapes)}")
    return shlex.join(words)
