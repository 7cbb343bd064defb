"""Log-probabilities of texts under a model, in batches of similar length.

`accuracy` and the lm-eval adapter are built on it.
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
    """The scores of a text; the predicted positions are all tokens but the first.

    Attributes:
        logprobs: log-probability of each predicted token after the tokens before it, fp32 [tokens - 1].
        top: the five likeliest tokens at each of the last `target` positions, int64 [target, 5], best first.
        ranks: rank of the real token at those positions, int64 [target]; 0 is the likeliest.
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
    """Score `texts` (token ids), the longest first, `batch_size` together; equal inputs are run once.

    Args:
        targets: number of last tokens of each text for which `top` and `ranks` are computed.
        done: called with a text's index and scores as soon as it is scored.

    Returns:
        The scores in the order of `texts`.

    Raises:
        JobError: a text of less than two tokens, a token outside the vocabulary, or logits that are NaN or infinite.
    """
    short = next((i for i, text in enumerate(texts) if len(text) < 2), None)
    if short is not None:
        raise JobError(f"text {short} has {len(texts[short])} tokens; two are needed to predict one from the other")
    if texts:
        check_prompts(texts, runtime.vocab_size)
    by_index: dict[int, Scored] = {}
    for batch in _batches(texts, batch_size):
        inputs = [list(key) for key in batch]
        for members, logits in zip(batch.values(), runtime.score(inputs), strict=True):
            for index in members:
                by_index[index] = _scored(logits, texts[index], targets[index], index)
                if done is not None:
                    done(index, by_index[index])
    return [by_index[index] for index in range(len(texts))]


def _batches(texts: Sequence[Sequence[int]], size: int) -> Iterator[dict[tuple[int, ...], list[int]]]:
    """Batches of similar length: model inputs (all tokens but the last) to the indices of the texts with that input.

    A batch holds at most `size` inputs, and at most `size` x 512 tokens unless it holds a single input.
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
    target_logits = logits[every, tokens]
    # One pass over the vocabulary: log-sum-exp of each position.
    logprobs = target_logits - largest - np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    close = logits[-target:] if target else logits[:0]
    five = min(5, logits.shape[-1])
    top = np.argpartition(-close, five - 1, axis=-1)[:, :five] if target else np.zeros((0, five), np.int64)
    order = np.take_along_axis(-close, top, -1).argsort(axis=-1, kind="stable") if target else top
    ranks = (close > target_logits[-target:, None]).sum(axis=-1) if target else np.zeros(0, np.int64)
    return Scored(logprobs, np.take_along_axis(top, order, -1) if target else top, ranks)


def perplexity(logprob: float) -> float:
    """exp(-logprob) of a mean log-probability; infinity where a float cannot hold it."""
    return float("inf") if -logprob > 709 else math.exp(-logprob)


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean, and half of its 95% interval (normal approximation: 1.96 standard errors).

    Both are NaN without values; the half interval is NaN for a single value.
    """
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return float(array.mean()) if len(array) else float("nan"), float("nan")
    return float(array.mean()), float(1.96 * array.std(ddof=1) / np.sqrt(len(array)))


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """95% interval (low, high) of the share hits / count (Wilson, JASA 22, 1927); NaN where `count` is 0."""
    if not count:
        return float("nan"), float("nan")
    z, p = 1.959964, hits / count
    middle, half = p + z * z / (2 * count), z * np.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return float((middle - half) / scale), float((middle + half) / scale)
