"""The trtexec backend: runs NVIDIA's own program and reads its log.

NOT YET RUN: no machine of this project has it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnxtools.base.errors import JobError
from onnxtools.engines.build.builder import Built, Limits, TensorInfo
from onnxtools.engines.build.manifest import hash_file
from onnxtools.engines.build.profiles import Profile
from onnxtools.engines.build.spec import EngineSpec, version_of
from onnxtools.engines.build.versions import Version, ceilings, is_mixed
from onnxtools.engines.trtexec.command_line import NEWEST, trtexec_words
from onnxtools.ir.model import Model

IO_SOURCE = "graph (trtexec tells nothing of the network)"


class OnPaper:
    """The known limits of a TensorRT that is not installed, for `preflight`."""

    name = "trtexec"

    def __init__(self, version: Version) -> None:
        self._number = version

    def limits(self) -> Limits:
        opset, ir_version = ceilings(self._number)
        return Limits(opset=opset, ir_version=ir_version, capabilities=())

    def supports(self, op_type: str) -> bool:
        """Always True: the operators are not known, and the opset decides."""
        return True


class TrtexecBuilder(OnPaper):
    """See `onnxtools.engines.build.builder.Builder`.

    Raises:
        JobError: there is no trtexec on PATH.
    """

    def __init__(self) -> None:
        program = shutil.which("trtexec")
        if program is None:
            raise JobError(
                "trtexec is not on PATH; install TensorRT, or print the line with --print-trtexec and run it where it "
                "is"
            )
        self._program = program
        usage = subprocess.run([program, "--help"], capture_output=True, text=True, check=False).stdout
        super().__init__(read_version(usage) or NEWEST)

    def version(self) -> str:
        return ".".join(map(str, self._number))

    def build(self, model: Model, source: Path, plan: Path, profiles: Sequence[Profile], spec: EngineSpec) -> Built:
        words = trtexec_words(source, plan, spec, profiles, self._number, mixed=is_mixed(model))
        process = subprocess.Popen(
            [self._program, *words[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        try:
            log = read_log(process.stdout)
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if code or not plan.is_file() or not plan.stat().st_size:
            raise JobError(
                f"{source}: trtexec failed (exit code {code}): {'; '.join(log.errors[:3]) or 'it gave no reason'}; run "
                "the line of --print-trtexec"
            )
        digest = hash_file(plan)
        inputs, outputs = ([_info(value) for value in values] for values in (model.graph.inputs, model.graph.outputs))
        return Built(
            inputs,
            outputs,
            io_source=IO_SOURCE,
            notes=log.notes(),
            warnings=list(dict.fromkeys(log.warnings)),
            size=digest["bytes"],
            sha256=digest["sha256"],
        )


def _info(value: object) -> TensorInfo:
    import onnx_ir as ir

    assert isinstance(value, ir.Value) and value.dtype is not None and value.shape is not None
    return TensorInfo(
        value.name or "",
        str(value.dtype.numpy().name),
        tuple(dim if isinstance(dim, int) else -1 for dim in value.shape),
    )


@dataclass
class Log:
    """The content of a trtexec log.

    Attributes:
        errors: the error messages.
        warnings: the warnings.
        eligible: number of layers that could take sparse kernels; None if the log does not say.
        picked: number of layers that took sparse kernels; None if the log does not say.
        seconds: time of the engine's build; None if the log does not say.
        passed: whether the log says PASSED.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    eligible: int | None = None
    picked: int | None = None
    seconds: float | None = None
    passed: bool = False

    def notes(self) -> list[str]:
        """Notes for people: the build time and the sparse layers."""
        lines = [f"trtexec built it in {self.seconds:.1f} s"] if self.seconds is not None else []
        if self.eligible is not None:
            lines.append(f"sparsity: {self.picked or 0} of {self.eligible} eligible layers took a sparse kernel")
        return lines


def read_log(lines: Iterable[str]) -> Log:
    """Errors, warnings, the build time and the sparse layers of a log."""
    log = Log()
    for line in lines:
        match = re.match(r"(?:\[[^\]]*\] )?\[([EWIV])\] (.*)", line.strip())
        if match is None:
            log.passed |= "&&&& PASSED" in line
            continue
        level, text = match.groups()
        text = re.sub(r"^\[TRT\] ", "", text)
        if level == "E":
            log.errors.append(text)
        elif level == "W":
            log.warnings.append(text)
        elif fields := _ELIGIBLE.match(text):
            log.eligible = _layers(fields)
        elif fields := _PICKED.match(text):
            log.picked = _layers(fields)
        elif fields := re.match(r"Engine (?:built|generated|generation completed) in ([\d.]+) sec", text):
            log.seconds = float(fields[1])
        log.passed |= "&&&& PASSED" in text
    return log


_ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics|Layers eligible for sparse "
    r"math):? ?(?P<names>.*)"
)
_PICKED = re.compile(
    r"\(Sparsity\) (?:Chose (?P<count>\d+) layer\(s\) using sparse tactics|TRT inference plan picked sparse "
    r"implementation for layers):? ?(?P<names>.*)"
)
"""Both patterns cover the two wordings that trtexec has had."""


def _layers(line: re.Match[str]) -> int:
    return int(line["count"]) if line["count"] else len([name for name in line["names"].split(",") if name.strip()])


def read_version(text: str) -> Version | None:
    """The version in trtexec's output, or None: `TensorRT.trtexec [TensorRT v101303]`, `v8601` in TensorRT 8 and 9."""
    match = re.search(r"TensorRT(?:\.trtexec)? \[?(?:TensorRT )?v(\d{4,6})\]?", text)
    if match is None:
        return None
    digits = match[1]
    if len(digits) == 4:  # 8601
        return version_of(f"{digits[0]}.{digits[1]}.{int(digits[2:])}")
    return version_of(f"{int(digits[:-4])}.{int(digits[-4:-2])}.{int(digits[-2:])}")
