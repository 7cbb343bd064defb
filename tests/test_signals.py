"""Ctrl-C and SIGTERM end `make test` at once: pytest, its workers, and what the tests have started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT

TEST = """
import pathlib, subprocess, pytest

@pytest.mark.parametrize("n", range(2))
def test_sleeps(n):
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    pathlib.Path(f"{n}.part").write_text(str(child.pid))
    pathlib.Path(f"{n}.part").rename(f"{n}.pid")
    child.wait()
"""


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_make_ends_all_processes(number: signal.Signals, workers: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ("tests.signals",)\n')
    (tmp_path / "test_it.py").write_text(TEST)
    pytest_line = (
        f"cd {tmp_path} && PYTHONPATH={ROOT} exec {sys.executable} -m pytest -p no:cacheprovider -n {workers} "
        "test_it.py"
    )
    (tmp_path / "Makefile").write_text(f"test:\n\t{pytest_line}\n")
    leader = psutil.Popen(
        ["make", "-C", str(tmp_path), "test"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wanted = [tmp_path / f"{n}.pid" for n in range(2 if workers == "2" else 1)]
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in wanted) and leader.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(path.exists() for path in wanted)
    everyone = [leader, *leader.children(recursive=True)]
    assert len(everyone) > 2
    if number == signal.SIGINT:  # a terminal sends it to the whole group, SIGTERM comes to make alone
        os.killpg(leader.pid, number)
    else:
        leader.send_signal(number)
    alive = psutil.wait_procs(everyone, timeout=20)[1]
    for process in alive:
        process.kill()
    assert not alive and leader.returncode != 0
