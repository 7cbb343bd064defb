"""Files: nothing of others is lost, nothing is read that is not ours, and a model keeps its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxtools.base.errors import JobError
from onnxtools.ir.model import Model
from onnxtools.storage.files import OwnFolder, replacing
from tests.support import (
    FLOAT,
    Array,
    external,
    info,
    initializers,
    linear,
    normal,
    refuse,
    rel_l2,
    run,
    stored,
    succeed,
    write,
)

UINT8 = TensorProto.UINT8
N = helper.make_node
W = normal(64, 128)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def pruned(path: Path) -> bool:
    return bool(np.count_nonzero(initializers(path)["w"]) == W.size // 2)


# --- writers ----------------------------------------------------------------------------------------------------------

RACE = """
import sys, time
from onnxtools.ir.model import Model
model = Model.load(sys.argv[1])
while time.time() < float(sys.argv[3]): pass
for _ in range(25): Model.load(sys.argv[1]).save(sys.argv[2])
"""


def test_two_writers_leave_one_whole_model(tmp_path: Path) -> None:
    """Weights of 1 belong to the graph called 1; nothing but the model and its data is left."""
    import time

    (tmp_path / "out").mkdir()
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        weight = np.full((64, 64), number, np.float32)
        nodes = [N("MatMul", ["x", "w"], ["y"]), N("MatMul", ["y", "v"], ["z"])]
        path = write(tmp_path / str(number) / "m.onnx", nodes, [info("x", [2, 64])], [info("z", [2, 64])],
            stored(w=weight, v=weight))  # fmt: skip
        proto = onnx.load(path)
        proto.graph.name = str(number)
        onnx.save(proto, path, save_as_external_data=True, location="w.data", size_threshold=0)
    start = str(time.time() + 4)
    arguments = [
        [sys.executable, "-c", RACE, str(tmp_path / str(number) / "m.onnx"), str(tmp_path / "out" / "m.onnx"), start]
        for number in (1, 2)
    ]
    writers = [subprocess.Popen(argument, stderr=subprocess.PIPE, text=True) for argument in arguments]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert all(writer.returncode == 0 for writer in writers), errors
    proto = onnx.load(tmp_path / "out" / "m.onnx")
    assert {
        float(value) for tensor in proto.graph.initializer for value in np.unique(numpy_helper.to_array(tensor))
    } == {float(proto.graph.name)}
    succeed("prune", tmp_path / "1" / "m.onnx", tmp_path / "out" / "m.onnx", "--lm-head", "--no-check")
    assert names(tmp_path / "out") <= {"m.onnx", *(entry.name for entry in (tmp_path / "out").glob("m.onnx*data"))}
    assert len(names(tmp_path / "out")) == 2


@pytest.mark.parametrize("copy", ["model.onnx.bak", "backup.onnx", "old.pb", "model (copy)"])
def test_a_backup_keeps_its_data(copy: str, tmp_path: Path) -> None:
    path = external(linear(tmp_path / "in.onnx"), "in.data")
    succeed("prune", path, tmp_path / "sub" / "model.onnx", "--no-check", "--lm-head")
    model = tmp_path / "sub" / "model.onnx"
    shutil.copy(model, tmp_path / "sub" / copy)
    before = initializers(tmp_path / "sub" / copy)
    for _ in range(3):
        succeed("set-opset", path, model, "--no-check", "--version", "21", "--copy-weights")
    assert not pruned(model)
    after = initializers(tmp_path / "sub" / copy)
    np.testing.assert_array_equal(after["w"], before["w"])
    assert len(names(tmp_path / "sub")) == 4  # two graphs, and the data of each


@pytest.mark.parametrize("kind", ["tmp", "old", "data", "pid"])
def test_links_planted_at_other_names_are_not_followed(kind: str, tmp_path: Path) -> None:
    path = external(linear(tmp_path / "in.onnx"))
    victim = tmp_path / "victim"
    victim.write_text("keep")
    out = tmp_path / "out"
    out.mkdir()
    name = {
        "tmp": ".o.onnx.00000000.tmp",
        "old": ".o.onnx.00000000.old",
        "data": "o.onnx.data",
        "pid": f".o.onnx.{os.getpid()}.tmp",
    }[kind]
    (out / name).symlink_to(victim)
    succeed("prune", path, out / "o.onnx", "--no-check", "--lm-head")
    assert victim.read_text() == "keep" and (out / name).is_symlink()
    assert not (out / "o.onnx").is_symlink() and pruned(out / "o.onnx")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_a_replaced_file_keeps_its_mode_and_owner_and_the_data_takes_them(mode: int, tmp_path: Path) -> None:
    path, out = external(linear(tmp_path / "in.onnx")), tmp_path / "out"
    out.mkdir()
    shutil.copy(path, out / "o.onnx")
    (out / "o.onnx").chmod(mode)
    owner = (4321, 1234) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(out / "o.onnx", *owner)
    succeed("prune", path, out / "o.onnx", "--no-check", "--lm-head")
    for file in (out / "o.onnx", out / "o.onnx.data"):
        status = file.stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (mode, *owner), file


def test_a_replaced_link_stays_a_link(tmp_path: Path) -> None:
    path = linear(tmp_path / "in.onnx")
    real = tmp_path / "real.onnx"
    shutil.copy(path, real)
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    succeed("prune", path, tmp_path / "link.onnx", "--no-check", "--lm-head")
    assert (tmp_path / "link.onnx").is_symlink() and pruned(real)


@pytest.mark.parametrize("how", ["itself", "link", "hard link", "other spelling"])
def test_the_input_is_not_the_output_without_force(how: str, tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx")
    before, output = path.read_bytes(), tmp_path / "o.onnx"
    (tmp_path / "sub").mkdir()
    if how == "link":
        output.symlink_to(path)
    elif how == "hard link":
        output.hardlink_to(path)
    else:
        output = path if how == "itself" else tmp_path / "sub" / ".." / "m.onnx"
    assert "--force" in refuse("prune", path, output, "--lm-head", code=2)
    assert path.read_bytes() == before
    succeed("prune", path, output, "--lm-head", "--force")
    assert pruned(output)


# --- side files -------------------------------------------------------------------------------------------------------


def language_folder(folder: Path, word: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"word": word}))
    (folder / "generation_config.json").write_text("{}")
    return linear(folder / "model.onnx")


def test_side_files_travel_and_those_of_another_model_are_refused(tmp_path: Path) -> None:
    a, b = language_folder(tmp_path / "a", "a"), language_folder(tmp_path / "b", "b")
    out = tmp_path / "out"
    succeed("prune", a, out / "a.onnx", "--lm-head", "--no-check")
    assert {"tokenizer.json", "generation_config.json"} <= names(out)
    assert json.loads((out / "tokenizer.json").read_text()) == {"word": "a"}
    before = {entry.name: entry.read_bytes() for entry in out.iterdir()}
    assert "tokenizer.json" in refuse("prune", b, out / "b.onnx", "--lm-head", "--no-check")
    assert {entry.name: entry.read_bytes() for entry in out.iterdir()} == before
    succeed("prune", a, out / "a2.onnx", "--lm-head", "--no-check")  # the same files belong to both
    (out / "tokenizer.json").write_text(json.dumps({"word": "b"}))
    assert "tokenizer.json" in refuse("legalize", out / "a.onnx", tmp_path / "new" / "c.onnx", "--no-check")
    assert not (tmp_path / "new" / "c.onnx").exists()


# --- what a model may read --------------------------------------------------------------------------------------------

SECRET = b"SECRET_BYTES_16_"


def outside(location: str, name: str = "k") -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=UINT8, dims=[16], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def _function(nodes: list[onnx.NodeProto], defaults: tuple[onnx.AttributeProto, ...] = ()) -> onnx.FunctionProto:
    made = helper.make_function("my", "Leak", [], ["o"], nodes, [helper.make_opsetid("", 19)])
    made.attribute_proto.extend(defaults)
    return made


def _branch(location: str, *, constant: bool) -> onnx.GraphProto:
    made = helper.make_graph([N("Identity", ["k"], ["b"])], "branch", [], [info("b", [16], UINT8)])
    if constant:
        made.node.insert(0, N("Constant", [], ["k"], value=outside(location)))
    else:
        made.initializer.append(outside(location))
    return made


def leaking(kind: str, location: str) -> onnx.ModelProto:
    """A graph whose output y is the bytes at `location`, held in a place of this kind."""
    nodes, tensors, functions = [N("Identity", ["k"], ["y"])], [], []
    if kind == "initializer":
        tensors = [outside(location)]
    elif kind == "attribute":
        nodes.insert(0, N("Constant", [], ["k"], value=outside(location)))
    elif kind.startswith("branch"):
        nodes = [
            N(
                "If",
                ["c"],
                ["y"],
                then_branch=(branch := _branch(location, constant="attribute" in kind)),
                else_branch=branch,
            )
        ]
        tensors = stored(c=np.array(True))
    elif kind == "unused tensors":
        nodes = [N("Constant", [], ["k"], value=numpy_helper.from_array(np.zeros(16, np.uint8))), *nodes]
        nodes[-1].attribute.append(helper.make_attribute("extra", [outside(location)]))
    elif kind == "sparse":
        values, indices = outside(location), numpy_helper.from_array(np.arange(16), "indices")
        nodes.insert(0, N("Constant", [], ["k"], sparse_value=helper.make_sparse_tensor(values, indices, [16])))
    else:
        nodes = [N("Leak", [], ["y"], domain="my")]
        inside = N("Constant", [], ["o"], value=outside(location))
        if kind == "function":
            functions = [_function([inside])]
        elif kind == "default of a function":
            held = N("Constant", [], ["o"])
            held.attribute.append(onnx.AttributeProto(name="value", ref_attr_name="v", type=onnx.AttributeProto.TENSOR))
            functions = [_function([held], (helper.make_attribute("v", outside(location)),))]
        else:
            chosen = N(
                "If", ["c"], ["o"], then_branch=(branch := _branch(location, constant=False)), else_branch=branch
            )
            functions = [_function([N("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True))), chosen])]
    graph = helper.make_graph(nodes, "g", [], [info("y", [16], UINT8)], tensors)
    opsets = [helper.make_opsetid("", 19), *([helper.make_opsetid("my", 1)] if functions else [])]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=9)


PLACES = (
    "initializer",
    "attribute",
    "branch",
    "branch attribute",
    "unused tensors",
    "sparse",
    "function",
    "default of a function",
    "branch in a function",
)
LOCATIONS: dict[str, Callable[[Path], str]] = {
    "above": lambda folder: "../secret.bin", "absolute": lambda folder: str(folder.parent / "secret.bin"),
    "around": lambda folder: "sub/../../secret.bin",
    "link": lambda folder: "link.bin", "folder link": lambda folder: "up/secret.bin",
}  # fmt: skip


@pytest.mark.parametrize("where", LOCATIONS)
@pytest.mark.parametrize("kind", PLACES)
def test_nothing_outside_the_folder_is_read(kind: str, where: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(SECRET)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "up").symlink_to(tmp_path)
    (folder / "m.onnx").write_bytes(leaking(kind, LOCATIONS[where](folder)).SerializeToString())
    for command in ("inline-functions", "fold-constants", "legalize"):
        result = run(command, folder / "m.onnx", tmp_path / "out" / "o.onnx", "--no-check", "--copy-weights")
        assert result.code in (0, 1) and "Traceback" not in result.err and "internal error" not in result.err, (
            result.err
        )
        written = (
            b"".join(file.read_bytes() for file in (tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else b""
        )
        assert SECRET not in written
        assert result.code == 1, "said to be well"


def test_a_hugging_face_cache_is_followed_to_its_own_blobs_alone(tmp_path: Path) -> None:
    own, other = tmp_path / "models--a", tmp_path / "models--b"
    path = external(linear(tmp_path / "m.onnx"), "w.data")
    for repository in (own, other):
        (repository / "blobs").mkdir(parents=True)
        (repository / "snapshots" / "r" / "onnx").mkdir(parents=True)
    shutil.move(path, own / "blobs" / "1")
    shutil.move(tmp_path / "w.data", own / "blobs" / "2")
    for repository in (own, other):
        (repository / "snapshots" / "r" / "onnx" / "m.onnx").symlink_to(
            "../../../blobs/1" if repository == own else own / "blobs" / "1"
        )
        (repository / "snapshots" / "r" / "onnx" / "w.data").symlink_to(f"../../../../{own.name}/blobs/2")
    succeed(
        "prune", own / "snapshots" / "r" / "onnx" / "m.onnx", tmp_path / "out" / "o.onnx", "--lm-head", "--no-check"
    )
    assert pruned(tmp_path / "out" / "o.onnx")
    assert "link" in refuse(
        "prune", other / "snapshots" / "r" / "onnx" / "m.onnx", tmp_path / "out" / "p.onnx", "--lm-head", "--no-check"
    )


@pytest.mark.parametrize("flags", [(), ("--copy-weights",)], ids=["", "copied"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_initializers_over_the_same_bytes_keep_their_shapes(
    elsewhere: bool, flags: tuple[str, ...], tmp_path: Path
) -> None:
    data = normal(24)
    (tmp_path / "w.bin").write_bytes(data.tobytes())

    def over(name: str, dims: list[int], kind: int, offset: int = 0) -> onnx.TensorProto:
        tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
        size = int(np.prod(dims)) * 4
        for key, value in (("location", "w.bin"), ("offset", str(offset)), ("length", str(size))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        return tensor

    tensors = [
        over("A", [4, 6], FLOAT),
        over("B", [24], FLOAT),
        over("C", [6, 4], FLOAT),
        over("D", [24], TensorProto.INT32),
        over("E", [2, 6], FLOAT, 48),
    ]
    nodes = [N("Identity", [tensor.name], [tensor.name.lower()]) for tensor in tensors] + [N("Dropout", ["a"], ["z"])]
    outputs = [info(tensor.name.lower(), list(tensor.dims), tensor.data_type) for tensor in tensors] + [
        info("z", [4, 6])
    ]
    path = write(tmp_path / "m.onnx", nodes, [], outputs, tensors)
    output = tmp_path / ("out" if elsewhere else ".") / "o.onnx"
    succeed("legalize", path, output, "--no-check", *flags)
    expected: dict[str, Array] = {
        "A": data.reshape(4, 6),
        "B": data,
        "C": data.reshape(6, 4),
        "D": data.view(np.int32),
        "E": data[12:].reshape(2, 6),
    }
    found = initializers(output)
    for name in found:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert found


# --- what a model says of its author, and what a recipe may do --------------------------------------------------------


def test_a_model_holds_no_absolute_path(tmp_path: Path) -> None:
    home = tmp_path / "home_of_somebody"
    home.mkdir()
    path = external(linear(home / "m.onnx"))
    np.savez(home / "x.npz", x=normal(4, 64))
    succeed("set-opset", path, home / "n.onnx", "--version", "21", "--no-check")
    flags = [
        "--int8",
        "--all-layers",
        "--lm-head",
        "--calib",
        home / "x.npz",
        "--calib-cache",
        home / "cache",
        "--no-check",
    ]
    succeed("quantize", home / "n.onnx", home / "q.onnx", *flags)
    (home / "r.yaml").write_text(
        f"input: {home / 'n.onnx'}\noutput: {home / 'p.onnx'}\npasses: [{{prune: {{lm-head: true}}}}]\n"
    )
    succeed("pipeline", home / "r.yaml")
    for name in ("q.onnx", "p.onnx"):
        assert b"home_of_somebody" not in (home / name).read_bytes(), name
        assert Model.load(home / name).ir.metadata_props


@pytest.mark.parametrize("flags, runs", [((), False), (("--allow-code",), True)], ids=["", "allowed"])
def test_a_recipe_runs_code_only_when_it_is_allowed(
    flags: tuple[str, ...], runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx_graphsurgeon")
    linear(tmp_path / "in.onnx")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "edit_of_a_recipe", raising=False)
    (tmp_path / "edit_of_a_recipe.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef edit(graph):\n    return graph\n"
    )
    (tmp_path / "r.yaml").write_text(
        "input: in.onnx\noutput: out.onnx\npasses:\n - graphsurgeon: {function: 'edit_of_a_recipe:edit'}\n"
    )
    result = run("pipeline", tmp_path / "r.yaml", *flags)
    assert (tmp_path / "ran").exists() == runs, result.err
    assert runs or (result.code == 2 and "--allow-code" in result.err and not (tmp_path / "out.onnx").exists())


def test_a_weight_survives_every_way_of_saving(tmp_path: Path) -> None:
    path = external(linear(tmp_path / "m.onnx"))
    succeed("legalize", path, tmp_path / "a" / "m.onnx", "--no-check")
    succeed("legalize", tmp_path / "a" / "m.onnx", tmp_path / "a" / "n.onnx", "--no-check")
    assert rel_l2(initializers(tmp_path / "a" / "n.onnx")["w"], W) == 0


def _make_and_remove(arguments: tuple[Path, int]) -> int:
    """How often what this process had made was gone while it used it."""
    folder, rounds = arguments
    lost = 0
    for _ in range(rounds):
        with OwnFolder("x-", folder) as own:
            try:
                (own / "f").write_text("mine")
                lost += (own / "f").read_text() != "mine"
            except OSError:
                lost += 1
        try:
            with replacing(folder / "same.txt") as tmp:
                tmp.write_text("whole")
        except (OSError, JobError):
            lost += 1
    return lost


def test_no_run_takes_what_another_has_just_made_for_a_leftover(tmp_path: Path) -> None:
    """Each removes leftovers first, in the moment between another's making and locking too."""
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_make_and_remove, [(tmp_path, 150)] * 4) == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["same.txt"]


def test_saving_into_a_folder_of_our_own_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is locked by this very process: to wait for that lock was to wait until the patience for others
    ended.
    """
    monkeypatch.setattr("onnxtools.storage.files._LOCK_SECONDS", 1e9)
    with OwnFolder("x-", tmp_path) as own:
        Model.load(linear(tmp_path / "m.onnx")).save(own / "copy.onnx", copy_weights=True)
        assert (own / "copy.onnx").is_file()
