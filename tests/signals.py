"""A pytest plugin: a signal ends the run at once, with every process that a test has started."""

from __future__ import annotations

import contextlib
import signal
from types import FrameType

import psutil
import pytest

GRACE = 1.0
"""Seconds that processes get to remove their temporary files."""


def pytest_configure(config: pytest.Config) -> None:
    """In the process that leads the run; its workers (pytest-xdist) are ended by it."""
    if not hasattr(config, "workerinput"):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """End all children, then the run; pytest reports what has failed so far.

    A test's process may be in a session of its own, where Ctrl-C does not reach it, and workers notice the end of
    their leader only after the test they are in.
    """
    signal.signal(number, signal.SIG_DFL)  # the second one ends the leader without a report
    children = psutil.Process().children(recursive=True)
    for kill in (psutil.Process.terminate, psutil.Process.kill):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                children += [found for found in child.children(recursive=True) if found not in children]
                kill(child)
        children = psutil.wait_procs(children, timeout=GRACE)[1]
    raise KeyboardInterrupt(signal.Signals(number).name)
