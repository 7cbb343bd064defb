"""From logits to the next tokens: penalties, filters, and the draw.

The order is transformers': penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.runtime import Floats, Ids


def log_softmax(logits: Floats) -> Floats:
    """Logarithm of the softmax over the last axis, in the type of `logits`."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))  # type: ignore[no-any-return]


def penalized(logits: Floats, texts: Sequence[Sequence[int]], penalty: float) -> Floats:
    """`logits` [rows, vocabulary] with the tokens of each row's text made less likely.

    Positive logits are divided by `penalty`, negative ones multiplied (arXiv 1909.05858, section 4.1).
    """
    if penalty == 1:
        return logits
    logits = logits.copy()
    for row, text in enumerate(texts):
        tokens = np.unique(np.asarray(text, np.int64))
        scores = logits[row, tokens]
        logits[row, tokens] = np.where(scores < 0, scores * penalty, scores / penalty)
    return logits


def forbidden(logits: Floats, tokens: Sequence[int]) -> Floats:
    """`logits` [rows, vocabulary] with `tokens` at minus infinity."""
    logits = logits.copy()
    logits[:, list(tokens)] = -np.inf
    return logits


def filtered(logits: Floats, options: GenerationOptions) -> Floats:
    """`logits` [rows, vocabulary] over the temperature, with tokens outside top-k or top-p at minus infinity."""
    if options.temperature is not None:
        logits = logits / np.float32(options.temperature)
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        least = np.partition(logits, -options.top_k, axis=-1)[:, -options.top_k, None]
        logits = np.where(logits < least, np.float32(-np.inf), logits)
    if options.top_p is not None and options.top_p < 1:
        order = logits.argsort(axis=-1)  # ascending
        ranked = np.take_along_axis(logits, order, -1)
        below = np.exp(log_softmax(ranked)).cumsum(axis=-1) <= 1 - options.top_p
        below[:, -1] = False
        out = np.zeros_like(below)
        np.put_along_axis(out, order, below, -1)
        logits = np.where(out, np.float32(-np.inf), logits)
    return logits


def draw(logits: Floats, generator: np.random.Generator) -> Ids:
    """Draw one token of each row by its probability under `logits` [rows, vocabulary]; int64 [rows]."""
    probabilities = np.exp(log_softmax(logits.astype(np.float64)))
    edges = probabilities.cumsum(axis=-1)
    points = generator.random((len(logits), 1)) * edges[:, -1:]
    return (edges <= points).sum(axis=-1)  # type: ignore[no-any-return]
