"""Log-probabilities of texts under a model, in batches of like length; what `accuracy` and the lm-eval adapter stand
on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxtools.base.errors import JobError
from onnxtools.generation.loop import check_prompts
from onnxtools.generation.runtime import Floats, Ids, Runtime


@dataclass(frozen=True)
class Scored:
    """A text's tokens under the model; every array is along the predicted positions, which are all tokens but the
    first.

    Attributes:
        logprobs: log-probability of each token after those before it.
        top: the five likeliest tokens at each of the last `target` positions, [target, 5], best first.
        ranks: place of the real token at those positions; 0 is the likeliest.
    """

    logprobs: Floats
    top: Ids
    ranks: Ids


def score_texts(
    runtime: Runtime,
    texts: Sequence[Sequence[int]],
    targets: Sequence[int],
    *,
    batch_size: int,
    done: Callable[[int, Scored], None] | None = None,
) -> list[Scored]:
    """Score `texts` (tokens), the longest first, `batch_size` together; equal inputs are run once.

    Args:
        targets: of each text, how many of its last tokens are looked at closely.
        done: called with a text's index as soon as it is scored.
    Raises:
        JobError: a text of less than two tokens, or logits that are not numbers.
    """
    short = next((i for i, text in enumerate(texts) if len(text) < 2), None)
    if short is not None:
        raise JobError(f"text {short} has {len(texts[short])} tokens; two are needed to predict one from the other")
    if texts:
        check_prompts(texts, runtime.vocab_size)
    found: dict[int, Scored] = {}
    for batch in _batches(texts, batch_size):
        inputs = [list(key) for key in batch]
        for members, logits in zip(batch.values(), runtime.score(inputs), strict=True):
            for index in members:
                found[index] = _scored(logits, texts[index], targets[index], index)
                if done is not None:
                    done(index, found[index])
    return [found[index] for index in range(len(texts))]


def _batches(texts: Sequence[Sequence[int]], size: int) -> Iterator[dict[tuple[int, ...], list[int]]]:
    """Model inputs (all tokens but the last) to the texts that need them, in batches of like length.

    A batch holds at most `size` inputs and at most as many tokens as `size` texts of 512 have.
    """
    inputs: dict[tuple[int, ...], list[int]] = {}
    for index, text in enumerate(texts):
        inputs.setdefault(tuple(text[:-1]), []).append(index)
    batch: dict[tuple[int, ...], list[int]] = {}
    for key in sorted(inputs, key=lambda k: (-len(k), k)):
        longest = len(next(iter(batch), key))
        if batch and (len(batch) == size or (len(batch) + 1) * longest > size * 512):
            yield batch
            batch = {}
        batch[key] = inputs[key]
    if batch:
        yield batch


def _scored(logits: Floats, text: Sequence[int], target: int, index: int) -> Scored:
    tokens = np.asarray(text[1:])
    largest = logits.max(axis=-1)
    if not np.isfinite(largest).all():
        raise JobError(
            f"text {index}: its logits are NaN or infinite; compare the model with its source: onnxtools validate"
        )
    every = np.arange(len(tokens))
    chosen = logits[every, tokens]
    # One pass over the vocabulary: log-sum-exp of each position.
    logprobs = chosen - largest - np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    close = logits[-target:] if target else logits[:0]
    five = min(5, logits.shape[-1])
    top = np.argpartition(-close, five - 1, axis=-1)[:, :five] if target else np.zeros((0, five), np.int64)
    order = np.take_along_axis(-close, top, -1).argsort(axis=-1, kind="stable") if target else top
    ranks = (close > chosen[-target:, None]).sum(axis=-1) if target else np.zeros(0, np.int64)
    return Scored(logprobs, np.take_along_axis(top, order, -1) if target else top, ranks)


def perplexity(logprob: float) -> float:
    """exp(-logprob); infinity where that is beyond a float."""
    return float("inf") if -logprob > 709 else math.exp(-logprob)


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean, and half of its 95% interval (normal approximation: 1.96 standard errors)."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return float(array.mean()) if len(array) else float("nan"), float("nan")
    return float(array.mean()), float(1.96 * array.std(ddof=1) / np.sqrt(len(array)))


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """95% interval of a share (Wilson, JASA 22, 1927)."""
    if not count:
        return float("nan"), float("nan")
    z, p = 1.959964, hits / count
    middle, half = p + z * z / (2 * count), z * np.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return float((middle - half) / scale), float((middle + half) / scale)
