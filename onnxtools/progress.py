"""Progress bars, on a terminal alone: of bytes (shown after two seconds) and of things."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

DELAY_SECONDS = 2.0


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield `advance(count)`, safe to call from several threads; `total` and `count` are in the same unit (bytes)."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = ("[progress.description]{task.description}", BarColumn(), TaskProgressColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=total)
    started, lock, visible = time.monotonic(), threading.Lock(), False

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
        yield lambda count=1: bar.advance(task, count)
