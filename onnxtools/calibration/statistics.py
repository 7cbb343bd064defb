"""Statistics of activations, summed text by text. Their memory does not depend on the number of texts."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class Observer(Protocol):
    """Gets an activation once for every text."""

    def add(self, x: Array) -> None:
        """Add the activation of one text.

        Args:
            x: float32 [tokens, channels]; [batch, heads, sequence, head_dim] of keys, values and values inside
                attention.
        """


def tokens_of(x: Array) -> Array:
    """Returns the rows of an activation, [tokens, channels]: every axis but the last counts tokens."""
    return x.reshape(-1, x.shape[-1])


class RowCount:
    """The rows of all texts, in `count`; an expert that no token chose has none."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: Array) -> None:
        """Add one text, [..., channels]."""
        self.count += len(tokens_of(x))


class ChannelRange:
    """The largest magnitude, mean magnitude and mean square of every channel.

    Attributes:
        count: rows so far.
        amax: largest magnitudes, float32 [channels]; 0-dimensional before the first text.
    """

    def __init__(self) -> None:
        self.count = 0
        self.amax: Array = np.zeros(())
        self._sum: Array = np.zeros(())
        self._squares: Array = np.zeros(())

    def add(self, x: Array) -> None:
        """Add the rows of one text, [..., channels]."""
        x = tokens_of(x)
        size = np.abs(x)
        self.amax = np.maximum(self.amax, size.max(axis=0, initial=0))
        self._sum = self._sum + size.sum(axis=0, dtype=np.float64)
        self._squares = self._squares + np.einsum("tc,tc->c", x, x, dtype=np.float64)
        self.count += len(x)

    @property
    def mean(self) -> Array:
        """Mean magnitudes, float64 [channels]."""
        return self._sum / max(self.count, 1)

    @property
    def mean_square(self) -> Array:
        """Mean squares, float64 [channels]."""
        return self._squares / max(self.count, 1)


class Largest:
    """The largest magnitude of all elements, in `amax`."""

    def __init__(self) -> None:
        self.amax = 0.0

    def add(self, x: Array) -> None:
        """Add one text, any shape."""
        self.amax = max(self.amax, float(np.abs(x).max(initial=0)))


class LargestFinite:
    """The largest finite magnitude of all elements, in `amax`: masks hold infinities."""

    takes_infinity = True

    def __init__(self) -> None:
        self.amax = 0.0

    def add(self, x: Array) -> None:
        """Add one text, any shape."""
        self.amax = max(self.amax, float(np.abs(x).max(initial=0, where=np.isfinite(x))))


class Histogram:
    """Counts |x| in 65,536 logarithmic bins, 256 per power of two: the exponent and top 8 fraction bits of float32.

    The range need not be known in advance: positive float32 numbers are ordered like their bits (IEEE 754-2019, 5.10).
    """

    BINS = 1 << 16

    def __init__(self) -> None:
        self.counts = np.zeros(self.BINS, np.int64)

    def add(self, x: Array) -> None:
        """Add one text, any shape."""
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32).reshape(-1)
        self.counts += np.bincount((bits & 0x7FFFFFFF) >> 15, minlength=self.BINS)

    @classmethod
    def centres(cls) -> Array:
        """Returns the middle of every bin, float64 [BINS]: 0 for the first bin, infinity beyond the finite bins."""
        bits = (np.arange(cls.BINS, dtype=np.uint32) << 15) | (1 << 14)
        with np.errstate(invalid="ignore"):
            values = bits.view(np.float32).astype(np.float64)
        values[0] = 0.0
        return np.where(np.isfinite(values), values, np.inf)


class TokenSample:
    """Every n-th token, at most `limit` rows: layer errors are measured on these rows.

    Args:
        limit: most rows.
        total: tokens of all texts; n is total / limit, rounded down, or 1.
    """

    def __init__(self, limit: int, total: int) -> None:
        self._step, self._limit = max(1, total // limit), limit
        self._token_count, self._rows = 0, list[Array]()
        self._row_count = 0

    def add(self, x: Array) -> None:
        """Add the tokens of one text, [..., channels]."""
        x = tokens_of(x)
        first = -self._token_count % self._step
        self._token_count += len(x)
        rows = x[first :: self._step][: self._limit - self._row_count]
        if len(rows):
            self._rows.append(np.array(rows, np.float32))
            self._row_count += len(rows)

    @property
    def rows(self) -> Array:
        """The rows of the sample, float32 [rows, channels]."""
        return np.concatenate(self._rows)


def equal_tokens(x: Array) -> Array:
    """Scales the rows of `x` [tokens, channels] to length 1, so that an error counts relative to its token.

    The first token of a text is often a hundred times as long as the others (attention sinks, arXiv 2309.17453; massive
    activations, arXiv 2402.17762). A least-squares fit would then serve that token alone: INT4 with GPTQ of SmolLM2 had
    perplexity 31.9 without this scaling, and 26.5 with it. Rows shorter than 1e-3 of the longest are scaled like a row
    of that length.
    """
    # A square may exceed float32.
    norms = np.sqrt(np.einsum("tk,tk->t", x, x, dtype=np.float64))[:, None].astype(np.float32)
    return np.asarray(x / np.maximum(norms, max(1e-3 * float(norms.max(initial=0)), 1e-30)))


class Gram:
    """X^T X / tokens, where the rows of X are tokens scaled to length 1 (`equal_tokens`), summed text by text."""

    def __init__(self) -> None:
        self._sum: Array | None = None
        self.count = 0

    def add(self, x: Array) -> None:
        """Add the tokens of one text, float32 [..., channels]."""
        x = equal_tokens(tokens_of(x))
        product = x.T @ x
        self._sum = product if self._sum is None else np.add(self._sum, product, out=self._sum)
        self.count += len(x)

    @property
    def value(self) -> Array:
        """float32 [channels, channels]."""
        assert self._sum is not None, "no text was seen"
        return self._sum / np.float32(self.count)


class BlockGram:
    """X^T X / tokens of each block of channels by itself.

    Its memory grows with the number of channels, not with the square of it.

    Args:
        size: channels of a block; it must divide the channels.
        equal: scale the tokens to length 1 (`equal_tokens`), as `Gram` does.
    """

    def __init__(self, size: int, equal: bool = False) -> None:
        self._size, self._equal = size, equal
        self._sum: Array = np.zeros(())
        self._count = 0

    def add(self, x: Array) -> None:
        """Add the tokens of one text, float32 [tokens, channels]."""
        x = tokens_of(x)
        cut = (equal_tokens(x) if self._equal else x).reshape(len(x), -1, self._size).transpose(1, 2, 0)
        self._sum = self._sum + (cut @ cut.transpose(0, 2, 1)).astype(np.float64)
        self._count += len(x)

    @property
    def value(self) -> Array:
        """float64 [channels / size, size, size]; a square may exceed float32."""
        return np.asarray(self._sum / max(self._count, 1))


class RotationRange:
    """The largest magnitude that rotary embedding could give each channel of the keys: the length of its pair.

    A rotation turns the pair (x_i, x_j) by an angle that grows with the position. At some position the whole length
    sqrt(x_i^2 + x_j^2) is therefore on either channel, but calibration texts have only a few of the positions.

    Args:
        dim: rotated channels (the first ones); pairs are (i, i + dim/2). With 0 no channel is rotated.
        neighbours: pairs are (2i, 2i + 1).

    Attributes:
        amax: float32 [head_dim] of keys [batch, heads, sequence, head_dim]; 0-dimensional before the first text.
    """

    def __init__(self, dim: int, neighbours: bool = False) -> None:
        half = dim // 2
        self._pairs = (slice(0, dim, 2), slice(1, dim, 2)) if neighbours else (slice(0, half), slice(half, dim))
        self.amax: Array = np.zeros(())

    def add(self, x: Array) -> None:
        """Add the keys of one text, float32 [batch, heads, sequence, head_dim]."""
        size = np.abs(x)
        first, second = self._pairs
        size[..., first] = size[..., second] = np.hypot(x[..., first], x[..., second])
        channels = size.reshape(-1, size.shape[-1]).max(axis=0, initial=0)
        self.amax = np.maximum(self.amax, channels)
