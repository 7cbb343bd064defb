"""Folding a factor into what makes an activation changes no output, in every family and form of the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

pytest.importorskip("transformers")

from onnxtools.analysis.facts import analyse
from onnxtools.analysis.products import weight_products
from onnxtools.ir.model import Model
from onnxtools.numerics.formats import scaled
from onnxtools.passes.quantize.folding import Fold, Folder
from onnxtools.passes.quantize.groups import group
from onnxtools.passes.selection import head_product
from tests.exporter import hf
from tests.generation.models import exported, reference
from tests.support import Session, info, normal, rel_l2, stored, write


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


def test_channels_that_share_a_producer_get_their_geometric_mean() -> None:
    """Two query heads of one KV head: channels 0 and 2 are fed by the producer's channel 0, 1 and 3 by channel 1."""
    fold = Fold((), "product", (0, 1, 0, 1))
    factors = np.array([0.5, 3.0, 8.0, 12.0])
    assert fold.tied(factors) == pytest.approx([2, 6, 2, 6])
    assert fold.producers(np.array([2.0, 6.0, 2.0, 6.0])) == pytest.approx([2, 6])
    alone = Fold((), "norm")
    assert alone.tied(factors) is factors and alone.producers(factors) is factors


def test_a_fold_divides_rows_or_columns_of_its_weights(tmp_path: Path) -> None:
    weight, gain = normal(3, 4, seed=1), normal(4, seed=2)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Mul", ["h", "g"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, [info("x", ["n", 3])], [info("y", ["n", 4])], stored(w=weight, g=gain))
    values = Model.load(path).graph.initializers
    factors = np.array([0.25, 0.75, 2.0, 5.0])
    Fold(((values["w"], 1), (values["g"], 0)), "product").apply(factors)
    assert values["w"].const_value.numpy() == pytest.approx(weight / factors[None, :], rel=1e-6)  # type: ignore[union-attr]
    assert values["g"].const_value.numpy() == pytest.approx(gain / factors, rel=1e-6)  # type: ignore[union-attr]


FOLDABLE = {
    "relu": ([helper.make_node("Relu", ["h"], ["a"])], True),
    "a gate": ([helper.make_node("Mul", ["h", "gate"], ["a"])], True),
    "gelu": ([helper.make_node("Gelu", ["h"], ["a"])], False),
    "a sum": ([helper.make_node("Add", ["h", "gate"], ["a"])], False),
    "softmax": ([helper.make_node("Softmax", ["h"], ["a"])], False),
}
"""Between two products: f(s h) = s f(h) for each channel, or not."""


@pytest.mark.parametrize("name", FOLDABLE)
def test_only_what_lets_a_factor_pass_is_folded_through(name: str, tmp_path: Path) -> None:
    between, passes = FOLDABLE[name]
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["h"], name="up"), *between,
        helper.make_node("MatMul", ["a", "down"], ["y"], name="down"),
    ]  # fmt: skip
    weights = stored(up=normal(8, 16, seed=3), down=normal(16, 4, seed=4))
    inputs = [info("x", ["n", 8]), info("gate", ["n", 16])]
    path = write(tmp_path / "m.onnx", nodes, inputs, [info("y", ["n", 4])], weights, opset=20)
    model = Model.load(path)
    products = list(weight_products(model))
    last = next(product for product in products if product.node.name == "down")
    fold = Folder(analyse(model), products).find(last.node.inputs[0], [last.node])  # type: ignore[arg-type]
    assert (fold is not None) == passes
    if fold is None:
        return
    factors = np.geomspace(0.3, 3, 16)
    fold.apply(fold.tied(factors))
    last.weight.const_value = scaled(last.tensor, factors, last.axis)
    feeds = {"x": normal(5, 8, seed=5), "gate": normal(5, 16, seed=6)}
    used = {name: feeds[name] for name in Session(path).inputs}
    expected = Session(path)(used)["y"]
    model.save(tmp_path / "o.onnx")
    assert rel_l2(Session(tmp_path / "o.onnx")(used)["y"], expected) < 1e-6
