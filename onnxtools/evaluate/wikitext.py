"""Perplexity of a long text, in windows; transformers' guide "Perplexity of fixed-length models" is the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from onnxtools.base.errors import UsageError
from onnxtools.evaluate.scores import mean_interval, perplexity, score_texts
from onnxtools.generation.runtime import Runtime


@dataclass(frozen=True)
class Window:
    """Tokens, of which the last `new` are counted."""

    tokens: list[int]
    new: int


@dataclass(frozen=True)
class Windows:
    """Windows of `length` tokens that begin every `stride` tokens.

    Raises:
        UsageError: a stride of more than a window, or a window of one token.
    """

    length: int
    stride: int

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.length or self.length < 2:
            raise UsageError(
                f"stride is {self.stride} and max-length {self.length}; the stride takes 1 to max-length, which takes "
                "2 or more"
            )

    def end(self, count: int) -> int:
        """Tokens that `count` windows cover."""
        return (count - 1) * self.stride + self.length

    def of(self, tokens: list[int]) -> Iterator[Window]:
        """The windows of `tokens`; each token is counted once, with as much before it as its window holds."""
        counted = 0
        for begin in range(0, len(tokens), self.stride):
            end = min(begin + self.length, len(tokens))
            new = end - max(counted, 1 if begin == 0 else counted)
            if new > 0 and end - begin > 1:
                yield Window(tokens[begin:end], min(new, end - begin - 1))
            counted = end
            if end == len(tokens):
                return


@dataclass(frozen=True)
class WindowScores:
    """The scores of a text.

    Attributes:
        figures: perplexities and settings by name.
        sums: sum of log-probabilities of each window.
        counts: number of tokens that each window counts.
    """

    figures: dict[str, Any]
    sums: list[float]
    counts: list[int]


def score_wikitext(
    runtime: Runtime,
    tokens: list[int],
    words: int,
    windows: Windows,
    batch_size: int,
    done: Callable[[], None],
) -> WindowScores:
    """Perplexity per token (`ppl_token`) and per word (`ppl_word`).

    Both come from the same sum of log-probabilities, over the tokens or over `words`, the number of words of the text
    split at white space.
    """
    cut = list(windows.of(tokens))
    scored = score_texts(
        runtime, [w.tokens for w in cut], [0] * len(cut), batch_size=batch_size, done=lambda *_: done()
    )
    sums = [float(s.logprobs[-w.new :].sum()) for w, s in zip(cut, scored, strict=True)]
    counts = [w.new for w in cut]
    figures = {
        "n": sum(counts),
        "windows": len(cut),
        "max_length": windows.length,
        "stride": windows.stride,
        "ppl_token": perplexity(sum(sums) / sum(counts)),
        "ppl_word": perplexity(sum(sums) / words),
    }
    return WindowScores(figures, sums, counts)


def compare_wikitext(a: WindowScores, b: WindowScores) -> dict[str, Any]:
    """The perplexity of `b` over that of `a`, with its 95% interval over the windows.

    The interval is NaN where the two do not have the same windows.
    """
    factor = b.figures["ppl_token"] / a.figures["ppl_token"]
    low = high = float("nan")
    if a.counts == b.counts:
        _, half = mean_interval([(x - y) / n for x, y, n in zip(a.sums, b.sums, a.counts, strict=True)])
        low, high = factor * math.exp(-half), factor * math.exp(half)
    return {"ppl_token_factor": factor, "ppl_token_factor_ci95": (low, high)}
