"""ONNX's own node tests: every pass that only rewrites a graph leaves their outputs as they were, or refuses by name.

A fourth of the 1,900 graphs, and all with Attention; ONNXTOOLS_ALL_NODES=1 takes them all (two minutes).
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import onnxtools
from onnxtools.base.errors import OnnxtoolsError
from onnxtools.ir.model import Model

Case = tuple[str, onnx.ModelProto, dict[str, Any], list[Any]]
PASSES: dict[str, dict[str, Any]] = {
    "cleanup": {}, "fold-constants": {}, "legalize": {}, "inline-functions": {}, "drop-stale-types": {}, "convert": {},
    "decompose-attention": {}, "lower-ort": {}, "set-opset": {"version": 24},
}  # fmt: skip
MASKED_ROWS = "nan_robustness"
"""Rows in which all is masked have no result that the parts of attention could be told to give."""


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)  # type: ignore[no-any-return]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if a is None or b is None:
        return a is b
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind not in "fc":
        return np.array_equal(a, b)
    tolerance = 2e-3 if a.dtype.itemsize == 2 else 1e-5
    return np.allclose(a, b, rtol=10 * tolerance, atol=tolerance, equal_nan=True)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """(name, model, inputs, outputs of ONNX Runtime) of the graphs that it runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        tests = load_model_tests(kind="node")
    found: list[Case] = []
    for index, test in enumerate(tests):
        if not os.environ.get("ONNXTOOLS_ALL_NODES") and index % 4 and "attention" not in test.name:
            continue
        feeds = {value.name: array for value, array in zip(test.model.graph.input, test.data_sets[0][0], strict=False)}
        try:
            found.append((test.name, test.model, feeds, run(test.model, feeds)))
        except Exception:  # operators and types that ONNX Runtime's CPU provider does not have
            continue
    return found


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_leaves_the_outputs_as_they_were(name: str, cases: list[Case]) -> None:
    assert len(cases) > 400
    changed, refused = [], 0
    for case, proto, feeds, before in cases:
        if name == "decompose-attention" and MASKED_ROWS in case:
            continue
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        model = Model(ir.from_proto(copy))
        try:
            onnxtools.PassManager([onnxtools.load_pass(name)(**PASSES[name])]).run(model)
        except OnnxtoolsError:
            refused += 1
            continue
        if not same(before, run(model.proto(), feeds)):
            changed.append(case)
    assert not changed
    assert refused < len(cases) / 4
