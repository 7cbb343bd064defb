"""Sequences that come and go in one session have the logits that they have alone, which are transformers'."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

pytest.importorskip("transformers", reason="it makes the tiny checkpoint (make setup installs it)")

from onnxtools.base.errors import JobError
from onnxtools.generation.runtime import Logits, RuntimeOptions, Session, open_runtime
from tests.exporter import hf
from tests.generation.models import checkpoint, exported, reference

CPU = RuntimeOptions(device="cpu", threads=2)
A, B, C = [5, 9, 30, 31, 77], [60, 61, 62, 63, 64, 65, 66, 67, 1], [3, 8]


@pytest.fixture(params=["concat", "scatter", "gqa", "none", "frameworks"])
def session(request: pytest.FixtureRequest) -> Session:
    if request.param == "frameworks":
        return open_runtime("frameworks:eager", checkpoint("llama"), CPU).open(3, 24)
    return open_runtime("onnxrt", exported("llama", request.param), CPU).open(3, 24)


class Texts:
    """What each slot holds, and what transformers says of it."""

    def __init__(self, session: Session) -> None:
        self.session, self.texts = session, dict[int, list[int]]()

    def admit(self, slots: Sequence[int], *prompts: Sequence[int]) -> None:
        self.texts |= {slot: list(prompt) for slot, prompt in zip(slots, prompts, strict=True)}
        self._agree(self.session.admit(slots, prompts), slots)

    def step(self, ids: Sequence[int], slots: Sequence[int] | None = None) -> None:
        for slot, token in zip(range(3) if slots is None else slots, ids, strict=True):
            self.texts[slot].append(token)
        self._agree(self.session.step(np.array(ids), slots), range(3) if slots is None else slots)

    def _agree(self, found: Logits, slots: Sequence[int]) -> None:
        logits, (best, top) = found.numpy(), found.argmax()
        for slot, row, token, score in zip(slots, logits, best, top, strict=True):
            ids = np.array([self.texts[slot]])
            expected = hf.logits(reference("llama"), ids, np.ones_like(ids))[0, -1]
            np.testing.assert_allclose(row, expected, atol=1e-4)
            assert token == expected.argmax() and np.isfinite(score)


def test_rows_are_admitted_stepped_and_released_by_themselves(session: Session) -> None:
    rows = Texts(session)
    rows.admit([1], A)
    rows.step([7], [1])
    rows.admit([2, 0], B, C)  # one is longer than what is there, one shorter
    rows.step([11, 12, 13])
    rows.step([21, 23], [2, 0])  # the order of the slots is the caller's
    rows.step([31], [1])
    session.release(2)
    rows.step([41, 42], [0, 1])
    rows.admit([2], A)
    rows.step([51, 52, 53])
    session.reorder(np.array([2, 2, 0]))
    rows.texts = {0: list(rows.texts[2]), 1: list(rows.texts[2]), 2: list(rows.texts[0])}
    rows.step([61, 62, 63])
    rows.admit([0, 1, 2], C, A, B)
    rows.step([71, 72, 73])


def test_a_session_that_is_opened_again_remembers_nothing(session: Session) -> None:
    rows = Texts(session)
    rows.admit([0, 1, 2], B, B, B)
    rows.step([1, 2, 3])
    runtime = session._runtime  # type: ignore[attr-defined]
    session.close()
    again = Texts(runtime.open(3, 24))
    again.admit([0], C)
    again.admit([2], A)
    again.step([4, 5], [2, 0])


def test_slots_that_are_not_there_are_named(session: Session) -> None:
    for slots in ([3], [0, 0], [-1]):
        with pytest.raises(ValueError, match="0 to 2"):
            session.admit(slots, [A] * len(slots))


def test_rows_of_a_model_without_a_mask_stay_together() -> None:
    session = open_runtime("onnxrt", exported("llama", "concat", "--use-one-input"), CPU).open(2, 24)
    with pytest.raises(JobError, match="no attention_mask"):
        session.admit([0], [A])
    session.admit([0, 1], [A, A])
    with pytest.raises(JobError, match="no attention_mask"):
        session.step(np.array([1]), [1])
