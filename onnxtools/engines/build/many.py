"""Builds several engines at once, each in a process of its own, and on a device of its own if there are devices.

The number of processes is limited by the available memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from onnxtools.base.errors import JobError, OnnxtoolsError, UsageError
from onnxtools.base.memory import available_bytes
from onnxtools.engines.build import last_words
from onnxtools.engines.build.builder import get_builder
from onnxtools.engines.build.engine import build
from onnxtools.engines.build.manifest import manifest_path
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.ir.model import Model
from onnxtools.storage.files import sweep

_OVERHEAD = 1 << 30
"""Bytes of a process with TensorRT, without the weights, which count twice: it holds them and the plan."""


_PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when its parent dies (prctl)."""


@dataclass(frozen=True)
class Job:
    """One model and the path of its engine."""

    model: Path
    engine: Path


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: the job.
        seconds: wall time of its process.
        manifest: manifest of the engine; None if the job failed.
        error: one line; empty if the job succeeded.
        reused: whether the engine existed already.
        last: as in `Engine`.
        exit_code: exit code of the error; 0 if the job succeeded.
    """

    job: Job
    seconds: float
    manifest: dict[str, Any] | None
    error: str
    reused: bool = False
    last: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class _Running:
    """A process at work.

    Attributes:
        number: index of its job.
        started: `time.monotonic` at its start.
        need: bytes of memory that it may need.
        device: its CUDA device; None without one.
        words: shared memory for the builder's last message.
    """

    number: int
    process: Any
    started: float
    need: int
    device: str | None
    words: Any


def build_many(
    jobs: Sequence[Job], spec: EngineSpec, *, workers: int, force: bool, done: Callable[[Outcome], None]
) -> list[Outcome]:
    """Build all jobs; a job that fails does not stop the others.

    Args:
        workers: largest number of processes at a time; fewer run if memory is short.
        done: called with each outcome as its process ends.

    Returns:
        The outcomes in the order of `jobs`.

    Raises:
        KeyboardInterrupt, SystemExit: Ctrl-C, SIGTERM. The processes have then been terminated and have ended, and
            finished engines stay.
    """
    context = multiprocessing.get_context("spawn")  # a forked TensorRT does not work
    devices, waiting, room = visible_devices(), list(enumerate(jobs)), available_bytes()
    running: dict[Connection, _Running] = {}
    outcomes: dict[int, Outcome] = {}
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _cancel) if main else None
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, job = waiting[0]
                need = _bytes_needed(job.model)
                if running and room is not None and sum(entry.need for entry in running.values()) + need > room:
                    break  # the next job waits until memory is free
                waiting.pop(0)
                free = [d for d in devices if d not in [entry.device for entry in running.values()]]
                device = free[0] if free else devices[number % len(devices)] if devices else None
                receiver, sender = context.Pipe(duplex=False)
                words = context.Array("c", last_words.SIZE, lock=False)
                process = context.Process(target=_work, args=(job, spec, force, device, sender, words))
                _start(process)
                sender.close()
                running[receiver] = _Running(number, process, time.monotonic(), need, device, words)
            ready = set(wait(list(running)))
            for receiver in [connection for connection in running if connection in ready]:
                ended = running.pop(receiver)
                seconds = time.monotonic() - ended.started
                outcome = _outcome(jobs[ended.number], spec, receiver, ended.process, seconds, ended.words)
                outcomes[ended.number] = outcome
                done(outcome)
    except BaseException:
        for entry in running.values():
            entry.process.terminate()
        raise
    finally:
        for entry in running.values():
            entry.process.join()
        if main:
            signal.signal(signal.SIGTERM, before)
    return [outcomes[number] for number in range(len(jobs))]


def _work(job: Job, spec: EngineSpec, force: bool, device: str | None, sender: Connection, words: Any) -> None:
    """Run one job in a process of its own and send the result to the parent."""
    signal.signal(signal.SIGTERM, _cancel)
    last_words.keep_in(words)
    if sys.platform == "linux":  # the process ends if its parent is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # hides TensorRT's messages too: the parent reports
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt, SystemExit):
        try:
            engine = build(job.model, job.engine, spec, force=force)
            sender.send((engine.manifest, "", engine.reused, engine.last, 0))
        except OnnxtoolsError as error:
            sender.send((None, str(error), False, "", error.exit_code))


def _start(process: Any) -> None:
    """Start a process that ignores SIGINT.

    Ctrl-C reaches a whole process group. The processes ignore it, and the parent ends them with SIGTERM.
    """
    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        process.start()
    finally:
        if main:
            signal.signal(signal.SIGINT, previous)


def _cancel(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)


def _outcome(job: Job, spec: EngineSpec, receiver: Connection, process: Any, seconds: float, words: Any) -> Outcome:
    try:
        manifest, error, reused, last, code = receiver.recv()
    except EOFError:
        process.join()
        title = get_builder(spec.backend).name
        error = last_words.epitaph(Model.load(job.model), title, process.exitcode, words.value.decode(errors="replace"))
        manifest, reused, last, code = None, False, "", 1
        sweep(job.engine.parent, {job.engine.name, manifest_path(job.engine).name})
    process.join()
    return Outcome(job, seconds, manifest, error, reused, last, code)


def _bytes_needed(path: Path) -> int:
    """Bytes that a build may need; 0 for a model that cannot be read, whose process reports the reason."""
    try:
        # The parser and onnxtools hold weights inside the graph file, too (measured: 3.6 GB for 0.74 GB of weights).
        return 2 * Model.load(path).weight_bytes() + 3 * path.stat().st_size + _OVERHEAD
    except (OnnxtoolsError, OSError):
        return 0


def visible_devices() -> list[str]:
    """CUDA devices as CUDA_VISIBLE_DEVICES names them, else by index as nvidia-smi lists them; none without a GPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [text for text in named.split(",") if text.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(index) for index, line in enumerate(listing.splitlines()) if line.startswith("GPU ")]


def engine_paths(models: Sequence[Path], folder: Path | None) -> list[Job]:
    """Jobs that build `a.engine` of each `a.onnx`, beside it or in `folder`.

    Raises:
        UsageError: a model is named twice.
        JobError: two engines would have the same path.
    """
    twice = next((model for model in models if models.count(model) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice; name each model once, and an engine with another name")
    jobs = [Job(model, (folder or model.parent) / f"{model.stem}.engine") for model in models]
    owners: dict[Path, Path] = {}
    for job in jobs:
        if job.engine in owners:
            raise JobError(f"{job.model} and {owners[job.engine]} would both become {job.engine}; rename one")
        owners[job.engine] = job.model
    return jobs
