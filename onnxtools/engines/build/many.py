"""Several engines at once: a process each, a device each where there are any, and no more at a time than memory
holds.
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
"""Of a process with TensorRT in it; its weights are counted twice, as it holds them and the plan."""


_PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when its parent dies (prctl)."""


@dataclass(frozen=True)
class Job:
    """One model and where its engine goes."""

    model: Path
    engine: Path


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        manifest: of the engine; None where it failed.
        error: one line; empty where it did not.
        reused: the engine lay there already.
        last: as of `Engine`.
        exit_code: of the error.
    """

    job: Job
    seconds: float
    manifest: dict[str, Any] | None
    error: str
    reused: bool = False
    last: str = ""
    exit_code: int = 0


def build_many(
    jobs: Sequence[Job], spec: EngineSpec, *, workers: int, force: bool, done: Callable[[Outcome], None]
) -> list[Outcome]:
    """Build all; one that fails does not stop the others.

    Args:
        workers: processes at a time, fewer where memory is short.
        done: called as each ends.
    Returns:
        Outcomes in the order of `jobs`.
    Raises:
        KeyboardInterrupt, SystemExit: Ctrl-C, SIGTERM; the processes have been told and have ended, and finished
        engines stay.
    """
    context = multiprocessing.get_context("spawn")  # a forked TensorRT does not work
    devices, waiting, room = visible_devices(), list(enumerate(jobs)), available_bytes()
    running: dict[Connection, tuple[int, Any, float, int, str | None, Any]] = {}
    outcomes: dict[int, Outcome] = {}
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _cancel) if main else None
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, job = waiting[0]
                need = _needed(job.model)
                if running and room is not None and sum(entry[3] for entry in running.values()) + need > room:
                    break  # the next one waits until memory is free
                waiting.pop(0)
                free = [d for d in devices if d not in [entry[4] for entry in running.values()]]
                device = free[0] if free else devices[number % len(devices)] if devices else None
                receiver, sender = context.Pipe(duplex=False)
                words = context.Array("c", last_words.SIZE, lock=False)
                process = context.Process(target=_work, args=(job, spec, force, device, sender, words))
                _start(process)
                sender.close()
                running[receiver] = (number, process, time.monotonic(), need, device, words)
            ready = set(wait(list(running)))
            for receiver in [one for one in running if one in ready]:
                number, process, started, *_, words = running.pop(receiver)
                outcomes[number] = _outcome(jobs[number], spec, receiver, process, time.monotonic() - started, words)
                done(outcomes[number])
    except BaseException:
        for _, process, *_ in running.values():
            process.terminate()
        raise
    finally:
        for _, process, *_ in running.values():
            process.join()
        if main:
            signal.signal(signal.SIGTERM, before)
    return [outcomes[number] for number in range(len(jobs))]


def _work(job: Job, spec: EngineSpec, force: bool, device: str | None, sender: Connection, words: Any) -> None:
    """In the process of one job."""
    signal.signal(signal.SIGTERM, _cancel)
    last_words.keep_in(words)
    if sys.platform == "linux":  # a parent that is killed takes its processes along
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # TensorRT's own words too: the parent reports
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt, SystemExit):
        try:
            engine = build(job.model, job.engine, spec, force=force)
            sender.send((engine.manifest, "", engine.reused, engine.last, 0))
        except OnnxtoolsError as error:
            sender.send((None, str(error), False, "", error.exit_code))


def _start(process: Any) -> None:
    """Ctrl-C reaches a whole process group; the processes wait for SIGTERM instead, by which the parent ends them in an
    orderly way.
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


def _needed(path: Path) -> int:
    """Bytes that building may take; a model that cannot be read takes none, and its process says why."""
    try:
        # Weights inside the graph file are held by the parser, and by us, too (measured: 3.6 GB for 0.74 GB of them).
        return 2 * Model.load(path).weight_bytes() + 3 * path.stat().st_size + _OVERHEAD
    except (OnnxtoolsError, OSError):
        return 0


def visible_devices() -> list[str]:
    """CUDA devices by what CUDA_VISIBLE_DEVICES, else nvidia-smi, says; none without a GPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [text for text in named.split(",") if text.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(index) for index, line in enumerate(told.splitlines()) if line.startswith("GPU ")]


def engine_paths(models: Sequence[Path], folder: Path | None) -> list[Job]:
    """`a.onnx` becomes `a.engine`, beside it or in `folder`.

    Raises:
        UsageError: a model is named twice.
        JobError: two would have one name.
    """
    twice = next((model for model in models if models.count(model) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice; name each model once, and an engine with another name")
    jobs = [Job(model, (folder or model.parent) / f"{model.stem}.engine") for model in models]
    taken: dict[Path, Path] = {}
    for job in jobs:
        if job.engine in taken:
            raise JobError(f"{job.model} and {taken[job.engine]} would both become {job.engine}; rename one")
        taken[job.engine] = job.model
    return jobs
