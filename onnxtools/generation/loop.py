"""The decode loop: one prefill, then a step per token, until every row has ended."""

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
        token_ids: the new tokens, with the end-of-text token.
        logprobs: log-probability of each token under the model, before penalties and filters; empty unless requested.
        finish: why the text ended.
        score: score of a beam: sum of log-probabilities over length to the power of the penalty; None without beams.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish = "length"
    score: float | None = None


def check_prompts(prompts: Prompts, vocab_size: int) -> None:
    """Refuse prompts that the model cannot run.

    Raises:
        UsageError: no prompt, or an empty one.
        JobError: a token outside the vocabulary.
    """
    if not prompts:
        raise UsageError("there is no prompt; give --prompt or --prompts-file")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UsageError(f"prompt {row} is empty; give at least one token of text")
        foreign = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if foreign is not None:
            raise JobError(
                f"prompt {row} has token {foreign} and the model's vocabulary ends at {vocab_size - 1}; use the "
                "tokenizer of this model"
            )


def first_logits(session: Session, prompts: Prompts, *, pads: bool) -> tuple[Logits, list[list[int]]]:
    """Run the part of the prompts that can be run at once.

    A model without an attention mask (not `pads`) cannot tell padding from text. Rows of different lengths then start
    with the length of the shortest prompt, and the rest of the longer prompts is fed one token per step.

    Returns:
        The logits after that part, [rows, vocabulary], and the tokens of each prompt that are still to be fed.
    """
    every, shortest = range(len(prompts)), min(map(len, prompts))
    if pads or shortest == max(map(len, prompts)):
        return session.admit(every, prompts), [[] for _ in prompts]
    return session.admit(every, [prompt[:shortest] for prompt in prompts]), [
        list(prompt[shortest:]) for prompt in prompts
    ]


def check_numbers(best: np.ndarray, step: int) -> None:
    """Refuse logits that are no numbers; `best` is the largest logit of each row, [rows].

    Raises:
        JobError: names the step and the first row whose best logit is NaN or infinite.
    """
    if not np.isfinite(best).all():
        row = int((~np.isfinite(best)).argmax())
        raise JobError(
            f"the logits of row {row} are NaN or infinite at step {step}; compare the model with its source: onnxtools "
            "validate"
        )


class Loop:
    """Greedy search or sampling of one batch; the arguments are those of `generate`."""

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
        # The argmax of the device is enough if nothing changes the logits.
        self.plain = not (options.samples or logprobs or options.repetition_penalty != 1 or options.min_new_tokens)
        self.found = [Generated() for _ in prompts]
        self.open = np.ones(len(prompts), bool)

    def run(self) -> list[Generated]:
        """Run until every row has ended; returns the continuation of each row.

        Raises:
            JobError: logits that are NaN or infinite.
        """
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
        """The rest of a greedy search, several steps at once if the runtime supports it.

        Tokens of a row after its end are dropped.
        """
        step = 1
        chunk = _AHEAD if self.ends else self.options.max_new_tokens
        while self.open.any():
            tokens, best = greedy_steps(self.session, ids, min(chunk, self.options.max_new_tokens - step))
            for column in range(tokens.shape[1]):
                check_numbers(np.where(self.open, best[:, column], 0), step)
                for row in np.flatnonzero(self.open):
                    self._append(int(row), int(tokens[row, column]), None)
                step += 1
            ids = tokens[:, -1]
        return self.found

    def _choose(self, logits: Logits, step: int) -> tuple[Ids, np.ndarray | None]:
        """The next token of each row, int64 [rows], and its log-probability, or None if it is not requested."""
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
        generated = self.found[row]
        generated.token_ids.append(token)
        if logprobs is not None:
            generated.logprobs.append(float(logprobs[row]))
        stopped = self.on_token is not None and self.on_token(row, token)
        if token in self.ends:
            generated.finish = "eos"
        elif stopped:
            generated.finish = "stop"
        elif len(generated.token_ids) < self.options.max_new_tokens:
            return
        self.open[row] = False


def continuations(found: Sequence[Sequence[Generated]]) -> list[Generated]:
    """The best continuation of each prompt."""
    return [best[0] for best in found]
