"""`Partition`: one Model to N Models, its ranks, that compute the same together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxtools.ir.model import Model
from onnxtools.ir.rank import Rank
from onnxtools.pipeline.passbase import Configured

if TYPE_CHECKING:
    from onnxtools.check.feeds import Array, Feeds
    from onnxtools.check.validate import RunsRank


@dataclass(frozen=True)
class Partition(Configured):
    """Base of all partitions: frozen dataclasses whose fields are their options, as of a `Pass`."""

    def requires(self, model: Model) -> None:
        """Raise a `JobError` when `model` cannot be partitioned so."""

    def apply(self, model: Model) -> list[Model]:
        """The ranks, in order. `model` stays as it is, and weights that are not cut are shared with it."""
        raise NotImplementedError

    def compute(self, ranks: Sequence[RunsRank], feeds: Feeds) -> dict[str, Array]:
        """The model's outputs, by name, from its inputs.

        Args:
            ranks: each runs a rank's graph: its inputs by name to its outputs by name.
            feeds: inputs of the model.
        """
        raise NotImplementedError


def partitioned(partition: Partition, model: Model) -> list[Model]:
    """The ranks of `model`, each of which says in its metadata which one it is.

    Raises:
        OnnxtoolsError: the model cannot be partitioned so.
    """
    partition.requires(model)
    ranks = partition.apply(model)
    for number, rank in enumerate(ranks):
        Rank(number, len(ranks), model.sha256, partition.name, partition.public_options()).write(rank)
    return ranks
