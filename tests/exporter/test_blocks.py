"""`build_decoder` writes any tuple of blocks: norms before, after, around and beside, each block of its own sizes.

What they compute is known from transformers' attention, MLP and norm modules, put together by the formula of the
placement.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("transformers", reason="it is compared with (make setup installs it)")

import torch
import transformers
from transformers.models.llama import modeling_llama as llama

from onnxtools.exporter.config import Block, DecoderConfig, Mlp, Norm, SelfAttention
from onnxtools.exporter.decoder import build_decoder
from onnxtools.exporter.export_options import ExportOptions
from onnxtools.exporter.family import Weights
from onnxtools.exporter.rope import Rope
from onnxtools.exporter.weight_shapes import weight_shapes
from tests.exporter.driver import Driver

HIDDEN, VOCAB, POSITIONS, EPS = 48, 61, 32, 1e-5
IDS = np.array([[3, 9, 27, 4, 8, 11], [60, 1, 2, 33, 5, 7]])


def block(placement: Any, heads: int = 3, kv_heads: int = 1, size: int = 80) -> Block:
    attention = SelfAttention(heads, kv_heads, 16, 16**-0.5, rope=Rope(16, 10000.0))
    return Block(attention, Mlp(size, "silu", gated=True), Norm("rms_norm", EPS), placement)


def config(*blocks: Block) -> DecoderConfig:
    return DecoderConfig("llama", VOCAB, HIDDEN, POSITIONS, blocks, Norm("rms_norm", EPS), tie_word_embeddings=False)


def weights(c: DecoderConfig) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(11)
    return {
        name: generator.normal(1.0 if len(shape) == 1 else 0.0, 0.2, shape).astype(np.float32)
        for name, shape in weight_shapes(c).items()
    }


def expected(c: DecoderConfig, w: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Logits [batch, sequence, vocabulary]."""
    t = {name: torch.from_numpy(array) for name, array in w.items()}
    x = t["model.embed_tokens.weight"][torch.from_numpy(IDS)]
    places = torch.arange(IDS.shape[1])[None]
    hidden = torch.triu(torch.full((IDS.shape[1], IDS.shape[1]), -torch.inf), 1)[None, None]
    for n, b in enumerate(c.blocks):
        settings = transformers.LlamaConfig(
            hidden_size=HIDDEN, num_attention_heads=b.attention.heads, num_key_value_heads=b.attention.kv_heads,
            head_dim=16,
            intermediate_size=b.mlp.size, rms_norm_eps=EPS, attn_implementation="eager",
        )  # fmt: skip
        own = {
            name.removeprefix(f"model.layers.{n}."): tensor
            for name, tensor in t.items()
            if name.startswith(f"model.layers.{n}.")
        }
        attention, mlp = llama.LlamaAttention(settings, 0).eval(), llama.LlamaMLP(settings).eval()
        attention.load_state_dict(
            {name.removeprefix("self_attn."): v for name, v in own.items() if name.startswith("self_attn.")}
        )
        mlp.load_state_dict({name.removeprefix("mlp."): v for name, v in own.items() if name.startswith("mlp.")})
        rotation = llama.LlamaRotaryEmbedding(settings)(x, places)

        def attend(y: Any, attention: Any = attention, rotation: Any = rotation) -> Any:
            return attention(y, position_embeddings=rotation, attention_mask=hidden)[0]

        def norm(name: str, y: Any, own: Any = own) -> Any:
            made = llama.LlamaRMSNorm(HIDDEN, EPS)
            made.weight.data = own[f"{name}.weight"]
            return made(y)

        if b.placement == "pre":
            x = x + attend(norm("input_layernorm", x))
            x = x + mlp(norm("post_attention_layernorm", x))
        elif b.placement == "parallel":
            x = x + attend(norm("input_layernorm", x)) + mlp(norm("post_attention_layernorm", x))
        elif b.placement == "post":
            x = x + norm("post_attention_layernorm", attend(x))
            x = x + norm("post_feedforward_layernorm", mlp(x))
        else:
            x = x + norm("post_attention_layernorm", attend(norm("input_layernorm", x)))
            x = x + norm("post_feedforward_layernorm", mlp(norm("pre_feedforward_layernorm", x)))
    last = llama.LlamaRMSNorm(HIDDEN, EPS)
    last.weight.data = t["model.norm.weight"]
    return (last(x) @ t["lm_head.weight"].T).detach().numpy()  # type: ignore[no-any-return]


STACKS = {
    "post": ("post", "post"), "sandwich": ("sandwich", "sandwich"), "parallel": ("parallel", "parallel"),
    "all kinds": ("pre", "post", "sandwich", "parallel", "pre"), "post first and last": ("post", "pre", "post"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["none", "concat", "scatter", "gqa"])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_norms_stand_where_the_block_says(stack: tuple[str, ...], form: Any, tmp_path: Path) -> None:
    c = config(*map(block, stack))
    arrays = weights(c)
    tensors = {name: ir.Tensor(array, name=name) for name, array in arrays.items()}
    build_decoder(c, ExportOptions(kv_cache=form), Weights(tensors), ir.DataType.FLOAT).save(tmp_path / "m.onnx")
    want = expected(c, arrays)
    driver = Driver(tmp_path / "m.onnx", form, np.ones_like(IDS))
    np.testing.assert_allclose(driver.step(IDS[:, :4]), want[:, :4], atol=2e-4)
    if form != "none":
        np.testing.assert_allclose(driver.step(IDS[:, 4:5]), want[:, 4:5], atol=2e-4)


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_the_last_logits_alone(stack: tuple[str, ...], tmp_path: Path) -> None:
    c = config(*map(block, stack))
    arrays = weights(c)
    tensors = {name: ir.Tensor(array, name=name) for name, array in arrays.items()}
    build_decoder(c, ExportOptions(kv_cache="none", logits="last"), Weights(tensors), ir.DataType.FLOAT).save(
        tmp_path / "m.onnx"
    )
    found = Driver(tmp_path / "m.onnx", "none", np.ones_like(IDS)).step(IDS)
    np.testing.assert_allclose(found[:, -1], expected(c, arrays)[:, -1], atol=2e-4)


@pytest.mark.parametrize("form", ["none", "concat"])
def test_each_block_has_its_own_sizes(form: Any, tmp_path: Path) -> None:
    c = config(block("pre"), block("pre", heads=4, kv_heads=2, size=96), block("pre", heads=2, kv_heads=2, size=64))
    arrays = weights(c)
    tensors = {name: ir.Tensor(array, name=name) for name, array in arrays.items()}
    build_decoder(c, ExportOptions(kv_cache=form), Weights(tensors), ir.DataType.FLOAT).save(tmp_path / "m.onnx")
    found = Driver(tmp_path / "m.onnx", form, np.ones_like(IDS)).step(IDS)
    np.testing.assert_allclose(found, expected(c, arrays), atol=2e-4)
    assert len(c.to_json()["blocks"]) == 3 and "blocks" not in config(block("pre"), block("pre")).to_json()
