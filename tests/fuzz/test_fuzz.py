"""The minute of CI: every target answers or refuses, whole inputs are answered, and kills lose nothing.

The hour by hand is `python -m tests.fuzz`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("torch")

from onnxtools.base.errors import OnnxtoolsError
from tests.fuzz import kill, mutate, targets
from tests.fuzz.__main__ import execute, run

REFUSED_WHOLE = {
    "profiles": "is not batch, sequence|reads up to 22|has 16 positions",
    "add-kv-cache": "KV cache needs token|no causal mask|already has", "prune": "nothing to prune|nothing is pruned",
    "quantize": "nothing|already|opset 21", "pickle": "buffer is smaller",
}  # fmt: skip
"""What some whole seeds are refused for: not each is a decoder."""


def test_no_target_has_a_fault() -> None:
    """60 executions each, in processes that are watched, from a number that CI's runs share with nobody."""
    counts, faults, peak = run(list(targets.TARGETS), 60 * len(targets.TARGETS), os.cpu_count() or 1)
    assert not faults and sum(counts.values()) == 60 * len(targets.TARGETS) and peak < 6


@pytest.mark.parametrize("name", targets.TARGETS)
def test_whole_inputs_are_answered(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A target that refused its own seeds would find nothing."""
    monkeypatch.setattr(targets, "mutate_message", lambda random, message: None)
    monkeypatch.setattr(targets, "mutated_bytes", lambda random, data: data)
    monkeypatch.setattr(targets, "mutated_json", lambda random, data: data)
    monkeypatch.setattr(targets, "CHANGES", False)
    answered = 0
    for number in range(16):
        where = tmp_path / str(number)
        where.mkdir()
        try:
            targets.TARGETS[name](Random(number), where)
            answered += 1
        except OnnxtoolsError as error:
            assert name in REFUSED_WHOLE and any(words in str(error) for words in REFUSED_WHOLE[name].split("|")), error
    assert answered


def test_a_fault_is_found_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(targets.TARGETS, "load", lambda random, where: [][1])
    assert execute("load", 3, tmp_path / "x").startswith("IndexError at test_fuzz.py")
    monkeypatch.setitem(targets.TARGETS, "load", lambda random, where: bytearray(1 << 60) and None)
    assert execute("load", 3, tmp_path / "x") == "out of memory"


def test_an_execution_is_the_same_again() -> None:
    made = [mutate.mutated_json(Random("a 1"), b'{"a": [1, 2, {"b": "c"}]}') for _ in range(2)]
    assert made[0] == made[1]


@pytest.mark.parametrize("job", ["prune", "in place", "export", "calibrated"])
def test_kills_lose_nothing(job: str) -> None:
    counts, faults = kill.run([job], 6)
    assert not faults and sum(counts.values()) == 6


def test_a_lost_file_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill test itself: a run that deletes what it did not write fails it."""
    real = kill.call

    def careless(args: tuple[str, ...], where: Path, **options: object) -> int:
        if "--copy-weights" in args:
            (where / "notes.txt").unlink(missing_ok=True)
        return real(args, where, **options)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory():
        monkeypatch.setattr(kill, "call", careless)
        _, faults = kill.run(["prune"], 1)
    assert any("files of others are lost: ['notes.txt']" in fault for fault in faults)
