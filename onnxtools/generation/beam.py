"""Beam search in numpy, equal token for token to transformers' `_beam_search` (generation/utils.py, 5.x).

The `num_beams` best unfinished texts of each prompt are continued. Candidates that end join the finished texts, sorted
by score: the sum of log-probabilities over (new tokens to the power of `length_penalty`).
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np

from onnxtools.base.errors import UsageError
from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.loop import Generated, check_numbers, first_logits
from onnxtools.generation.runtime import Floats, Ids, Prompts, Runtime, Session
from onnxtools.generation.sampling import forbidden, log_softmax, penalized

_NEVER = np.float32(-1e9)


@dataclass
class _Finished:
    score: np.float32 = _NEVER
    tokens: tuple[int, ...] = ()
    real: bool = False
    ended: bool = False  # by an end-of-text token


class _Beams:
    """The beams of one prompt."""

    def __init__(self, options: GenerationOptions, ends: tuple[int, ...]) -> None:
        self.options, self.ends = options, ends
        count = options.num_beams
        self.running: list[tuple[int, ...]] = [()] * count
        self.scores: np.ndarray = np.full(count, _NEVER, np.float32)
        self.scores[0] = 0  # so that the first step does not take the same token for every beam
        self.finished = [_Finished() for _ in range(count)]
        self.improvable = True
        self.all_stop = False

    def advance(self, logprobs: Floats) -> tuple[list[int], list[int]]:
        """Advance by one token.

        Args:
            logprobs: log-probabilities of the next token, [beams, vocabulary].

        Returns:
            The tokens to run, and the beam that each continues, both of length [beams].
        """
        count, vocabulary = logprobs.shape
        total = (logprobs + self.scores[:, None]).ravel()
        keep = min(max(2, 1 + len(self.ends)) * count, total.size)
        best = np.argpartition(-total, keep - 1)[:keep]
        best = best[np.lexsort((best, -total[best]))]
        beams, tokens, scores = best // vocabulary, best % vocabulary, total[best]
        texts = [(*self.running[beam], int(token)) for beam, token in zip(beams, tokens, strict=True)]
        length = len(texts[0])
        ended = np.isin(tokens, self.ends)
        stops = ended | (length >= self.options.max_new_tokens)
        self._finish(texts, scores, stops, ended, length)
        following = np.argsort(-(scores + stops * _NEVER), kind="stable")[:count]
        self.running = [texts[i] for i in following]
        self.scores = (scores + stops * _NEVER)[following]
        self.all_stop = bool(stops.all())
        self._update_improvable(length)
        return [int(tokens[i]) for i in following], [int(beams[i]) for i in following]

    def _finish(
        self, texts: list[tuple[int, ...]], scores: Floats, stops: np.ndarray, ended: np.ndarray, length: int
    ) -> None:
        """Put candidates that end among the finished texts, where they are better."""
        full = all(f.real for f in self.finished) and self.options.early_stopping == "yes"
        if full or not self.improvable:
            return
        candidates = [
            _Finished(
                np.float32(scores[i] / np.float32(length**self.options.length_penalty)), texts[i], True, bool(ended[i])
            )
            for i in range(self.options.num_beams)
            if stops[i]
        ]
        self.finished = sorted([*self.finished, *candidates], key=lambda f: -f.score)[: self.options.num_beams]

    def _update_improvable(self, length: int) -> None:
        penalty = self.options.length_penalty
        hypothetical = self.options.max_new_tokens if self.options.early_stopping == "never" and penalty > 0 else length
        best = self.scores[0] / np.float32(hypothetical**penalty)
        worst = min(f.score for f in self.finished)
        self.improvable &= any(best > (worst if f.real else _NEVER) for f in self.finished)

    def results(self) -> list[Generated]:
        """The `num_return_sequences` best finished texts, best first."""
        best = self.finished[: self.options.num_return_sequences]
        return [Generated(list(f.tokens), [], "eos" if f.ended else "length", float(f.score)) for f in best]


def beam_search(runtime: Runtime, prompts: Prompts, options: GenerationOptions) -> list[list[Generated]]:
    """The best continuations of each prompt, best first.

    Raises:
        UsageError: stop texts, which beam search does not support, or prompts of different lengths for a model that
            cannot pad.
        JobError: logits that are NaN or infinite.
    """
    if options.stop:
        raise UsageError("beam search takes no stop texts; leave out --stop or --num-beams")
    count = options.num_beams
    ends = () if options.ignore_eos else runtime.info.eos_token_ids
    rows = [prompt for prompt in prompts for _ in range(count)]
    with closing(runtime.open(len(rows), max(map(len, rows)) + options.max_new_tokens)) as session:
        searches = [_Beams(options, ends) for _ in prompts]
        _search(session, runtime.pads, rows, searches, options, ends)
    return [search.results() for search in searches]


def _search(
    session: Session,
    pads: bool,
    rows: Prompts,
    searches: list[_Beams],
    options: GenerationOptions,
    ends: tuple[int, ...],
) -> None:
    """Run the beams until none can improve; `rows` holds the prompt of each beam."""
    logits, waiting = first_logits(session, rows, pads=pads)
    while any(waiting):
        if not all(waiting):
            raise UsageError(
                "beam search over prompts of different lengths needs a model with an attention_mask input; run them "
                "one by one"
            )
        logits = session.step(np.array([pending.pop(0) for pending in waiting]))
    for step in range(options.max_new_tokens):
        scores = logits.numpy()
        check_numbers(scores.max(axis=-1), step)
        logprobs = _processed(log_softmax(scores), rows, searches, options, ends, step)
        ids, order = _advanced(searches, logprobs, options.num_beams)
        if (
            step + 1 == options.max_new_tokens
            or not any(s.improvable for s in searches)
            or all(s.all_stop for s in searches)
        ):
            break
        if options.early_stopping == "yes" and all(f.real for s in searches for f in s.finished):
            break
        session.reorder(order)
        logits = session.step(ids)


def _processed(
    logprobs: Floats,
    rows: Prompts,
    searches: list[_Beams],
    options: GenerationOptions,
    ends: tuple[int, ...],
    step: int,
) -> Floats:
    texts = [
        [*prompt, *searches[i // options.num_beams].running[i % options.num_beams]] for i, prompt in enumerate(rows)
    ]
    logprobs = penalized(logprobs, texts, options.repetition_penalty)
    return forbidden(logprobs, ends) if ends and step < options.min_new_tokens else logprobs


def _advanced(searches: list[_Beams], logprobs: Floats, count: int) -> tuple[Ids, Ids]:
    """The next token and the source row of every row, both int64 [rows]."""
    ids, order = [], []
    for i, search in enumerate(searches):
        tokens, beams = search.advance(logprobs[i * count : (i + 1) * count])
        ids += tokens
        order += [i * count + beam for beam in beams]
    return np.array(ids, np.int64), np.array(order, np.int64)
