"""Progress of a job: bars of bytes or items on a terminal, and one line every 30 seconds elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator

DELAY_SECONDS = 2.0
EVERY_SECONDS = 30.0

_progress_lines: list[Callable[[], str]] = []
"""Functions that return the line of each running count, the innermost last."""


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(count)`, which several threads may call.

    Args:
        label: the text beside the bar.
        total: bytes in all; `count` is in bytes too.
    """
    done, lock = 0, threading.Lock()
    if not sys.stderr.isatty():

        def count_only(count: int) -> None:
            nonlocal done
            with lock:
                done += count

        with _heartbeat_line(lambda: f"{label}: {done / max(1, total):.0%} of {total / 1e9:.1f} GB"):
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
    """Shows a bar of items with the remaining time. Yields `advance(count=1)`.

    Args:
        label: the text beside the bar.
        total: items in all.
        done: items that are finished at the start.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    err = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(label, total=total, completed=done)
        with _heartbeat_line(lambda: f"{label}: {bar.tasks[0].completed:.0f} of {total}"):
            yield lambda count=1: bar.advance(task, count)


@contextlib.contextmanager
def _heartbeat_line(line: Callable[[], str]) -> Iterator[None]:
    """Let `Heartbeat` print `line()` while the context lasts."""
    _progress_lines.append(line)
    try:
        yield
    finally:
        _progress_lines.remove(line)


class Heartbeat(logging.Handler):
    """Prints a line on stderr every `seconds`: the innermost running count, else the last message of the log."""

    def __init__(self, seconds: float = EVERY_SECONDS) -> None:
        super().__init__(logging.INFO)
        self.last, self.seconds = "", seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Remember the message for the next line."""
        self.last = record.getMessage()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Print lines while the context lasts. One object can be used once."""
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()

    def _beat(self) -> None:
        started = time.monotonic()
        while not self._ended.wait(self.seconds):
            with contextlib.suppress(IndexError, OSError, ValueError):  # the count ended meanwhile, or stderr is closed
                line = _progress_lines[-1]() if _progress_lines else self.last or "at work"
                print(f"[{time.monotonic() - started:.0f} s] {line}", file=sys.stderr, flush=True)
