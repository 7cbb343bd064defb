"""`CacheSpec` finds what exporters and passes declare, and says it as onnxtools.json does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("transformers", reason="it makes the tiny checkpoint (make setup installs it)")

from onnxtools.analysis.cache import CacheSpec, is_past, is_present, kind_of, present_of, token_axis
from onnxtools.base.errors import JobError
from onnxtools.ir.model import Model
from tests.generation.models import exported
from tests.support import succeed

KV_HEADS, HEAD_DIM, LAYERS, POSITIONS = 2, 16, 2, 64
"""Of the tiny Llama, as its configuration says (tests/exporter/hf.py)."""


@pytest.mark.parametrize(("form", "length"), [("concat", None), ("scatter", POSITIONS), ("gqa", None)])
def test_what_export_declares_is_found(form: str, length: int | None) -> None:
    path = exported("llama", form)
    spec = CacheSpec.find(Model.load(path))
    assert spec is not None
    assert (spec.kind, spec.layers, spec.heads, spec.head_dim) == (form, LAYERS, KV_HEADS, HEAD_DIM)
    assert (spec.layout, spec.policy, spec.length, spec.dtype) == ("bnsh", "concat", length, ir.DataType.FLOAT)
    said = json.loads((path.parent / "onnxtools.json").read_text())["kv_cache"]
    assert {key: value for key, value in spec.to_json().items() if value != said[key]} == {}
    names = {f"{said['past']}".format(n=n, kind=kind) for n in range(LAYERS) for kind in ("key", "value")}
    assert {tensor.past for tensor in spec.tensors} == names
    slots = length or 5
    assert {array.shape for array in spec.feeds(3, 5).values()} == {(3, KV_HEADS, slots, HEAD_DIM)}


def test_what_add_kv_cache_declares_is_found(tmp_path: Path) -> None:
    out = tmp_path / "kv.onnx"
    succeed(
        "add-kv-cache",
        exported("llama", "none"),
        out,
        "--naming",
        "nemo",
        "--layout",
        "sbnh",
        "--policy",
        "new",
        "--dtype",
        "fp16",
        "--no-check",
    )
    spec = CacheSpec.find(Model.load(out))
    assert spec is not None
    assert (spec.kind, spec.policy, spec.layout, spec.layers, spec.dtype) == (
        "concat",
        "new",
        "sbnh",
        LAYERS,
        ir.DataType.FLOAT16,
    )
    assert spec.carried()[0][1] == "new_key_values.0.decoder.key"
    feeds = spec.feeds(3, 7)
    assert {(array.shape, array.dtype) for array in feeds.values()} == {
        ((7, 3, KV_HEADS, HEAD_DIM), np.dtype(np.float16))
    }


def test_a_graph_without_a_cache_has_none() -> None:
    assert CacheSpec.find(Model.load(exported("llama", "none"))) is None


def test_a_cache_that_nothing_carries_on_is_named() -> None:
    model = Model.load(exported("llama", "concat"))
    model.graph.outputs[:] = [value for value in model.graph.outputs if value.name != "present.1.value"]
    spec = CacheSpec.find(model)
    assert spec is not None
    with pytest.raises(JobError, match=r"past_key_values\.1\.value"):
        spec.carried()


def test_names() -> None:
    assert is_past("past_key_values.0.key") and not is_past("past_sequence_length") and not is_past(None)
    assert (
        is_present("present.0.key")
        and is_present("new_key_values.0.value")
        and not is_present("logits")
        and not is_present("presently")
    )
    assert kind_of("past_key_values.0.key") == "key" and kind_of("past_key_values.0.decoder.value") == "value"
    assert present_of("past_key_values.3.key", {"present.3.key"}) == ("present.3.key", False)
    assert present_of("past_key_values.3.key", {"new_key_values.3.key"}) == ("new_key_values.3.key", True)
    assert present_of("past_key_values.3.key", {"present.4.key"}) is None
    assert token_axis(["past_sequence", "batch", 2, 16]) == 0 and token_axis(["batch", 2, 64, 16]) == 2
