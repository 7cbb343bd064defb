"""`benchmark`: times a batch token by token, alternating between runtimes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxtools.base.errors import UsageError
from onnxtools.base.options import option
from onnxtools.checkpoints.tokenizer import Tokenizer
from onnxtools.generation.loop import check_numbers
from onnxtools.generation.runtime import Ids, Runtime, greedy_steps


@dataclass(frozen=True)
class BenchmarkOptions:
    """Sizes and repetitions, the flags of `benchmark`. The names are those of the NeMo demo.

    Raises:
        UsageError: a value out of range.
    """

    batch_size: int = option(1, "Rows of the batch.")
    input_seq_len: int = option(128, "Tokens of each prompt (random).")
    output_seq_len: int = option(20, "Tokens generated for each row; the end-of-text token does not end it.")
    warmup: int = option(3, "Runs before the timed ones.")
    iterations: int = option(10, "Timed runs of each runtime.")
    duration: float = option(0.0, "Go on until this many seconds have passed.")
    seed: int = option(0, "Seed of the random prompts.")

    def __post_init__(self) -> None:
        for name in ("batch_size", "input_seq_len", "output_seq_len", "iterations"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')} is {getattr(self, name)}; it takes 1 or more")
        if self.warmup < 0 or not 0 <= self.duration < float("inf") or self.seed < 0:
            raise UsageError(
                f"warmup is {self.warmup}, duration {self.duration} and seed {self.seed}; they take 0 or more"
            )


@dataclass
class Timing:
    """Times of the iterations, in seconds.

    Attributes:
        end_to_end: encode, generate and decode of each iteration; empty without a tokenizer.
        total: generate alone, of each iteration.
        first: time to the first token (prefill) of each iteration.
        steps: time of each following token, of all iterations.
    """

    end_to_end: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def as_json(self, options: BenchmarkOptions) -> dict[str, Any]:
        """The summaries, and the medians of the first and of the following tokens, in seconds."""
        tokens = options.batch_size * options.output_seq_len
        blocks = {"end_to_end": summary(self.end_to_end, tokens), "without_tokenizer": summary(self.total, tokens)}
        return {
            **{name: block for name, block in blocks.items() if block},
            "time_to_first_token_s": statistics.median(self.first),
            "time_per_output_token_s": statistics.median(self.steps) if self.steps else None,
        }


def summary(seconds: Sequence[float], tokens: int) -> dict[str, float]:
    """The NeMo demo's figures of `seconds`; empty without any.

    A percentile is sorted[int(n * p)]; the throughput is `tokens`, generated per iteration, over the average
    (FACTS-te-nemo, 3.4).
    """
    if not seconds:
        return {}
    ordered, average = sorted(seconds), statistics.fmean(seconds)
    return {
        "iterations": len(seconds),
        "total_s": sum(seconds),
        "average_s": average,
        "median_s": statistics.median(seconds),
        "best_s": ordered[0],
        "p95_s": ordered[int(len(ordered) * 0.95)],
        "p99_s": ordered[int(len(ordered) * 0.99)],
        "throughput_tokens_per_s": tokens / average,
    }


def time_runtimes(
    runtimes: Sequence[Runtime],
    tokenizers: Sequence[Tokenizer | None],
    options: BenchmarkOptions,
    progress: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Time all runtimes alternately (A B A B) on the same random prompts.

    Other load of the machine then affects all runtimes alike.

    Args:
        tokenizers: one per runtime; None skips its end-to-end time.
        progress: called after each run, warm-up included.

    Raises:
        JobError: logits that are NaN or infinite.
    """
    generator = np.random.default_rng(options.seed)
    vocabulary = min(runtime.vocab_size for runtime in runtimes)
    prompts = generator.integers(0, vocabulary, (options.batch_size, options.input_seq_len))
    timings = [Timing() for _ in runtimes]
    texts = [t.decode(prompts[0].tolist()) if t is not None else "" for t in tokenizers]
    for _ in range(options.warmup):
        for runtime in runtimes:
            generate_timed(runtime, prompts, options.output_seq_len)
            progress()
    began, iteration = time.perf_counter(), 0
    while iteration < options.iterations or time.perf_counter() - began < options.duration:
        for runtime, tokenizer, text, timing in zip(runtimes, tokenizers, texts, timings, strict=True):
            _time_once(runtime, tokenizer, text, prompts, options, timing)
            progress()
        iteration += 1
    return timings


def _time_once(
    runtime: Runtime, tokenizer: Tokenizer | None, text: str, prompts: Ids, options: BenchmarkOptions, timing: Timing
) -> None:
    begin = time.perf_counter()
    if tokenizer is not None:
        for _ in range(options.batch_size):
            tokenizer.encode(text)
    start = time.perf_counter()
    tokens, marks = generate_timed(runtime, prompts, options.output_seq_len)
    end = time.perf_counter()
    if tokenizer is not None:
        for row in tokens:
            tokenizer.decode(row.tolist())
        timing.end_to_end.append(time.perf_counter() - begin)
    timing.total.append(end - start)
    timing.first.append(marks[0] - start)
    timing.steps += np.diff(marks).tolist()


def generate_timed(runtime: Runtime, prompts: Ids, new_tokens: int) -> tuple[Ids, list[float]]:
    """Greedy tokens, int64 [rows, new_tokens], and the `perf_counter` time in seconds at which the host had each.

    The time of several steps run at once is spread evenly over their tokens.

    Args:
        prompts: int64 [rows, tokens].

    Raises:
        JobError: logits that are NaN or infinite.
    """
    with closing(runtime.open(len(prompts), prompts.shape[1] + new_tokens)) as session:
        ids, best = session.admit(range(len(prompts)), prompts.tolist()).argmax()
        check_numbers(best, 0)
        pieces, marks = [ids[:, None]], [time.perf_counter()]
        while len(marks) < new_tokens:
            tokens, bests = greedy_steps(session, pieces[-1][:, -1], new_tokens - len(marks))
            count, last = tokens.shape[1], marks[-1]
            each = (time.perf_counter() - last) / count
            for column in range(count):
                check_numbers(bests[:, column], len(marks))
                marks.append(last + each * (column + 1))
            pieces.append(tokens)
    return np.concatenate(pieces, axis=1), marks
