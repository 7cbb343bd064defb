"""The rank of a graph in a partitioned model, and the folder with the graphs of all ranks (rank0.onnx, rank1.onnx)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.ir.model import Model
from onnxtools.storage.records import Beside
from onnxtools.storage.save import SaveReport

RANK_KEY = "onnxtools.rank"


@dataclass(frozen=True)
class Rank:
    """A graph's place in a partition.

    Attributes:
        number: from 0 to `world` - 1.
        world: number of ranks.
        source: SHA-256 of the partitioned graph.
        partition: name of the partition.
        options: its options, as plain data.
    """

    number: int
    world: int
    source: str
    partition: str
    options: dict[str, Any]

    @classmethod
    def read(cls, model: Model) -> Rank | None:
        """Reads the rank from the metadata of `model`; None if it is no rank.

        Raises:
            ModelError: the metadata is damaged.
        """
        text = model.ir.metadata_props.get(RANK_KEY)
        if text is None:
            return None
        try:
            rank = cls(**json.loads(text))
            if not (isinstance(rank.number, int) and isinstance(rank.world, int) and 0 <= rank.number < rank.world):
                raise ValueError(f"rank {rank.number} of {rank.world}")
        except (ValueError, TypeError, RecursionError) as error:
            raise ModelError(f"{model.path}: its {RANK_KEY} is damaged ({error}); partition the model again") from None
        return rank

    def write(self, model: Model) -> None:
        """Write the rank into the metadata of `model`."""
        model.ir.metadata_props[RANK_KEY] = json.dumps(dataclasses.asdict(self))

    @property
    def split(self) -> tuple[Any, ...]:
        """The values that all ranks of one partition share."""
        return self.world, self.source, self.partition, json.dumps(self.options, sort_keys=True)


def rank_path(folder: Path, number: int) -> Path:
    """Returns the path of the graph of rank `number` in `folder`."""
    return folder / f"rank{number}.onnx"


def save_ranks(
    ranks: Sequence[Model], folder: Path, *, copy_weights: bool = False, beside: Beside | None = None
) -> list[SaveReport]:
    """Write each rank to `folder`, one after the other, each atomically.

    Rank 0 is written last, so a folder with rank 0 is complete.

    Args:
        ranks: the graphs in the order of their numbers.
        folder: is created if it does not exist.
        copy_weights: as in `Model.save`.
        beside: files that belong to the model; they are written with each rank.

    Returns:
        A report for each rank, in the order of `ranks`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reports = [
        rank.save(rank_path(folder, number), copy_weights=copy_weights, beside=beside)
        for number, rank in reversed(list(enumerate(ranks)))
    ]
    return reports[::-1]


def load_ranks(folder: Path) -> list[Model]:
    """Returns the graphs of all ranks in `folder`, in order. No weight is read.

    Raises:
        ModelError: a file is missing or is no rank, or the files are of different partitions.
    """
    if not rank_path(folder, 0).is_file():
        raise ModelError(f"{folder}: has no rank0.onnx, which a folder of a partitioned model has; name a model file")
    first = Model.load(rank_path(folder, 0))
    ranks = [first, *(Model.load(rank_path(folder, number)) for number in range(1, _rank(first).world))]
    split = _rank(first).split
    for number, model in enumerate(ranks):
        rank = _rank(model)
        if rank.split != split:
            raise ModelError(f"{model.path}: is of another partition than {first.path}; partition the model again")
        if rank.number != number:
            raise ModelError(f"{model.path}: is rank {rank.number}; rename it, or partition the model again")
    return ranks


def _rank(model: Model) -> Rank:
    rank = Rank.read(model)
    if rank is None:
        raise ModelError(f"{model.path}: is no part of a partitioned model; partition the model again")
    return rank
