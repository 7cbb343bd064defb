"""How far a job is: bars on a terminal (of bytes, and of things), a line every half minute elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator

DELAY_SECONDS = 2.0
EVERY_SECONDS = 30.0

_under_way: list[Callable[[], str]] = []
"""What is counted right now, the innermost last; each gives its line."""


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield `advance(count)`, safe to call from several threads; `total` and `count` are in the same unit (bytes)."""
    done, lock = 0, threading.Lock()
    if not sys.stderr.isatty():

        def count_only(count: int) -> None:
            nonlocal done
            with lock:
                done += count

        with _told(lambda: f"{label}: {done / max(1, total):.0%} of {total / 1e9:.1f} GB"):
            yield count_only
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=total)
    started, visible = time.monotonic(), False

    def advance(count: int) -> None:
        nonlocal visible
        with lock:
            if not visible and time.monotonic() - started > DELAY_SECONDS:
                bar.start()
                visible = True
            bar.advance(task, count)

    try:
        yield advance
    finally:
        if visible:
            bar.stop()


@contextlib.contextmanager
def counted(label: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar of things, with the time left; yields what advances it, by one or by a count."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    err = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(label, total=total, completed=done)
        with _told(lambda: f"{label}: {bar.tasks[0].completed:.0f} of {total}"):
            yield lambda count=1: bar.advance(task, count)


@contextlib.contextmanager
def _told(line: Callable[[], str]) -> Iterator[None]:
    _under_way.append(line)
    try:
        yield
    finally:
        _under_way.remove(line)


class Heartbeat(logging.Handler):
    """A line on stderr every `seconds`: what is counted right now, else what was begun last (the log's last line)."""

    def __init__(self, seconds: float = EVERY_SECONDS) -> None:
        super().__init__(logging.INFO)
        self.last, self.seconds = "", seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()

    def _beat(self) -> None:
        started = time.monotonic()
        while not self._ended.wait(self.seconds):
            with contextlib.suppress(IndexError, OSError, ValueError):  # it ended meanwhile, or stderr is closed
                line = _under_way[-1]() if _under_way else self.last or "at work"
                print(f"[{time.monotonic() - started:.0f} s] {line}", file=sys.stderr, flush=True)
