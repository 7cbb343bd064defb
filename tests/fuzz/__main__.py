"""Run executions of the targets in processes of limited memory, and print a table; every fault with the line that
repeats it.

python -m tests.fuzz --executions 100000 --jobs 2
python -m tests.fuzz --target pickle --number 4711      # one again, with its traceback
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import date
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

SECONDS, MEMORY = 10, 6 << 30
BATCH = 250


class TookTooLong(BaseException):
    """No `except Exception` of the tool may catch it."""


def execute(name: str, number: int, where: Path) -> str:
    """One execution: `answered`, `refused`, or what went wrong."""
    from onnxtools.base.errors import OnnxtoolsError

    from tests.fuzz.targets import TARGETS  # isort: skip

    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        TARGETS[name](Random(f"{name} {number}"), where)
    except OnnxtoolsError as error:
        return "refused" if str(error).strip() else "an empty message"
    except MemoryError:
        return "out of memory"
    except TookTooLong:
        return "took too long"
    except RecursionError:
        return "RecursionError"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "answered"


def work(name: str, first: int, count: int, sender: Connection) -> None:
    """In a process of its own: a batch of one target, each outcome sent as it comes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # native libraries' words

    def too_long(*_: Any) -> None:
        raise TookTooLong

    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        from tests.fuzz import targets

        targets.TARGETS[name]  # the imports are no part of the limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for number in range(first, first + count):
            sender.send(("began", number))
            sender.send((execute(name, number, Path(folder) / "x"), number))
    sender.send(("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


class Batch:
    """A process with a batch of executions, watched from outside: what hangs in native code is killed and counted."""

    def __init__(self, name: str, first: int, count: int) -> None:
        self.name, self.last, self.end = name, first, first + count
        self.receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
        self.process = multiprocessing.get_context("fork").Process(target=work, args=(name, first, count, sender))
        self.process.start()
        sender.close()
        self.heard = time.monotonic()

    def hear(self, counts: Counter[tuple[str, str]], faults: list[str]) -> int | None:
        """Take one message; returns the peak in KiB at the end, None before; EOFError where it died."""
        said, number = self.receiver.recv()
        self.heard = time.monotonic()
        if said == "peak":
            return int(number)
        self.last = number
        if said != "began":
            counts[self.name, said if said in ("answered", "refused") else "fault"] += 1
            if said not in ("answered", "refused"):
                faults.append(f"{said}: python -m tests.fuzz --target {self.name} --number {number}")
        return None


def run(
    names: list[str], executions: int, jobs: int, start: int = 0
) -> tuple[Counter[tuple[str, str]], list[str], float]:
    """All executions, spread over the targets; counts, faults, and the largest process in GB."""
    each = -(-executions // len(names))
    waiting = [(name, start + first, min(BATCH, each - first)) for first in range(0, each, BATCH) for name in names][
        ::-1
    ]
    running: list[Batch] = []
    counts: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    peak = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Batch(*waiting.pop()))
        ready = set(wait([batch.receiver for batch in running], timeout=1))
        for batch in list(running):
            dead = ""
            try:
                while batch.receiver in ready and batch.receiver.poll():
                    found = batch.hear(counts, faults)
                    if found is not None:
                        peak = max(peak, found)
                        batch.process.join()
                        running.remove(batch)
                        break
            except EOFError:
                batch.process.join()
                dead = f"ended with {batch.process.exitcode}"
            if not dead and batch in running and time.monotonic() - batch.heard > 3 * SECONDS:
                batch.process.kill()
                batch.process.join()
                dead = "hung in native code"
            if dead:
                running.remove(batch)
                counts[batch.name, "fault"] += 1
                faults.append(f"{dead}: python -m tests.fuzz --target {batch.name} --number {batch.last}")
                if batch.last + 1 < batch.end:
                    waiting.append((batch.name, batch.last + 1, batch.end - batch.last - 1))
        if sys.stderr.isatty():
            print(f"\r{sum(counts.values())} executions, {len(faults)} faults", end="", file=sys.stderr, flush=True)
    return counts, faults, peak / (1 << 20)


def main() -> None:
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only these")
    parser.add_argument("--number", type=int, help="this execution alone, here, with its traceback")
    parser.add_argument("--start", type=int, default=0, help="number of the first execution of each target")
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    if args.number is not None:
        with tempfile.TemporaryDirectory() as folder:
            TARGETS[names[0]](Random(f"{names[0]} {args.number}"), Path(folder))
        return
    from tests.fuzz import seeds

    for make in (seeds.graphs, seeds.gguf_file, seeds.pickles, seeds.by_torch, seeds.nemo_tar):
        make()  # once, before the processes fork
    began = time.monotonic()
    counts, faults, peak = run(names, args.executions, args.jobs, args.start)
    print(
        f"{date.today()}, Python {platform.python_version()}, {args.jobs} processes, {time.monotonic() - began:.0f} s, "
        f"largest process {peak:.2f} GB\n"
    )
    print("| target | executions | answered | refused | faults |\n| --- | ---: | ---: | ---: | ---: |")
    for name in names:
        found = [counts[name, kind] for kind in ("answered", "refused", "fault")]
        print(f"| {name} | {sum(found)} | {found[0]} | {found[1]} | {found[2]} |")
    totals = [sum(counts[name, kind] for name in names) for kind in ("answered", "refused", "fault")]
    print(f"| all | {sum(totals)} | {totals[0]} | {totals[1]} | {totals[2]} |\n")
    print("\n".join(faults))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
