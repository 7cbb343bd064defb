"""`Model.load`: what it refuses, in one line that names the object; what it mends; that it reads no weight."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

from onnxtools.base.errors import ModelError
from onnxtools.ir.model import Model
from tests.support import Session, external, info, linear, normal, refuse, stored, succeed, write


def outside(
    path: Path, location: str, *, offset: int = 0, length: int | None = None, dims: tuple[int, int] = (64, 128)
) -> Path:
    """A linear model whose weight lies at `location`, as written (onnx's own saver would refuse some of these)."""
    linear(path)
    proto = onnx.load(path)
    tensor = proto.graph.initializer[0]
    data = tensor.raw_data
    set_external_data(tensor, location, offset=offset, length=length)
    tensor.ClearField("raw_data")
    del tensor.dims[:]
    tensor.dims.extend(dims)
    path.write_bytes(proto.SerializeToString())
    if not Path(location).is_absolute() and not (path.parent / location).exists():
        (path.parent / location).write_bytes(data)
    return path


def missing_data(folder: Path) -> Path:
    path = external(linear(folder / "in.onnx"))
    (folder / "weights.bin").unlink()
    return path


def short_data(folder: Path) -> Path:
    path = external(linear(folder / "in.onnx"))
    os.truncate(folder / "weights.bin", 1000)
    return path


def data_is_a_link(folder: Path) -> Path:
    path = external(linear(folder / "in.onnx"))
    (folder / "weights.bin").rename(folder / "real.bin")
    (folder / "weights.bin").symlink_to(folder / "real.bin")
    return path


def data_behind_a_linked_folder(folder: Path) -> Path:
    (folder / "real").mkdir()
    (folder / "data").symlink_to(folder / "real")
    return outside(folder / "in.onnx", "data/w.bin")


def data_is_a_folder(folder: Path) -> Path:
    path = missing_data(folder)
    (folder / "weights.bin").mkdir()
    return path


def content(data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "in.onnx").write_bytes(data)
        return folder / "in.onnx"

    return make


def truncated(folder: Path) -> Path:
    path = linear(folder / "in.onnx")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def a_folder(folder: Path) -> Path:
    (folder / "in.onnx").mkdir()
    return folder / "in.onnx"


def small(
    folder: Path, nodes: list[onnx.NodeProto], change: Callable[[onnx.ModelProto], object] = lambda proto: None
) -> Path:
    path = write(folder / "in.onnx", nodes, [info("x", [4])], [info("y", [4])], stored(k=np.ones(4, np.float32)))
    proto = onnx.load(path)
    change(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def node(op: str, inputs: str, output: str, name: str, domain: str = "") -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name, domain=domain)


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent": (lambda f: f / "absent.onnx", "no such file"),
    "a folder": (a_folder, "folder"),
    "empty": (content(b""), "not an ONNX"),
    "text": (content(b"this is no protobuf at all\n" * 20), "not an ONNX"),
    "a zip": (content(b"PK\x03\x04" + bytes(200)), "not an ONNX"),
    "random bytes": (content(np.random.default_rng(0).bytes(5000)), "not an ONNX"),
    "truncated": (truncated, "truncated"),
    "data missing": (missing_data, "missing"),
    "data short": (short_data, "truncated"),
    "data is a folder": (data_is_a_folder, "weights.bin"),
    "data above": (lambda f: outside((f / "sub").mkdir() or f / "sub" / "in.onnx", "../w.bin"),
        "leaves the model's folder"),  # type: ignore[func-returns-value]
    "data above through a folder": (lambda f: outside((f / "d").mkdir() or f / "in.onnx", "d/../../w.bin"),
        "leaves the model's folder"),  # type: ignore[func-returns-value]
    "data absolute": (lambda f: outside(f / "in.onnx", "/etc/hostname"), "leaves the model's folder"),
    "data is a link": (data_is_a_link, "symbolic link"),
    "data behind a linked folder": (data_behind_a_linked_folder, "symbolic link"),
    "data length does not fit": (lambda f: outside(f / "in.onnx", "w.bin", length=100), "100"),
    "data offset beyond the end": (lambda f: outside(f / "in.onnx", "w.bin", offset=1 << 40), "truncated"),
    "data shape beyond the file": (lambda f: outside(f / "in.onnx", "w.bin", dims=(64, 1 << 30)), "w.bin"),
    "unknown domain": (lambda f: small(f, [node("Mystery", "x", "y", "strange", "acme")]), "acme"),
    "value defined twice": (lambda f: small(f, [node("Neg", "x", "y", "a"), node("Abs", "x", "y", "b")]), "'y'"),
    "node output is an input": (lambda f: small(f, [node("Neg", "k", "x", "a"), node("Abs", "x", "y", "b")]), "'x'"),
    "node output is a weight": (lambda f: small(f, [node("Neg", "x", "k", "a"), node("Abs", "k", "y", "b")]), "'k'"),
    "input twice": (lambda f: small(f, [node("Neg", "x", "y", "a")], lambda p: p.graph.input.append(info("x", [4]))),
        "'x'"),
    "weight twice": (lambda f: small(f, [node("Add", "x k", "y", "a")],
        lambda p: p.graph.initializer.extend(stored(k=np.ones(4, np.float32)))), "'k'"),
    "a cycle": (lambda f: small(f,
        [node("Add", "x b", "a", "first"), node("Neg", "a", "b", "second"), node("Abs", "b", "y", "third")]), "cycle"),
    "a node that reads itself": (lambda f: small(f, [node("Add", "x y", "y", "first")]), "cycle"),
    "no opset": (lambda f: small(f, [node("Neg", "x", "y", "a")], lambda p: p.ClearField("opset_import")),
        "operator set"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("command", ["convert", "prune", "add-kv-cache"])
def test_bad_input_is_one_line_and_leaves_nothing(kind: str, command: str, tmp_path: Path) -> None:
    make, named = BAD[kind]
    path = make(tmp_path)
    (tmp_path / "result").mkdir()
    message = refuse(command, path, tmp_path / "result" / "out.onnx")
    assert (named in message and "in.onnx" in message) or "absent.onnx" in message
    assert not list((tmp_path / "result").iterdir())


@pytest.mark.parametrize("kind", BAD)
def test_inspect_and_validate_refuse_it_too(kind: str, tmp_path: Path) -> None:
    path = BAD[kind][0](tmp_path)
    refuse("inspect", path)
    refuse("validate", path, path)


@pytest.mark.parametrize(
    ("nodes", "named"),
    [([node("Add", "x ghost", "y", "a")], "ghost"), ([node("Neg", "x", "z", "a")], "'y'")],
    ids=["input", "output"],
)
def test_a_value_that_nothing_defines_is_named(nodes: list[onnx.NodeProto], named: str, tmp_path: Path) -> None:
    assert named in refuse("convert", small(tmp_path, nodes), tmp_path / "out.onnx")


def test_nodes_that_share_a_name_get_their_own(tmp_path: Path) -> None:
    path = small(
        tmp_path, [node("Neg", "x", "a", "same"), node("Abs", "a", "b", "same"), node("Neg", "b", "y", "same")]
    )
    result = succeed("cleanup", path, tmp_path / "out.onnx")
    assert "2 nodes shared a name" in result.out
    assert len({n.name for n in onnx.load(tmp_path / "out.onnx").graph.node}) == 3


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    path = small(tmp_path, [node("Abs", "a", "y", "second"), node("Neg", "x", "a", "first")])
    succeed("cleanup", path, tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    x = normal(4)
    assert np.array_equal(Session(tmp_path / "out.onnx")({"x": x})["y"], np.abs(x))


def test_a_cycle_names_a_node_on_it(tmp_path: Path) -> None:
    path = small(
        tmp_path,
        [
            node("Neg", "x", "q", "before"),
            node("Add", "q b", "a", "first"),
            node("Neg", "a", "b", "second"),
            node("Abs", "b", "y", "after"),
        ],
    )
    message = refuse("convert", path, tmp_path / "out.onnx")
    assert "'first'" in message or "'second'" in message


def test_loading_reads_no_weight(tmp_path: Path) -> None:
    """A data file with the right size and no right to read it."""
    path = external(linear(tmp_path / "in.onnx"))
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    model = Model.load(path)
    assert str(path) in opened and not [name for name in opened if name.endswith("weights.bin")]
    assert model.weight_bytes() == 64 * 128 * 4


def test_the_hash_is_of_the_graph_file(tmp_path: Path) -> None:
    path = linear(tmp_path / "in.onnx")
    assert Model.load(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_error_is_raised_in_python(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        Model.load(tmp_path / "absent.onnx")


def test_external_data_of_a_packed_type_loads(tmp_path: Path) -> None:
    tensor = helper.make_tensor("w", TensorProto.INT4, [7], b"\x21\x43\x65\x07", raw=True)
    path = external(
        write(
            tmp_path / "in.onnx",
            [helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)],
            [],
            [info("y", [7])],
            [tensor],
            opset=21,
        )
    )
    assert next(Model.load(path).external_tensors()).nbytes == 4
