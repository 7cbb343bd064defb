"""Folding a factor into what makes an activation changes no output, in every family and form of the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("transformers")

from onnxtools.analysis.facts import analyse
from onnxtools.analysis.products import weight_products
from onnxtools.ir.model import Model
from onnxtools.numerics.formats import scaled
from onnxtools.passes.quantize.groups import group
from onnxtools.passes.selection import head_product
from tests.exporter import hf
from tests.generation.models import exported, reference
from tests.support import Session, rel_l2


def run(path: Path) -> np.ndarray:
    ids = np.random.default_rng(2).integers(0, 97, (2, 9))
    session = Session(path)
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones((2, 9), np.int64),
        "position_ids": np.arange(9)[None].repeat(2, axis=0),
    }
    for name, value in session.inputs.items():
        if name.startswith("past"):
            shape = [
                2 if d.dim_param == "batch" else 0 if d.dim_param else d.dim_value
                for d in value.type.tensor_type.shape.dim
            ]
            feeds[name] = np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        elif name == "write_indices":
            feeds[name] = np.zeros(2, np.int64)
    if "write_indices" in feeds:
        feeds["attention_mask"] = np.ones((2, 64), np.int64)
    return session(feeds)["logits"]


@pytest.mark.parametrize("form", ["concat", "scatter", "gqa", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "nemotron", "llama_tied_biased"])
def test_a_fold_changes_nothing(name: str, form: str, tmp_path: Path) -> None:
    model = Model.load(exported(name, form))
    head = head_product(model)
    groups = group(model, [p for p in weight_products(model) if p.node is not head], analyse(model))
    generator = np.random.default_rng(4)
    for g in groups:
        if g.fold is not None:
            factors = g.fold.tied(generator.uniform(0.25, 4, g.channels))
            g.fold.apply(factors)
            for product in g.products:
                product.weight.const_value = scaled(product.tensor, factors, product.axis)
    found = [g.fold.kind for g in groups if g.fold is not None]
    assert found.count("norm") == 4
    if name.startswith("llama"):  # behind the gate, and behind attention where values have a product of their own
        assert found.count("product") == (2 if form == "gqa" else 4)
    model.save(tmp_path / "m.onnx")
    ids = np.random.default_rng(2).integers(0, 97, (2, 9))
    assert rel_l2(run(tmp_path / "m.onnx"), hf.logits(reference(name), ids, np.ones((2, 9), np.int64))) < 2e-5
