"""The decode loop: one prefill, then a step a token, until every row has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from onnxtools.base.errors import JobError, UsageError
from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.runtime import Ids, Logits, Prompts, Runtime, Session, greedy_steps
from onnxtools.generation.sampling import draw, filtered, forbidden, log_softmax, penalized

Finish = Literal["length", "eos", "stop"]
OnToken = Callable[[int, int], bool]
"""Called with the row and its new token; True ends the row (a stop text was found)."""


_AHEAD = 8
"""Steps run before the host checks for an end token. Up to 7 steps after the end are wasted."""


@dataclass
class Generated:
    """One continuation.

    Attributes:
        token_ids: the new tokens; an end-of-text token is among them.
        logprobs: log-probability of each under the model, before penalties and filters; empty unless asked for.
        finish: why it ended.
        score: of a beam: sum of log-probabilities over length to the power of the penalty.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish = "length"
    score: float | None = None


def check_prompts(prompts: Prompts, vocab_size: int) -> None:
    """Raises: UsageError for no prompt or an empty one, JobError for a token that the model does not have."""
    if not prompts:
        raise UsageError("there is no prompt; give --prompt or --prompts-file")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UsageError(f"prompt {row} is empty; give at least one token of text")
        if max(prompt) >= vocab_size or min(prompt) < 0:
            raise JobError(
                f"prompt {row} has token {max(prompt)} and the model's vocabulary ends at {vocab_size - 1}; use the "
                "tokenizer of this model"
            )


def first_logits(session: Session, prompts: Prompts, *, pads: bool) -> tuple[Logits, list[list[int]]]:
    """Logits after the part of the prompts that can be run at once, and what of each prompt is still to be fed.

    A model without an attention mask (not `pads`) cannot tell padding from text, so rows of different lengths start
    with their common length and the rest of the longer ones is fed a token a step.
    """
    every, shortest = range(len(prompts)), min(map(len, prompts))
    if pads or shortest == max(map(len, prompts)):
        return session.admit(every, prompts), [[] for _ in prompts]
    return session.admit(every, [prompt[:shortest] for prompt in prompts]), [
        list(prompt[shortest:]) for prompt in prompts
    ]


def check_numbers(best: np.ndarray, step: int) -> None:
    """Raises: JobError naming the step and row whose best logit, of [rows], is NaN or infinite."""
    if not np.isfinite(best).all():
        row = int((~np.isfinite(best)).argmax())
        raise JobError(
            f"the logits of row {row} are NaN or infinite at step {step}; compare the model with its source: onnxtools "
            "validate"
        )


class Loop:
    """Greedy search or sampling of one batch."""

    def __init__(
        self,
        session: Session,
        runtime: Runtime,
        prompts: Prompts,
        options: GenerationOptions,
        on_token: OnToken | None,
        logprobs: bool,
    ) -> None:
        self.session, self.options, self.on_token = session, options, on_token
        self.pads = runtime.pads
        self.prompts = prompts
        self.ends = () if options.ignore_eos else runtime.info.eos_token_ids
        self.generator = np.random.default_rng(options.seed)
        self.logprobs = logprobs
        # The device's own argmax is enough when nothing changes the logits.
        self.plain = not (options.samples or logprobs or options.repetition_penalty != 1 or options.min_new_tokens)
        self.found = [Generated() for _ in prompts]
        self.open = np.ones(len(prompts), bool)

    def run(self) -> list[Generated]:
        logits, waiting = first_logits(self.session, self.prompts, pads=self.pads)
        longest = max(map(len, waiting))
        for step in range(self.options.max_new_tokens + longest):
            ids, logprobs = self._choose(logits, step)
            for row in np.flatnonzero(self.open):
                if waiting[row]:
                    ids[row] = waiting[row].pop(0)
                else:
                    self._append(int(row), int(ids[row]), logprobs)
            if not self.open.any():
                break
            if self.plain and self.on_token is None and not longest:
                return self._greedy(ids)
            logits = self.session.step(ids)
        return self.found

    def _greedy(self, ids: Ids) -> list[Generated]:
        """The rest of a greedy search, several steps at once where the runtime can; a row's tokens after its end are
        dropped.
        """
        done = 1
        most = _AHEAD if self.ends else self.options.max_new_tokens
        while self.open.any():
            tokens, best = greedy_steps(self.session, ids, min(most, self.options.max_new_tokens - done))
            for column in range(tokens.shape[1]):
                check_numbers(np.where(self.open, best[:, column], 0), done)
                for row in np.flatnonzero(self.open):
                    self._append(int(row), int(tokens[row, column]), None)
                done += 1
            ids = tokens[:, -1]
        return self.found

    def _choose(self, logits: Logits, step: int) -> tuple[Ids, np.ndarray | None]:
        """Next token of each row, and its log-probability where wanted."""
        if self.plain:
            ids, best = logits.argmax()
            check_numbers(best, step)
            return ids, None
        scores = logits.numpy()
        check_numbers(scores.max(axis=-1), step)
        changed = penalized(
            scores,
            [[*p, *f.token_ids] for p, f in zip(self.prompts, self.found, strict=True)],
            self.options.repetition_penalty,
        )
        if self.ends and any(len(f.token_ids) < self.options.min_new_tokens for f in self.found):
            changed = forbidden(changed, self.ends)
        ids = draw(filtered(changed, self.options), self.generator) if self.options.samples else changed.argmax(axis=-1)
        return ids, log_softmax(scores)[np.arange(len(ids)), ids] if self.logprobs else None

    def _append(self, row: int, token: int, logprobs: np.ndarray | None) -> None:
        found = self.found[row]
        found.token_ids.append(token)
        if logprobs is not None:
            found.logprobs.append(float(logprobs[row]))
        stopped = self.on_token is not None and self.on_token(row, token)
        if token in self.ends:
            found.finish = "eos"
        elif stopped:
            found.finish = "stop"
        elif len(found.token_ids) < self.options.max_new_tokens:
            return
        self.open[row] = False


def continuations(found: Sequence[Sequence[Generated]]) -> list[Generated]:
    """The best continuation of each prompt."""
    return [best[0] for best in found]
