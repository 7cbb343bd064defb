"""What calibration sees equals what PyTorch's forward hooks see, segment by segment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch

from onnxtools.base.errors import JobError
from onnxtools.calibration.calibration_options import Calibrated
from onnxtools.calibration.run import Calibration, Findings, Layer
from onnxtools.calibration.segments import segments
from onnxtools.calibration.statistics import ChannelRange, Gram
from onnxtools.ir.model import Model
from onnxtools.passes.precision import Precision
from tests.calibration.texts import calibration_file, tokens
from tests.generation.models import FORMS, exported, reference

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"}


@dataclass(frozen=True)
class Look(Calibrated):
    name = "look"


def by_hooks(model: Any, texts: list[list[int]]) -> dict[str, np.ndarray]:
    """All inputs of every linear layer, [tokens, channels]."""
    seen: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] in LINEAR:
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach()[0].numpy())
            )
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([text]))
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def calibrated(path: Path, options: Look, kind: type) -> dict[str, Any]:
    """Observers by weight."""
    model, found = Model.load(path), {}

    def look(layer: Layer) -> Findings:
        seen = {product.activation: (kind(),) for product in layer.products}
        layer.observe(seen)
        found.update({(p.weight.name or "").removesuffix(".weight"): seen[p.activation][0] for p in layer.products})
        return {}

    with Calibration(model, options) as calibration:
        list(calibration.findings(look))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_ranges_equal_those_of_forward_hooks(form: str, tmp_path: Path) -> None:
    expected = by_hooks(reference("llama"), tokens())
    found = calibrated(exported("llama", form), Look(calib=str(calibration_file(tmp_path))), ChannelRange)
    names = {name: name for name in expected}
    if form == "gqa":  # one product for q, k and v
        names = {name: name for name in expected if name.split(".")[-1] not in ("q_proj", "k_proj", "v_proj")}
    assert set(names) <= set(found)
    for name in names:
        np.testing.assert_allclose(found[name].amax, np.abs(expected[name]).max(axis=0), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(found[name].mean, np.abs(expected[name]).mean(axis=0), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(
            found[name].mean_square, np.square(expected[name]).mean(axis=0), rtol=5e-5, atol=1e-6
        )


def test_gram_matrices_equal_those_of_forward_hooks(tmp_path: Path) -> None:
    expected = by_hooks(reference("llama"), tokens())
    found = calibrated(exported("llama", "concat"), Look(calib=str(calibration_file(tmp_path))), Gram)
    for name, x in expected.items():
        x = x / np.linalg.norm(x, axis=1, keepdims=True)  # tokens count alike
        np.testing.assert_allclose(found[name].value, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_narrow_models_are_calibrated_in_fp32(dtype: str, tmp_path: Path) -> None:
    """Within the rounding of the weights."""
    model = Model.load(exported("llama", "concat"))
    Precision(to=dtype).apply(model)
    model.save(tmp_path / "m.onnx")
    expected = by_hooks(reference("llama"), tokens())
    found = calibrated(tmp_path / "m.onnx", Look(calib=str(calibration_file(tmp_path))), ChannelRange)
    error = {"fp16": 0.01, "bf16": 0.1}[dtype]
    for weight, observer in found.items():
        name = weight.removesuffix(f".weight_{'float16' if dtype == 'fp16' else 'bfloat16'}")
        if name == "lm_head":
            continue  # its input is not hooked
        assert np.abs(observer.amax - np.abs(expected[name]).max(axis=0)).max() <= error * np.abs(expected[name]).max()


@pytest.mark.parametrize("form", FORMS)
def test_segments_hold_every_product_once_and_hand_on_little(form: str) -> None:
    made = segments(Model.load(exported("llama", form)))
    nodes = [product.node for segment in made for product in segment.products]
    assert len(nodes) == len(set(nodes)) == {"gqa": 5}.get(form, 7) * 2 + 1
    for segment in made:
        assert not {p.activation for p in segment.products} & {
            p.activation for other in made if other is not segment for p in other.products
        }
    if form != "gqa":
        assert len(made) == 5 and all(len(segment.kept) == 1 for segment in made[:-1])


def test_a_stopped_run_goes_on_with_what_it_has(tmp_path: Path) -> None:
    options = Look(calib=str(calibration_file(tmp_path)), calib_cache=str(tmp_path / "cache"))
    model, seen = Model.load(exported("llama", "concat")), list[int]()

    def look(layer: Layer) -> Findings:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(layer.products))
        layer.observe({})
        return {"n": np.array(len(seen))}

    with pytest.raises(KeyboardInterrupt), Calibration(model, options) as calibration:
        list(calibration.findings(look))
    seen[:] = []
    with Calibration(model, options) as calibration:
        found = [int(found["n"]) for _, found in calibration.findings(look)]
    assert found == [1, 2, 3, 1, 2] and len(seen) == 2  # three remembered, two looked at


def test_a_folder_with_other_files_is_not_taken_as_cache(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    options = Look(calib=str(calibration_file(tmp_path)), calib_cache=str(tmp_path / "mine"))
    with (
        pytest.raises(JobError, match="holds other files"),
        Calibration(Model.load(exported("llama", "concat")), options),
    ):
        pass
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
