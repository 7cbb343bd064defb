"""Slopes of ALiBi (Press et al., arXiv 2108.12409, section 3): one for each head."""

from __future__ import annotations

import math


def slopes(heads: int) -> tuple[float, ...]:
    """The slopes of BLOOM and Falcon: 2^(-8 i / n) for n heads, a power of two; further heads get those between."""
    power: int = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    return tuple(first + [2.0 ** (-4 * i / power) for i in range(1, 1 + 2 * (heads - power), 2)])


def mpt_slopes(heads: int, bias_max: float) -> tuple[float, ...]:
    """The slopes of MPT: those of the next power of two of heads, every second one first, cut to `heads`."""
    power: int = 2 ** math.ceil(math.log2(heads))
    whole = [2.0 ** (-bias_max * i / power) for i in range(1, power + 1)]
    return tuple(whole) if power == heads else tuple((whole[1::2] + whole[::2])[:heads])
