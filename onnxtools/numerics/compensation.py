"""The core of SparseGPT and GPTQ: change a weight column by column, and let the later columns compensate the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

DAMPING = 0.01
"""Share of the mean diagonal that is added to the Hessian (SparseGPT, section 4; GPTQ, section 3.3)."""
_COLUMNS = 128
"""Columns of a block: the columns behind a block are adjusted once for the whole block."""

Choose = Callable[[Array, Array, int], Array]
"""choose(group, diagonal, column): `group` [N, <=4] are the current columns of the aligned group of four, `diagonal`
[<=4] their Cholesky diagonal. Returns the new column, [N].
"""


def compensated(weight: Array, gram: Array, choose: Choose) -> Array:
    """Returns `weight` [N, K] with every column replaced by `choose`, and the later columns adjusted.

    The adjustment keeps the change of the outputs X W^T as small as possible. This is algorithm 1 of SparseGPT (arXiv
    2301.00774) and of GPTQ (arXiv 2210.17323): with the upper Cholesky factor U of the inverse Hessian, an error
    e = (w - q) / U[c, c] in column c is compensated by subtracting e U[c, c:] from the columns from c on.
    Columns whose input is always zero become zero before.

    Args:
        weight: [N, K], any floating-point type; not changed.
        gram: X^T X / tokens, [K, K].
        choose: called once for each column, in order.

    Returns:
        float64 [N, K].

    Raises:
        numpy.linalg.LinAlgError: the damped Hessian is not positive definite.
    """
    hessian = gram.astype(np.float64)
    dead = np.diagonal(hessian) == 0
    weight = np.where(dead, 0.0, weight.astype(np.float64))
    hessian[dead, dead] = 1.0
    hessian[np.diag_indices_from(hessian)] += DAMPING * float(np.diagonal(hessian).mean())
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    for begin in range(0, weight.shape[1], _COLUMNS):
        end = min(begin + _COLUMNS, weight.shape[1])
        block, factor = weight[:, begin:end], upper[begin:end, begin:end]
        errors = np.zeros_like(block)
        for column in range(end - begin):
            four = slice(column // 4 * 4, column // 4 * 4 + 4)
            replacement = choose(block[:, four], np.diagonal(factor)[four], begin + column)
            error = (block[:, column] - replacement) / factor[column, column]
            block[:, column:] -= np.outer(error, factor[column, column:])
            block[:, column] = replacement
            errors[:, column] = error
        weight[:, end:] -= errors @ upper[begin:end, end:]
    return weight
