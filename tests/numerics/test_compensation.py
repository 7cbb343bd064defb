"""`compensated` against algorithm 1 of SparseGPT and GPTQ, written as it stands there: the inverse Hessian of what is
left, column by column.
"""

from __future__ import annotations

import numpy as np
import pytest

from onnxtools.numerics.compensation import DAMPING, Array, compensated


def literal(weight: Array, gram: Array) -> Array:
    """Round each column; the others take over the error by the inverse of the Hessian of the columns that are left."""
    hessian = gram + DAMPING * np.diagonal(gram).mean() * np.eye(len(gram))
    weight = weight.astype(np.float64).copy()
    for column in range(len(gram)):
        inverse = np.linalg.inv(hessian[column:, column:])
        wanted = np.rint(weight[:, column])
        error = (weight[:, column] - wanted) / inverse[0, 0]
        weight[:, column + 1 :] -= np.outer(error, inverse[0, 1:])
        weight[:, column] = wanted
    return weight


@pytest.mark.parametrize("size", [12, 140])  # more than one run of 128 columns
def test_rounding_with_compensation_is_the_papers(size: int) -> None:
    generator = np.random.default_rng(3)
    x = generator.normal(size=(4 * size, size)) @ generator.normal(size=(size, size))
    weight, gram = 3 * generator.normal(size=(5, size)), x.T @ x / len(x)
    found = compensated(weight, gram, lambda group, diagonal, column: np.rint(group[:, column % 4]))
    np.testing.assert_allclose(found, literal(weight, gram), atol=1e-6)
    plain, kept = np.rint(weight) - weight, found - weight
    assert np.square(x @ kept.T).sum() < np.square(x @ plain.T).sum()


def test_a_group_is_the_aligned_four_and_its_diagonal_the_factors() -> None:
    seen = []

    def choose(group: Array, diagonal: Array, column: int) -> Array:
        seen.append((group.shape, diagonal.shape, column))
        return np.asarray(group[:, column % 4])

    weight = np.arange(14.0).reshape(2, 7)
    found = compensated(weight, np.eye(7), choose)
    np.testing.assert_array_equal(found, weight)  # nothing is changed, so there is nothing to make up for
    assert seen == [((2, 4), (4,), c) for c in range(4)] + [((2, 3), (3,), c) for c in range(4, 7)]


def test_channels_that_are_always_zero_get_weights_of_zero() -> None:
    gram = np.diag([1.0, 0.0, 2.0, 1.0])
    found = compensated(np.full((2, 4), 0.4), gram, lambda group, diagonal, column: np.rint(group[:, column % 4]))
    assert not found[:, 1].any()
