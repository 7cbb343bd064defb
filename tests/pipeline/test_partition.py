"""A model in ranks: the manager, the check, saving, loading and the builder take any `Partition`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

import onnxtools
from onnxtools.base.errors import JobError, ModelError
from onnxtools.base.options import option
from onnxtools.check.feeds import Array, Feeds
from onnxtools.check.validate import RunsRank
from onnxtools.ir.rank import RANK_KEY, Rank, load_ranks, save_ranks
from onnxtools.pipeline.instruments import NumericCheck
from onnxtools.pipeline.manager import PassManager
from onnxtools.pipeline.partition import Partition
from tests.support import info, normal, refuse, stored, succeed, write

UP, DOWN = normal(64, 128, seed=1), normal(128, 32, seed=2)


@dataclass(frozen=True)
class Columns(Partition):
    """A two-layer MLP as Megatron-LM cuts it (arXiv 1909.08053, section 3): columns of the first weight, rows of the
    second; the results of the ranks are summed.
    """

    name = "columns"

    world: int = option(2, "Ranks.")
    off: float = option(0.0, "What a defect adds to each result.")

    def requires(self, model: onnxtools.Model) -> None:
        if UP.shape[1] % self.world:
            raise JobError(f"columns: {UP.shape[1]} columns do not divide into {self.world} ranks")

    def apply(self, model: onnxtools.Model) -> list[onnxtools.Model]:
        return [self._rank(model, number) for number in range(self.world)]

    def _rank(self, model: onnxtools.Model, number: int) -> onnxtools.Model:
        copy = ir.from_proto(model.proto())
        width = UP.shape[1] // self.world
        part = slice(number * width, (number + 1) * width)
        for name, weight in (("up", UP[:, part]), ("down", DOWN[part])):
            value = copy.graph.initializers[name]
            value.const_value = ir.tensor(np.ascontiguousarray(weight), name=name)
            value.shape = ir.Shape(weight.shape)
        return onnxtools.Model(copy)

    def compute(self, ranks: Sequence[RunsRank], feeds: Feeds) -> dict[str, Array]:
        results = [rank(feeds)["y"] + np.float32(self.off) for rank in ranks]
        return {"y": np.sum(results, axis=0)}


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["h"], name="up"),
        helper.make_node("Relu", ["h"], ["a"], name="relu"),
        helper.make_node("MatMul", ["a", "down"], ["y"], name="down"),
    ]
    return write(
        tmp_path / "mlp.onnx", nodes, [info("x", ["batch", 64])], [info("y", ["batch", 32])], stored(up=UP, down=DOWN)
    )


def partitioned(path: Path, partition: Partition) -> onnxtools.Report:
    return PassManager([], [NumericCheck()], partition).run(onnxtools.load(path))


def test_the_manager_checks_ranks_and_says_what_they_are(mlp: Path) -> None:
    before = mlp.read_bytes()
    report = partitioned(mlp, Columns(world=4))
    step = report.steps[-1]
    assert (step.name, step.options, step.result.matches) == ("columns", {"world": 4, "off": 0.0}, 4)
    assert step.measures["rel_l2"] < 1e-6
    ranks = [Rank.read(model) for model in report.ranks]
    assert [(rank.number, rank.world) for rank in ranks if rank is not None] == [(n, 4) for n in range(4)]
    last = json.loads(report.ranks[3].ir.metadata_props["onnxtools.provenance"])[-1]
    assert last["passes"] == [{"pass": "columns", "world": 4, "off": 0.0}]
    assert mlp.read_bytes() == before


def test_ranks_that_compute_something_else_are_refused(mlp: Path) -> None:
    with pytest.raises(JobError, match="columns: the ranks compute another 'y' than the model"):
        partitioned(mlp, Columns(off=0.5))


def test_what_does_not_divide_is_refused_by_the_partition(mlp: Path) -> None:
    with pytest.raises(JobError, match="128 columns do not divide into 3 ranks"):
        partitioned(mlp, Columns(world=3))


def test_ranks_come_back_from_their_folder(mlp: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    reports = save_ranks(partitioned(mlp, Columns()).ranks, folder)
    assert [report.path.name for report in reports] == ["rank0.onnx", "rank1.onnx"]
    ranks = load_ranks(folder)
    assert [model.graph.initializers["up"].const_value.shape.numpy() for model in ranks] == [(64, 64)] * 2  # type: ignore[union-attr]
    for model in ranks:
        onnx.checker.check_model(str(model.path), full_check=True)


def test_a_folder_of_ranks_becomes_an_engine_each(mlp: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds the engines (make setup installs it)")
    folder = tmp_path / "ranks"
    save_ranks(partitioned(mlp, Columns()).ranks, folder)
    succeed("build", folder, "--compute-capability", "8.9", "--max-batch-size", "4")
    for number in range(2):
        manifest = json.loads((folder / f"rank{number}.engine.json").read_text())
        assert (manifest["rank"]["number"], manifest["rank"]["world"]) == (number, 2)


def test_folders_that_are_not_whole_are_refused(mlp: Path, tmp_path: Path) -> None:
    two, four, none = (tmp_path / name for name in ("two", "four", "none"))
    save_ranks(partitioned(mlp, Columns()).ranks, two)
    save_ranks(partitioned(mlp, Columns(world=4)).ranks, four)
    none.mkdir()
    assert "none: has no rank0.onnx" in refuse("build", none)
    (two / "rank1.onnx").rename(tmp_path / "away.onnx")
    assert "rank1.onnx: no such file" in refuse("build", two)
    (four / "rank1.onnx").rename(two / "rank1.onnx")
    assert "rank1.onnx: is of another partition than" in refuse("build", two)
    (two / "rank1.onnx").unlink()
    (tmp_path / "away.onnx").rename(two / "rank1.onnx")
    (two / "rank0.onnx").rename(tmp_path / "rank0.onnx")
    (two / "rank1.onnx").rename(two / "rank0.onnx")
    (tmp_path / "rank0.onnx").rename(two / "rank1.onnx")
    assert "rank0.onnx: is rank 1" in refuse("build", two)
    with pytest.raises(ModelError, match="is no part of a partitioned model"):
        load_ranks(_named_rank0(mlp, tmp_path / "plain"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"number": 3, "world": 2, "source": "", "partition": "", "options": {}}']
)
def test_damaged_metadata_is_refused(mlp: Path, tmp_path: Path, text: str) -> None:
    folder = _named_rank0(mlp, tmp_path / "damaged")
    proto = onnx.load(folder / "rank0.onnx")
    helper.set_model_props(proto, {RANK_KEY: text})
    onnx.save(proto, folder / "rank0.onnx")
    with pytest.raises(ModelError, match=f"its {RANK_KEY} is damaged"):
        load_ranks(folder)


def _named_rank0(path: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "rank0.onnx").write_bytes(path.read_bytes())
    return folder
