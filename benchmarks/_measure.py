"""Shared by the benchmarks: whole processes measured from outside, tables, and the facts of the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ONNXTOOLS = str(Path(sys.executable).with_name("onnxtools"))


@dataclass(frozen=True)
class Run:
    """Wall seconds and peak resident MiB of one process (VmHWM, sampled until it ends)."""

    seconds: float
    peak_mib: float


def run(command: Sequence[str]) -> Run:
    """Run `command` to its end; raises CalledProcessError if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(list(command), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _hwm(process.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - started
    error = process.stderr.read().decode() if process.stderr else ""
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command), stderr=error)
    return Run(seconds, peak)


def _hwm(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def median(runs: Sequence[Run]) -> Run:
    return Run(statistics.median(r.seconds for r in runs), max(r.peak_mib for r in runs))


def warm(path: Path) -> None:
    """Read a file once, so that it lies in the page cache."""
    with open(path, "rb", buffering=0) as file:
        while file.read(64 << 20):
            pass


def machine() -> str:
    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "unknown CPU")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({cpu}), {memory:.0f} GiB, {platform.system()} {platform.release()}"


def report(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], as_json: bool) -> None:
    """Print the table and write benchmarks/results/NAME.md."""
    packages = ("onnx", "onnx-ir", "onnxruntime", "numpy", "ml-dtypes", "polygraphy", "onnx-graphsurgeon")
    versions = ", ".join(f"{p} {version(p)}" for p in packages)
    lines = [f"# {title}", "", f"{date.today()}, Python {platform.python_version()}, {versions}", "", machine(), "", f"`python {' '.join(sys.argv)}`", ""]
    lines += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += [f"- {note}" for note in notes]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2) if as_json else "\n".join(lines))
