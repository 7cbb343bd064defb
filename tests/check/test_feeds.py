"""What checks look at: the whole vocabulary, padding, far positions, a part of large models, and how much a lossy pass
lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxtools.base.errors import JobError
from onnxtools.check.feeds import random_feeds, vocabulary
from onnxtools.ir.model import Model
from onnxtools.pipeline import instruments
from onnxtools.pipeline.instruments import NumericCheck
from onnxtools.pipeline.manager import PassManager, Report
from onnxtools.pipeline.passbase import Pass, PassResult
from tests.support import FLOAT, HALF, INT64, Array, Feeds, info, normal, run, stored, succeed, write

N = helper.make_node
INT32, BOOL = TensorProto.INT32, TensorProto.BOOL
ROWS = 96
E = normal(ROWS, 64, seed=1)
HEAD = normal(64, ROWS, seed=2) / np.float32(8)
LAST = N("MatMul", ["e", "head"], ["logits"], name="head")
CONSTANTS: Feeds = {
    "minus": np.array([-1]), "none": np.array(0), "zero": np.array([0]), "one": np.array([1]), "shift": np.array(2),
    "top": np.array(ROWS - 1),
    "both": np.array([0, 0]),
    "huge": np.array([1 << 30, 1 << 30]), "like": np.array([0, 0, 64]), "depth": np.array(ROWS),
    "off_on": np.array([0, 1], np.float32), "scale": np.float32(0.02),
    "null": np.array(0, np.int8),
}  # fmt: skip


# --- the vocabulary ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lookup:
    """How ids reach the table `E`, and what they find there (`e`)."""

    nodes: tuple[onnx.NodeProto, ...]
    kind: int = INT64
    stored: Literal["plain", "fp16", "transposed", "int8"] = "plain"
    padded_rows: int = 0


GATHER = N("Gather", ["E", "i"], ["e"], name="embed")
VIEW = (
    N("Shape", ["input_ids"], ["len"], start=1, end=2),
    N("Concat", ["minus", "len"], ["to"], axis=0),
    N("Reshape", ["input_ids", "to"], ["i"], name="view"),
)
LOOKUPS = {
    "direct": Lookup((N("Identity", ["input_ids"], ["i"]), GATHER)),
    "int32": Lookup((N("Identity", ["input_ids"], ["i"]), GATHER), INT32),
    "cast": Lookup((N("Cast", ["input_ids"], ["i"], to=INT64), GATHER), INT32),
    "cast twice": Lookup((N("Cast", ["input_ids"], ["j"], to=INT32), N("Cast", ["j"], ["i"], to=INT64), GATHER)),
    "reshaped": Lookup((*VIEW, GATHER)),
    "reshaped and cast": Lookup((*VIEW[:2], N("Reshape", ["input_ids", "to"], ["j"]), N("Cast", ["j"], ["i"], to=INT64),
        GATHER), INT32),
    "flat": Lookup((N("Reshape", ["input_ids", "minus"], ["i"]), N("Gather", ["E", "i"], ["f"]),
        N("Shape", ["input_ids"], ["s"]),
                    N("Concat", ["s", "minus"], ["t"], axis=0),
                    N("Reshape", ["f", "t"], ["e"]))),
    "unsqueezed": Lookup((N("Unsqueeze", ["input_ids", "zero"], ["j"]), N("Squeeze", ["j", "zero"], ["i"]), GATHER)),
    "sliced": Lookup((N("Slice", ["input_ids", "both", "huge"], ["i"]), GATHER)),
    "clipped": Lookup((N("Clip", ["input_ids", "none", "top"], ["i"]), GATHER)),
    "chosen": Lookup((N("Less", ["input_ids", "none"], ["c"]), N("Where", ["c", "none", "input_ids"], ["i"]), GATHER)),
    "shifted": Lookup((N("Add", ["input_ids", "shift"], ["i"]), GATHER), padded_rows=2),
    "joined": Lookup((N("Concat", ["input_ids"], ["i"], axis=1), GATHER)),
    "elements": Lookup((N("Unsqueeze", ["input_ids", "minus"], ["i"]), N("GatherND", ["E", "i"], ["e"]))),
    "one-hot": Lookup((N("OneHot", ["input_ids", "depth", "off_on"], ["i"]), N("MatMul", ["i", "E"], ["e"]))),
    "fp16 table": Lookup((N("Cast", ["E"], ["F"], to=FLOAT), N("Gather", ["F", "input_ids"], ["e"])), stored="fp16"),
    "cast after the table": Lookup((N("Gather", ["E", "input_ids"], ["f"]), N("Cast", ["f"], ["e"], to=FLOAT)),
        stored="fp16"),
    "table along axis 1": Lookup((N("Gather", ["E", "input_ids"], ["f"], axis=1),
        N("Transpose", ["f"], ["e"], perm=[1, 2, 0])), stored="transposed"),
    "transposed table": Lookup((N("Transpose", ["E"], ["F"]), N("Gather", ["F", "input_ids"], ["e"])),
        stored="transposed"),
    "INT8 table": Lookup((N("DequantizeLinear", ["E", "scale", "null"], ["F"]), N("Gather", ["F", "input_ids"], ["e"])),
        stored="int8"),
}  # fmt: skip


def language_model(path: Path, case: Lookup, table: Array) -> Path:
    table = np.concatenate([np.zeros((case.padded_rows, 64), np.float32), table])
    kept = {
        "plain": table,
        "fp16": table.astype(np.float16),
        "transposed": table.T.copy(),
        "int8": np.clip(np.round(table / 0.02), -127, 127).astype(np.int8),
    }
    read = {name for node in case.nodes for name in node.input}
    arrays = {
        "E": kept[case.stored],
        "head": HEAD,
        **{name: array for name, array in CONSTANTS.items() if name in read},
    }
    ids, logits = info("input_ids", ["batch", "sequence"], case.kind), info("logits", ["batch", "sequence", ROWS])
    return write(path, [*case.nodes, LAST], [ids], [logits], stored(**arrays))


@pytest.mark.parametrize("how", LOOKUPS)
def test_a_damaged_table_is_seen_or_the_vocabulary_is_said_to_be_unknown(how: str, tmp_path: Path) -> None:
    damaged = E.copy()
    damaged[ROWS // 2 :] = 0
    sound, bad = (
        language_model(tmp_path / name, LOOKUPS[how], table) for name, table in (("m.onnx", E), ("bad.onnx", damaged))
    )
    assert run("validate", sound, sound).code == 0
    result = run("validate", sound, bad)
    unknown = "vocabulary is unknown" in result.out
    assert result.code == 1 or unknown, result.out
    assert not (unknown and how not in ("chosen", "shifted", "joined", "elements", "one-hot")), (
        "an ordinary way is not understood"
    )


@pytest.mark.parametrize(
    "how", ["direct", "int32", "cast", "reshaped", "flat", "table along axis 1", "transposed table", "INT8 table"]
)
def test_the_vocabulary_is_that_of_the_table_and_ids_reach_all_over_it(how: str, tmp_path: Path) -> None:
    model = Model.load(language_model(tmp_path / "m.onnx", LOOKUPS[how], E))
    assert vocabulary(model.graph.inputs[0]) == ROWS
    ids = random_feeds(model, 4, 24)["input_ids"]
    assert sorted(ids.ravel()) == list(range(ROWS))


@dataclass(frozen=True)
class Zero(Pass):
    """A pass that claims to change nothing and loses half of the table."""

    name = "zero"

    def apply(self, model: Model) -> PassResult:
        value = model.graph.initializers["E"]
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        array[ROWS // 2 :] = 0
        value.const_value = ir.Tensor(array, name="E")
        return PassResult(True, 1)


@pytest.mark.parametrize("how", ["direct", "int32", "cast", "reshaped", "flat", "unsqueezed", "chosen", "elements"])
def test_the_check_of_a_pass_sees_the_vocabulary_or_says_so(how: str, tmp_path: Path) -> None:
    model = Model.load(language_model(tmp_path / "m.onnx", LOOKUPS[how], E))
    try:
        report = PassManager([Zero()], [NumericCheck()]).run(model)
    except JobError as error:
        assert "changed the outputs" in str(error)
    else:
        assert any("vocabulary is unknown" in note for note in (*model.notes, *report.steps[0].result.notes))


# --- padding and positions --------------------------------------------------------------------------------------------


def masked(path: Path, kind: int, *, ignored: bool, name: str = "attention_mask") -> Path:
    """Each token sees the sum of all that the mask keeps; or of all."""
    nodes = [N("Gather", ["E", "input_ids"], ["w"]), N("Cast", [name], ["f"], to=FLOAT),
        N("Unsqueeze", ["f", "minus"], ["g"]),
             N("Mul", ["w", "g"], ["kept"]), N("ReduceSum", ["w" if ignored else "kept", "one"], ["sum"]),
             N("Add", ["w", "sum"], ["e"]), LAST]  # fmt: skip
    inputs = [info("input_ids", ["batch", "sequence"], INT64), info(name, ["batch", "sequence"], kind)]
    arrays = {"E": E, "head": HEAD, "minus": CONSTANTS["minus"], "one": CONSTANTS["one"]}
    return write(path, nodes, inputs, [info("logits", ["batch", "sequence", ROWS])], stored(**arrays))


@pytest.mark.parametrize("kind", [INT64, INT32, BOOL], ids=["int64", "int32", "bool"])
def test_a_mask_that_is_ignored_is_seen(kind: int, tmp_path: Path) -> None:
    sound, bad = masked(tmp_path / "m.onnx", kind, ignored=False), masked(tmp_path / "bad.onnx", kind, ignored=True)
    assert run("validate", sound, sound).code == 0
    result = run("validate", sound, bad)
    assert result.code == 1 and "padded" in result.out


def positioned(path: Path, how: str, *, rounded: bool, rows: int = 0) -> Path:
    """Cosines of positions, which an input says or the graph counts, in fp16 or not; or a table of `rows`, wrong in its
    last row.
    """
    table = normal(rows, 64, seed=3) if rows else np.zeros((1, 64), np.float32)
    if rounded and rows:
        table[-1] += 1
    count = [
        N("Shape", ["input_ids"], ["n"], start=1, end=2),
        N("Squeeze", ["n"], ["m"]),
        N("Range", ["start", "m", "step"], ["position"]),
    ]
    angles = [N("Cast", ["position"], ["r"], to=HALF if rounded else FLOAT), N("Cast", ["r"], ["p"], to=FLOAT),
        N("Unsqueeze", ["p", "minus"], ["c"]),
              N("Mul", ["c", "freq"], ["a"]), N("Cos", ["a"], ["t"])]  # fmt: skip
    found = [N("Gather", ["table", "position"], ["t"])] if rows else angles
    nodes = [N("Gather", ["E", "input_ids"], ["w"]),
        *([N("Identity", ["position_ids"], ["position"])] if how == "input" else count), *found,
             N("Add", ["w", "t"], ["e"]), LAST]  # fmt: skip
    inputs = [
        info("input_ids", ["batch", "sequence"], INT64),
        *([info("position_ids", ["batch", "sequence"], INT64)] if how == "input" else []),
    ]
    arrays: Feeds = {
        "E": E,
        "head": HEAD,
        "minus": CONSTANTS["minus"],
        "start": np.array(0),
        "step": np.array(1),
        "freq": np.linspace(0.1, 1, 64, dtype=np.float32),
    }
    arrays = {**arrays, "table": table} if rows else arrays
    return write(path, nodes, inputs, [info("logits", ["batch", "sequence", ROWS])], stored(**arrays))


@pytest.mark.parametrize("rows", [0, 300, 6000])
@pytest.mark.parametrize("how", ["input", "counted"])
def test_positions_beyond_the_first_are_looked_at(how: str, rows: int, tmp_path: Path) -> None:
    """Where the table has fewer than 4,096 rows, its last one; a table of 6,000 is looked at beyond 4,000, not to its
    end.
    """
    sound, bad = (
        positioned(tmp_path / "m.onnx", how, rounded=False, rows=rows),
        positioned(tmp_path / "bad.onnx", how, rounded=True, rows=rows),
    )
    assert run("validate", sound, sound).code == 0
    assert run("validate", sound, bad).code == (0 if rows == 6000 else 1)
    told = run("validate", sound, sound).out
    assert ("positions from" if how == "input" else "tokens") in told


# --- large models and lossy passes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies a weight."""

    name = "scale"
    weight: str = "w0"
    by: float = 1.5

    def apply(self, model: Model) -> PassResult:
        value = model.graph.initializers[self.weight]
        assert value.const_value is not None
        value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(self.by), name=self.weight)
        return PassResult(True, 1)


class Lossy(Scale):
    name = "lossy"
    numerics = "lossy"


def chain(path: Path, count: int = 6) -> Path:
    nodes = [N("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"], name=f"m{i}") for i in range(count)]
    arrays = {
        f"w{i}": np.linalg.qr(normal(64, 64, seed=i).astype(np.float64))[0].astype(np.float32) for i in range(count)
    }
    return write(path, nodes, [info("v0", ["n", 64])], [info(f"v{count}", ["n", 64])], stored(**arrays), opset=21)


def checked(path: Path, pass_: Pass, check: NumericCheck | None = None) -> Report:
    return PassManager([pass_], [check or NumericCheck()]).run(Model.load(path))


def test_a_large_model_is_checked_by_its_first_layers_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = chain(tmp_path / "m.onnx")
    monkeypatch.setattr(instruments, "CHECK_LIMIT", 1 << 10)
    monkeypatch.setattr(instruments, "PART_LIMIT", 3 * 64 * 64 * 4)
    told = succeed("legalize", path, tmp_path / "o.onnx").out
    with pytest.raises(JobError, match="changed the outputs"):
        checked(path, Scale("w1"))
    report = checked(path, Scale("w5"))  # behind the part
    assert (
        "the first 3 of 6 nodes (0 MB of weights)" in report.steps[0].measures["sampled"]
        and " s" in report.steps[0].measures["sampled"]
    )
    with pytest.raises(JobError, match="changed the outputs"):
        checked(path, Scale("w5"), NumericCheck(full=True))
    assert "nothing matched" in told or "checked: the first" in told
    monkeypatch.setattr(instruments, "PART_LIMIT", 64)
    assert "--check" in checked(path, Scale("w1")).steps[0].measures["numeric_skipped"]


@pytest.mark.parametrize(
    "by, outcome",
    [
        (1.2, "quiet"),
        (0.75, "quiet"),
        (1.4, "warned"),
        (0.1, "warned"),
        (2.2, "refused"),
        (-0.5, "refused"),
        (np.inf, "refused"),
    ],
)
def test_a_lossy_pass_is_warned_of_above_30_percent_and_refused_above_100(
    by: float, outcome: str, tmp_path: Path
) -> None:
    path = chain(tmp_path / "m.onnx", 2)
    if outcome == "refused":
        with pytest.raises(JobError, match="--no-check"):
            checked(path, Lossy("w0", by))
        return
    step = checked(path, Lossy("w0", by)).steps[0]
    assert step.measures["rel_l2"] == pytest.approx(abs(by - 1), rel=1e-4)
    assert any("warning: the outputs changed" in note for note in step.result.notes) == (outcome == "warned")


def test_no_check_writes_what_a_check_refuses(tmp_path: Path) -> None:
    """Calibrated on numbers a thousandth of those that are compared, INT8 cuts nearly all off: warned, refused by a
    tolerance, written without a check. Without --inputs the check takes the calibration data, and sees nothing.
    """
    path = chain(tmp_path / "m.onnx", 2)
    np.savez(tmp_path / "x.npz", v0=normal(64, 64) / np.float32(1000))
    np.savez(tmp_path / "real.npz", v0=normal(64, 64))
    flags: tuple[str | Path, ...] = ("--int8", "--all-layers", "--lm-head", "--calib", tmp_path / "x.npz")
    assert "warning: the outputs changed" not in succeed("quantize", path, tmp_path / "o.onnx", *flags).out
    real = ("--inputs", tmp_path / "real.npz")
    told = succeed("quantize", path, tmp_path / "o.onnx", *flags, *real, "--force").out
    assert "warning: the outputs changed by" in told.replace("\n", " ")
    (tmp_path / "o.onnx").unlink()
    assert (
        run("quantize", path, tmp_path / "o.onnx", *flags, *real, "--tolerance", "0.5").code == 1
        and not (tmp_path / "o.onnx").exists()
    )
    succeed("quantize", path, tmp_path / "o.onnx", *flags, "--no-check")
