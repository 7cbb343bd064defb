"""What is remembered of an activation while texts pass: small, whatever their number."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class Observer(Protocol):
    """Sees an activation once for every text."""

    def add(self, x: Array) -> None:
        """float32 [tokens, channels]; [batch, heads, sequence, head_dim] of keys, values and what attention
        computes.
        """


class ChannelRange:
    """Largest magnitude [channels], mean magnitude and mean square of every channel."""

    def __init__(self) -> None:
        self.count = 0
        self.amax: Array = np.zeros(())
        self._sum: Array = np.zeros(())
        self._squares: Array = np.zeros(())

    def add(self, x: Array) -> None:
        x = x.reshape(-1, x.shape[-1])
        size = np.abs(x)
        self.amax = np.maximum(self.amax, size.max(axis=0, initial=0))
        self._sum = self._sum + size.sum(axis=0, dtype=np.float64)
        self._squares = self._squares + np.einsum("tc,tc->c", x, x, dtype=np.float64)
        self.count += len(x)

    @property
    def mean(self) -> Array:
        return self._sum / max(self.count, 1)

    @property
    def mean_square(self) -> Array:
        return self._squares / max(self.count, 1)


class Largest:
    """The largest magnitude of all."""

    def __init__(self) -> None:
        self.amax = 0.0

    def add(self, x: Array) -> None:
        self.amax = max(self.amax, float(np.abs(x).max(initial=0)))


class Histogram:
    """Counts |x| in 65,536 logarithmic bins, 256 per power of two: the exponent and top 8 fraction bits of float32.

    The range need not be known in advance: positive float32 numbers are ordered like their bits (IEEE 754-2019, 5.10).
    """

    BINS = 1 << 16

    def __init__(self) -> None:
        self.counts = np.zeros(self.BINS, np.int64)

    def add(self, x: Array) -> None:
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32).reshape(-1)
        self.counts += np.bincount((bits & 0x7FFFFFFF) >> 15, minlength=self.BINS)

    @classmethod
    def centres(cls) -> Array:
        """The middle of every bin, float64 [BINS]; beyond the finite ones, infinity."""
        bits = (np.arange(cls.BINS, dtype=np.uint32) << 15) | (1 << 14)
        with np.errstate(invalid="ignore"):
            values = bits.view(np.float32).astype(np.float64)
        values[0] = 0.0
        return np.where(np.isfinite(values), values, np.inf)


class TokenSample:
    """Every n-th token, at most `limit` rows: the rows that layer errors are measured on."""

    def __init__(self, limit: int, total: int) -> None:
        self._step, self._limit = max(1, total // limit), limit
        self._seen, self._rows = 0, list[Array]()
        self._kept = 0

    def add(self, x: Array) -> None:
        first = -self._seen % self._step
        self._seen += len(x)
        rows = x[first :: self._step][: self._limit - self._kept]
        if len(rows):
            self._rows.append(np.array(rows, np.float32))
            self._kept += len(rows)

    @property
    def rows(self) -> Array:
        """float32 [kept, channels]."""
        return np.concatenate(self._rows)


def equal_tokens(x: Array) -> Array:
    """Rows of length 1, so that an error counts relative to its token.

    The first token of a text is often a hundred times as long as the others (attention sinks, arXiv 2309.17453; massive
    activations, arXiv 2402.17762). A least-squares fit would serve it alone: INT4 with GPTQ of SmolLM2 had perplexity
    31.9 so, and 26.5 with equal tokens.
    """
    norms = np.sqrt(np.einsum("tk,tk->t", x, x, dtype=np.float64))[:, None].astype(
        np.float32
    )  # a square may exceed float32
    return np.asarray(x / np.maximum(norms, max(1e-3 * float(norms.max(initial=0)), 1e-30)))


class Gram:
    """X^T X / tokens of tokens of length 1 (`equal_tokens`), float32 [channels, channels], summed text by text."""

    def __init__(self) -> None:
        self._sum: Array | None = None
        self.count = 0

    def add(self, x: Array) -> None:
        x = equal_tokens(x)
        product = x.T @ x
        self._sum = product if self._sum is None else np.add(self._sum, product, out=self._sum)
        self.count += len(x)

    @property
    def value(self) -> Array:
        assert self._sum is not None, "no text was seen"
        return self._sum / np.float32(self.count)


class BlockGram:
    """X^T X / tokens of each block of channels alone: memory grows with the channels, not with their square.

    Args:
        size: of a block.
        equal: of tokens of length 1 (`equal_tokens`), as `Gram` has them.
    """

    def __init__(self, size: int, equal: bool = False) -> None:
        self._size, self._equal = size, equal
        self._sum: Array = np.zeros(())
        self._count = 0

    def add(self, x: Array) -> None:
        cut = (equal_tokens(x) if self._equal else x).reshape(len(x), -1, self._size).transpose(1, 2, 0)
        self._sum = self._sum + (cut @ cut.transpose(0, 2, 1)).astype(np.float64)
        self._count += len(x)

    @property
    def value(self) -> Array:
        """float64 [channels / size, size, size]: a square may exceed float32."""
        return np.asarray(self._sum / max(self._count, 1))


class RotationRange:
    """Largest magnitude that rotary embedding could give each channel of keys [batch, heads, sequence, head_dim]: the
    length of its pair.

    A rotation turns the pair (x_i, x_j) by an angle that grows with the position, so at some position the whole length
    sqrt(x_i^2 + x_j^2) lies on either channel; calibration texts show only the positions they have.

    Args:
        dim: rotated channels (the first ones); pairs are (i, i + dim/2). 0: nothing is rotated.
        neighbours: pairs are (2i, 2i + 1).
    """

    def __init__(self, dim: int, neighbours: bool = False) -> None:
        half = dim // 2
        self._pairs = (slice(0, dim, 2), slice(1, dim, 2)) if neighbours else (slice(0, half), slice(half, dim))
        self.amax: Array = np.zeros(())

    def add(self, x: Array) -> None:
        size = np.abs(x)
        first, second = self._pairs
        size[..., first] = size[..., second] = np.hypot(x[..., first], x[..., second])
        channels = size.reshape(-1, size.shape[-1]).max(axis=0, initial=0)
        self.amax = np.maximum(self.amax, channels)
