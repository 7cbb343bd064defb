"""Kill a run before each of its changes to the file system, and at random moments: nothing is lost, and the next run
leaves nothing behind.

    python -m tests.fuzz.kill --kills 500

After a kill the output is what it was, or what it was to become, whole; files of others are as they were. After the
next run the folder has what a run without a kill leaves, and the folder for temporary files is empty.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

EVENTS = {
    "os.rename",
    "os.remove",
    "os.truncate",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "shutil.rmtree",
    "tempfile.mkdtemp",
}
OTHERS = {
    "notes.txt": b"mine",
    "o.onnx.bak": b"a copy of mine",
    "other.onnx.data": b"weights of another",
    ".o.onnx.swp": b"an editor's",
}
_CALIB = "".join(json.dumps({"text": list(range(1, 20))}) + "\n" for _ in range(3))
_SMALL = ("--random", "--n-layer", "1", "--n-embd", "64", "--n-head", "4", "--vocab-size", "200", "--n-positions", "32")


@dataclass(frozen=True)
class Job:
    """What is run; `before` makes an earlier output that the run replaces."""

    run: tuple[str, ...]
    before: tuple[str, ...]
    output: str = "o.onnx"


JOBS = {
    "prune": Job(
        ("prune", "m.onnx", "o.onnx", "--no-check", "--copy-weights"),
        ("precision", "m.onnx", "o.onnx", "--to", "fp16", "--no-check"),
    ),
    "in place": Job(
        ("prune", "o.onnx", "o.onnx", "--force", "--no-check"),
        ("precision", "m.onnx", "o.onnx", "--to", "fp16", "--no-check"),
    ),
    "graph alone": Job(
        ("add-kv-cache", "m.onnx", "o.onnx", "--no-check"), ("quantize", "m.onnx", "o.onnx", "--int4-rtn", "--no-check")
    ),
    "export": Job(
        ("export", *_SMALL, "--dtype", "fp16", "-o", "o.onnx"), ("export", *_SMALL, "--dtype", "fp32", "-o", "o.onnx")
    ),
    "pipeline": Job(("pipeline", "recipe.yaml"), ("precision", "m.onnx", "o.onnx", "--to", "fp16", "--no-check")),
    "calibrated": Job(
        ("quantize", "m.onnx", "o.onnx", "--fp8", "--calib", "c.jsonl", "--no-check"),
        ("precision", "m.onnx", "o.onnx", "--to", "fp16", "--no-check"),
    ),
    "build": Job(
        ("build", "m.onnx", "o.engine", "--sparsity", "force", "--max-seq-len", "16"),
        ("build", "m.onnx", "o.engine", "--max-seq-len", "8"),
        "o.engine",
    ),
}


def call(
    args: tuple[str, ...],
    where: Path,
    *,
    before: int = 0,
    after: float = 0.0,
    number: int = signal.SIGKILL,
    count: Any = None,
) -> int:
    """The exit code of `onnxtools args` in `where`, in a forked process that is ended before its n-th change, or after
    so many seconds.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_called, args=(args, where, before, after, number, count)
    )
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{args} hung")
    return process.exitcode


def _called(args: tuple[str, ...], where: Path, before: int, after: float, number: int, count: Any) -> None:
    for handled in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(handled, signal.SIG_DFL)  # pytest's own would answer
    os.chdir(where)
    os.environ["TMPDIR"] = tempfile.tempdir = str(where / "tmp")
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    seen = 0

    def watch(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        opens = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (
            (not opens and event not in EVENTS)
            or str(given[0]).startswith(("/proc", "/dev", "/sys"))
            or "__pycache__" in str(given[0])
        ):
            return
        seen += 1
        if count is not None:
            count.value = seen
        if seen == before:
            os.kill(os.getpid(), number)

    from onnxtools.cli.main import main

    sys.addaudithook(watch)
    if after:
        threading.Timer(after, os.kill, (os.getpid(), number)).start()
    main(list(args))


def prepared(folder: Path) -> None:
    """The inputs that all jobs have."""
    (folder / "tmp").mkdir(parents=True)
    for name, data in OTHERS.items():
        (folder / name).write_bytes(data)
    (folder / "c.jsonl").write_text(_CALIB)
    (folder / "recipe.yaml").write_text(
        "input: m.onnx\noutput: o.onnx\npasses:\n  - prune: {}\n  - quantize: {scheme: int4-rtn}\n"
    )
    assert (
        call(("export", *_SMALL, "--kv-cache", "none", "--opset", "21", "--dtype", "fp32", "-o", "m.onnx"), folder) == 0
    )
    shutil.copyfile(folder / "m.onnx", folder / "backup.onnx")


def state(path: Path) -> str:
    """Of what the output holds, with all its weights; a graph that cannot be loaded raises."""
    if path.suffix != ".onnx":
        manifest = (
            json.loads(path.with_name(f"{path.name}.json").read_text()) if path.exists() else {"engine": {"sha256": ""}}
        )
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else str(manifest["engine"]["sha256"])
    from onnxtools.ir.model import Model

    model, digest = Model.load(path), hashlib.sha256()
    for value, tensor in sorted(model.weights(), key=lambda entry: entry[0].name or ""):
        digest.update(f"{value.name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def names(folder: Path) -> set[str]:
    """Of all files; the token in the name of a data file is left out, and ONNX Runtime's own `.ses`."""
    return {
        re.sub(r"\.[0-9a-f]{8}(?=\.data$)", "", str(path.relative_to(folder)))
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".ses"
    }


class Trial:
    """A job with what it starts from, what it gives, and how many changes it makes."""

    def __init__(self, name: str, base: Path, folder: Path) -> None:
        self.name, self.job, self.start = name, JOBS[name], folder / "start"
        shutil.copytree(base, self.start)
        assert call(self.job.before, self.start) == 0, self.job.before
        clean, began = folder / "clean", time.monotonic()
        shutil.copytree(self.start, clean)
        count = multiprocessing.get_context("fork").Value("i", 0)
        assert call(self.job.run, clean, count=count) == 0, self.job.run
        self.changes, self.seconds = int(count.value), time.monotonic() - began
        self.old, self.new, self.names = (
            state(self.start / self.job.output),
            state(clean / self.job.output),
            names(clean),
        )
        self.kept = {
            path.name: path.read_bytes()
            for path in self.start.iterdir()
            if path.is_file() and not path.name.startswith(("o.", "onnxtools.json"))
        } | OTHERS

    def kill(self, folder: Path, random: Random, before: int, number: int) -> str:
        """What went wrong; "" where nothing did."""
        shutil.copytree(self.start, folder)
        after = 0.0 if before else random.uniform(0.01, self.seconds)
        code = call(self.job.run, folder, before=before, after=after, number=number)
        if code not in (0, -number, 128 + number):
            return f"exit code {code}"
        try:
            found = state(folder / self.job.output)
        except Exception as error:
            return f"the output is broken: {error}"
        exact = self.name != "build"  # two builds of the same differ in their bytes
        if exact and found not in (self.old, self.new):
            return "the output is neither the old nor the new one"
        lost = [
            name
            for name, data in self.kept.items()
            if not (folder / name).is_file() or (folder / name).read_bytes() != data
        ]
        if lost:
            return f"files of others are lost: {lost}"
        if self.name == "in place" and found == self.new:
            shutil.copytree(self.start, folder, dirs_exist_ok=True)  # pruned already: there is nothing left to do again
        if call(self.job.run, folder):
            return "the next run fails"
        if exact and state(folder / self.job.output) != self.new:
            return "the next run gives something else"
        left = (
            (names(folder) ^ self.names)
            if not (self.name == "in place" and found == self.new)
            else set(_hidden(folder))
        )
        return f"after the next run the files differ: {sorted(left)}" if left else ""


def _hidden(folder: Path) -> list[str]:
    """What a run may have left: names that begin with a dot, and anything in the folder for temporary files."""
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".") and path.name not in OTHERS]
    return hidden + [path.name for path in (folder / "tmp").iterdir() if path.name != ".ses"]


def run(chosen: list[str], kills: int, seed: int = 0) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Half of the kills before changes to the file system, spread over all of each job; half at random moments.

    Every fifth is SIGTERM.
    """
    random, counts, faults = Random(seed), Counter[tuple[str, str]](), list[str]()
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        base = Path(root) / "base"
        prepared(base)
        for name in chosen:
            trial = Trial(name, base, Path(root) / name.replace(" ", "-"))
            each = -(-kills // len(chosen))
            for index in range(each):
                before = (
                    1 + (index // 2 * trial.changes // max(1, (each + 1) // 2)) % trial.changes if index % 2 == 0 else 0
                )
                number = signal.SIGTERM if index % 5 == 4 else signal.SIGKILL
                folder = Path(root) / "x"
                wrong = trial.kill(folder, random, before, number)
                shutil.rmtree(folder)
                counts[name, "before a change" if before else "at a moment"] += 1
                if wrong:
                    faults.append(
                        f"{name}, {signal.Signals(number).name} "
                        f"{f'before change {before} of {trial.changes}' if before else 'at a random moment'}: {wrong}"
                    )
    return counts, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--job", action="append", choices=sorted(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chosen, began = args.job or list(JOBS), time.monotonic()
    counts, faults = run(chosen, args.kills, args.seed)
    print(f"{date.today()}, Python {platform.python_version()}, {time.monotonic() - began:.0f} s\n")
    print("| job | killed before a change | at a moment |\n| --- | ---: | ---: |")
    for name in chosen:
        print(f"| {name} | {counts[name, 'before a change']} | {counts[name, 'at a moment']} |")
    print(f"\n{sum(counts.values())} kills, {len(faults)} faults")
    print("\n".join(faults))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
