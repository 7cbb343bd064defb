"""`quantize --attention`: scales come from what PyTorch's projections give, and attention still computes what it
did.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

pytest.importorskip("transformers")
import torch

from tests.calibration.texts import calibration_file, tokens
from tests.generation.models import exported, reference
from tests.passes.test_quantize import logits_error, quantized
from tests.support import fixture_path, present, refuse, succeed

Array = np.ndarray[Any, Any]


def projections() -> dict[str, Array]:
    """Outputs of q_proj, k_proj and v_proj of each layer over all calibration texts, [tokens, heads, head_dim]."""
    model, found = reference("llama"), dict[str, list[Array]]()
    hooks = []
    for layer, block in enumerate(model.model.layers):
        for kind in ("query", "key", "value"):
            module = getattr(block.self_attn, f"{kind[0]}_proj")
            keep = found.setdefault(f"{layer}.{kind}", [])
            hooks.append(
                module.register_forward_hook(lambda _m, _i, out, keep=keep: keep.append(out.detach().numpy()[0]))
            )
    with torch.no_grad():
        for text in tokens():
            model(torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    return {
        name: np.concatenate(parts).reshape(-1, parts[0].shape[-1] // model.config.head_dim, model.config.head_dim)
        for name, parts in found.items()
    }


def test_scales_cover_every_rotation(tmp_path: Path) -> None:
    """A rotation turns channel i into i + head_dim / 2, so the scale is of the pair's length; values are not
    rotated.
    """
    model = onnx.load(quantized(tmp_path, "--fp8", "--attention"))
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node}
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    seen = projections()
    assert len(attention) == 2
    for layer, node in enumerate(attention):
        for index, kind in enumerate(("query", "key", "value")):
            read = producers[node.input[index]]
            assert (read.op_type, producers[read.input[0]].op_type) == ("DequantizeLinear", "QuantizeLinear")
            x = seen[f"{layer}.{kind}"]
            half = x.shape[-1] // 2
            amax = np.abs(x).max() if kind == "value" else np.hypot(x[..., :half], x[..., half:]).max()
            np.testing.assert_allclose(values[read.input[1]], amax / 448, rtol=1e-5)


@pytest.mark.parametrize("flags", [(), ("--kv-cache", "fp8")])
@pytest.mark.parametrize(("name", "form"), [("llama", "concat"), ("llama", "scatter"), ("gpt2", "concat")])
def test_the_result_is_near(name: str, form: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    path = quantized(tmp_path, "--fp8", "--attention", *flags, name=name, form=form)
    assert 1e-4 < logits_error(path, name) < 0.2
    pairs = Counter(node.op_type for node in onnx.load(path).graph.node)["QuantizeLinear"]
    plain = Counter(
        node.op_type for node in onnx.load(quantized(tmp_path, "--fp8", *flags, name=name, form=form)).graph.node
    )["QuantizeLinear"]
    assert pairs - plain == (2 if flags else 6)  # keys and values of a quantized cache are FP8 already


def test_attention_of_matmul_and_softmax(tmp_path: Path) -> None:
    """TransformerEngine's export: probabilities lie between 0 and 1, so their scale is 1 / 448."""
    source = present(fixture_path("te_gpt_none_dyn"))
    succeed("convert", source, tmp_path / "m.onnx")
    feeds = np.load(source.with_suffix(".npz"))
    names = [value.name for value in onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.input]
    np.savez(tmp_path / "c.npz", **{name: feeds[name] for name in names})
    told = succeed(
        "quantize", tmp_path / "m.onnx", tmp_path / "q.onnx", "--fp8", "--attention", "--calib", tmp_path / "c.npz"
    ).out
    layers = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.node)[
        "Softmax"
    ]
    assert layers and re.search(rf"{4 * layers}: FP8 E4M3 attention", told)
    values = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    scales = [float(value) for name, value in values.items() if "probabilities" in name and name.endswith("_scale")]
    assert scales == pytest.approx([1 / 448] * len(scales), rel=1e-3) and scales


def test_refusals(tmp_path: Path) -> None:
    calib = calibration_file(tmp_path)
    assert "GroupQueryAttention takes no Q/DQ" in refuse(
        "quantize", exported("llama", "gqa"), tmp_path / "q.onnx", "--fp8", "--attention", "--calib", calib
    )
    assert "--attention is for FP8" in refuse(
        "quantize", exported("llama", "concat"), tmp_path / "q.onnx", "--int8", "--attention", "--calib", calib, code=2
    )
