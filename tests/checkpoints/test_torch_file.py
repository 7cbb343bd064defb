"""Pickles of torch.save: what torch writes is read; what a pickle could do besides holding data is refused, at once."""

from __future__ import annotations

import io
import pickle
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="the files are written by torch (make setup installs it)")
import torch

from onnxtools.base.errors import ModelError
from onnxtools.checkpoints.checkpoint import Region
from onnxtools.checkpoints.torch_file import loads, read_torch


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def test_what_torch_and_transformer_engine_write_is_read() -> None:
    """Modules' state dicts carry `_metadata` as a state; a BytesIO carries its bytes so."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    value = {
        "state": module.state_dict(), "extra": io.BytesIO(b"scales"), "ids": {0: [1, 2], (1, "a"): None},
        "size": torch.Size([4, 5]), "kind": torch.bfloat16,
        "ordered": OrderedDict(b=1, a=2), "bytes": b"\xff\x00", "parameter": torch.nn.Parameter(torch.arange(3.0)),
    }  # fmt: skip
    for protocol in (2, 3, 4, 5):
        found = loads(saved(value, pickle_protocol=protocol), "x")
        for name, tensor in module.state_dict().items():
            np.testing.assert_array_equal(found["state"][name].numpy(), tensor.numpy())
        assert (
            found["extra"].getvalue() == b"scales"
            and found["ids"] == {0: [1, 2], (1, "a"): None}
            and found["size"] == (4, 5)
        )
        assert (
            found["kind"] == ir.DataType.BFLOAT16
            and list(found["ordered"]) == ["b", "a"]
            and found["bytes"] == b"\xff\x00"
        )
        np.testing.assert_array_equal(found["parameter"].numpy(), [0, 1, 2])


def test_a_plain_pickle_of_a_tensor_is_read() -> None:
    found = loads(pickle.dumps({"scale_fwd": torch.arange(6.0).reshape(2, 3)}), "x")
    np.testing.assert_array_equal(found["scale_fwd"].numpy(), np.arange(6.0).reshape(2, 3))


# --- a pickle written by hand
# --------------------------------------------------------------------------------------------------

START = b"\x80\x02"


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def the(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


STATE = b"}(" + text("_location") + text("/etc/passwd") + text("_value_") + b"K\x07u"
SLOTS = b"N" + STATE + b"\x86"
OBJECTS = {
    "a type": the("torch", "float32"), "a kind of storage": the("torch", "FloatStorage"),
    "a function": the("torch._utils", "_rebuild_tensor_v2"),
    "a text": text("a"), "a list": b"]", "a plain dictionary": b"}",
    "a size": the("torch", "Size") + b"(K\x01K\x02t\x85R",
    "a buffer": the("_io", "BytesIO") + b")\x81",
}  # fmt: skip


@pytest.mark.parametrize("state", [STATE, SLOTS], ids=["attributes", "slots"])
@pytest.mark.parametrize("name", OBJECTS)
def test_nothing_takes_a_state(name: str, state: bytes) -> None:
    before = dict(vars(ir.DataType.FLOAT))
    with pytest.raises(ModelError, match="sets attributes"):
        loads(START + OBJECTS[name] + state + b"b.", "x")
    assert vars(ir.DataType.FLOAT) == before


def test_a_tensor_takes_no_state(tmp_path: Path) -> None:
    """Else it could be made to refer to any file of the machine."""
    archive = saved({"w": torch.zeros(4)})
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        content = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as target:
        for name, data in content.items():
            target.writestr(
                name, data.replace(b"Rq", b"R" + SLOTS + b"bq") if name.endswith("data.pkl") and b"Rq" in data else data
            )
    hostile = zipfile.ZipFile(tmp_path / "m.bin").read(next(name for name in content if name.endswith("data.pkl")))
    assert b"/etc/passwd" in hostile
    with pytest.raises(ModelError, match="sets attributes of a"):
        read_torch(Region.of(tmp_path / "m.bin"))


CALLS = {
    "old instances": b"(itorch\nSize\n.",
    "objects": b"(" + the("torch", "Size") + b"o.",
    "objects with keywords": the("torch", "Size") + b")}\x92.",
    "a number that is called": b"K\x05)R.",
    "a type that is called": the("torch", "float32") + b")R.",
    "code": the("builtins", "eval") + text("1") + b"\x85R.",
    "a method of a module": the("os", "getcwd") + b")R.",
    "an extension": b"\x82\x01.",
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_called_but_what_makes_tensors(name: str) -> None:
    with pytest.raises(ModelError):
        loads(START + CALLS[name], "x")


def doubled(levels: int) -> bytes:
    """A tuple of two, whose halves are one tuple of two, and so on: hashing it takes 2 ** levels steps."""
    return b")" + b"".join(b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86" for level in range(levels))


BOMBS: dict[str, Callable[[], bytes]] = {
    "nested keys": lambda: b"}" + b")" + b"\x85" * 300_000 + b"K\x01s.",
    "nested keys, many at once": lambda: b"}(" + b")" + b"\x85" * 300_000 + b"K\x01u.",
    "nested keys of a built dictionary": lambda: b"(" + b")" + b"\x85" * 300_000 + b"K\x01d.",
    "doubled keys": lambda: b"}" + doubled(60) + b"K\x01s.",
    "doubled keys of an ordered dictionary": lambda: the("collections",
        "OrderedDict") + b"(((" + doubled(60) + b"K\x01tttR.",
    "a set of doubled tuples": lambda: b"\x80\x04\x8f(" + doubled(60) + b"\x90.",
    "a frozen set of doubled tuples": lambda: b"\x80\x04(" + doubled(60) + b"\x91.",
    "claimed bytes": lambda: b"\x80\x05\x96" + (1 << 34).to_bytes(8, "little") + b".",
    "many operations": lambda: b"N0" * 3_000_000 + b"N.",
    "marks without end": lambda: b"(" * 20_000_000 + b".",
    "a doubled shape": lambda: the("torch._utils",
        "_rebuild_tensor_v2") + b"(NK\x00" + doubled(60) + doubled(60) + b"\x89Nt" + b"R.",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once(name: str) -> None:
    payload = BOMBS[name]()
    start = time.monotonic()
    with pytest.raises(ModelError) as error:
        loads(START + payload, "x")
    assert time.monotonic() - start < 10 and len(str(error.value)) < 300


def test_a_place_in_the_memo_costs_nothing() -> None:
    import tracemalloc

    tracemalloc.start()
    assert loads(START + b"}r" + (2**32 - 2).to_bytes(4, "little") + b".", "x") == {}
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_deep_lists_do_no_harm() -> None:
    assert isinstance(loads(START + b"]" * 200_000 + b"a" * 199_999 + b".", "x"), list)


def test_tensors_inside_tensors_are_not_followed() -> None:
    """Each level of a pickle in a pickle would copy all that is inside it."""
    stored = pickle.dumps(1) * 3 + pickle.dumps(torch.zeros(2))
    with pytest.raises(ModelError, match=r"wants torch\.storage\._load_from_bytes"):
        loads(
            START
            + the("torch.storage", "_load_from_bytes")
            + b"B"
            + len(stored).to_bytes(4, "little")
            + stored
            + b"\x85R.",
            "x",
        )


def test_an_archive_is_read_once_however_often_it_is_named() -> None:
    """A pickle that names one storage of 1 MB 2000 times."""
    tensor = torch.zeros(1 << 18)
    payload = saved([tensor[i : i + 1] for i in range(2000)])
    import tracemalloc

    tracemalloc.start()
    assert len(loads(payload, "x")) == 2000
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
