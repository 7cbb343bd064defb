"""Shared by the benchmarks: whole processes measured from outside, interleaved; tables; the facts of the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "numpy", "ml-dtypes", "polygraphy", "onnx-graphsurgeon")
MEMORY_TARGET = "<= 200 MB"

Command = Sequence[str]


@dataclass(frozen=True)
class Run:
    """Wall seconds and peak resident MB (10^6 bytes) of one process (VmHWM, sampled until it ends)."""

    seconds: float
    peak_mb: float


@dataclass(frozen=True)
class Row:
    """One line of a table; `seconds` is the median of the runs, `peak_mb` their maximum; `moved`: the weights were
    read.
    """

    what: str
    gigabytes: float
    seconds: float
    fastest: float
    slowest: float
    peak_mb: float
    ratio: str = ""
    target: str = ""
    moved: bool = True


def tool(name: str) -> str:
    """Path of a program installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


def parser(doc: str | None, runs: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--runs", type=int, default=runs, help=f"repetitions of each measurement [{runs}]")
    made.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the models go; they are removed at the end",
    )
    made.add_argument("--json", action="store_true", help="print the rows as JSON")
    return made


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="onnxtools-bench-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(command: Command) -> Run:
    """Run `command` to its end; raises CalledProcessError if it fails.

    The peak is read from /proc: `ru_maxrss` of a child starts at what its parent held when it forked.
    """
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(list(command), stdout=subprocess.DEVNULL, stderr=errors)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _high_water_mb(process.pid))
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            raise subprocess.CalledProcessError(
                process.returncode, list(command), stderr=errors.read().decode(errors="replace")
            )
    return Run(seconds, peak)


def _high_water_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), 0.0)


def interleave(cases: Mapping[str, Command], runs: int, before: Callable[[], None]) -> dict[str, list[Run]]:
    """Run the commands in turn, every second round backwards (A B C, C B A); `before` each one, untimed.

    Backwards, because the first big write after a rest pays for pages that the host took back from a virtual machine.
    """
    found: dict[str, list[Run]] = {name: [] for name in cases}
    for index in range(runs):
        for name in list(cases)[:: -1 if index % 2 else 1]:
            before()
            os.sync()
            found[name].append(run(cases[name]))
    return found


def warm(path: Path) -> None:
    """Read a file once, so that it lies in the page cache."""
    buffer = bytearray(16 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def empty(folder: Path) -> None:
    """Make `folder` exist and hold nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def times_faster(base: Sequence[Run], found: Sequence[Run]) -> float:
    """Median over the rounds of `base` seconds over `found` seconds, so that a drift of the machine cancels."""
    return statistics.median(b.seconds / f.seconds for b, f in zip(base, found, strict=True))


def row(what: str, size: int, runs: Sequence[Run], ratio: str = "", target: str = "", *, moved: bool = True) -> Row:
    seconds = [r.seconds for r in runs]
    return Row(
        what,
        size / 1e9,
        statistics.median(seconds),
        min(seconds),
        max(seconds),
        max(r.peak_mb for r in runs),
        ratio,
        target,
        moved,
    )


def against_cp(data: Path, out: Path, commands: Mapping[str, Command], runs: int, target: str) -> list[Row]:
    """`cp` of the file `data` into `out`, and `commands` that write there; `data` warm before each run.

    The ratio is of the fastest runs: a virtual machine whose host takes free pages back makes any of them up to ten
    times slower, at random (the same `cp` of 2.45 GB took 0.57 to 6.1 s, all of it system time).
    """
    cases: dict[str, Command] = {"cp": ["cp", str(data), str(out / "copy")], **commands}

    def before() -> None:
        empty(out)
        warm(data)

    found = interleave(cases, runs, before)
    empty(out)
    size = data.stat().st_size
    fastest = {name: min(r.seconds for r in found[name]) for name in cases}
    return [row("cp", size, found["cp"])] + [
        row(name, size, found[name], f"{fastest['cp'] / fastest[name]:.0%} of cp", target) for name in commands
    ]


def machine(folder: Path) -> str:
    """Cores, CPU, memory, system, and the file system of `folder`."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown CPU",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores ({cpu}), {memory:.0f} GiB, {platform.system()} {platform.release()}, "
        f"{_file_system(folder)}"
    )


def _file_system(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(place, kind) for place, kind in mounts if folder.resolve().is_relative_to(place)]
    return max(inside, key=lambda mount: len(mount[0]))[1]


def report(name: str, title: str, rows: Sequence[Row], notes: Sequence[str], options: argparse.Namespace) -> None:
    """Print the table (or JSON) and write benchmarks/results/NAME.md."""
    columns = ("what", "weights GB", "s (fastest - slowest)", "GB/s", "peak MB", "ratio", "target")
    lines = [
        f"# {title}",
        "",
        f"{date.today()}, Python {platform.python_version()}, {', '.join(f'{p} {version(p)}' for p in PACKAGES)}",
        "",
        machine(options.folder),
        "",
        f"`python {shlex.join([f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]])}`",
        "",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
        *(f"| {' | '.join(_cells(r))} |" for r in rows),
        "",
        f"- Whole processes, {options.runs} runs each, interleaved (A B, B A), medians; the ratio to `cp` is of the "
        "fastest runs; the peak is VmHWM.",
        "- Page cache warm: the data file is read once before each timed run.",
        *(f"- {note}" for note in notes),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(json.dumps([asdict(r) for r in rows], indent=2) if options.json else "\n".join(lines))


def _cells(r: Row) -> list[str]:
    spread = f" ({r.fastest:.2f} - {r.slowest:.2f})" if r.slowest > r.fastest else ""
    speed = f"{r.gigabytes / r.seconds:.2f}" if r.moved else ""
    return [r.what, f"{r.gigabytes:.2f}", f"{r.seconds:.2f}{spread}", speed, f"{r.peak_mb:.0f}", r.ratio, r.target]
