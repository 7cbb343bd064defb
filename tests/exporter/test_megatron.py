"""NeMo checkpoints of real megatron-core models: every spelling of names, shards, activations, and FP8 scales."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="the references are megatron-core's own models (make setup installs it)")
import torch

from fixtures import megatron as m
from onnxtools.exporter.export import export
from onnxtools.exporter.export_options import ExportOptions
from tests.exporter.driver import decode
from tests.support import Array, ops, rel_l2

IDS = np.random.default_rng(5).integers(0, 256, (2, 18))
MASK = np.ones_like(IDS)
SPLITS = (10, 1, 1, 1, 1, 1, 1, 1, 1)


@cache
def model(name: str) -> tuple[Any, dict[str, Any], Array]:
    made = m.build(m.CASES[name])
    return made, m.state_dict(made, m.CASES[name]), m.logits(made, IDS)


def exported(source: Path, folder: Path, **options: Any) -> Array:
    kind = options.setdefault("kv_cache", "concat")
    export(source, folder / "m.onnx", ExportOptions(**options))
    return decode(folder / "m.onnx", kind, IDS, MASK, SPLITS)


@pytest.mark.parametrize("kind", ["none", "concat", "scatter"])
@pytest.mark.parametrize("name", sorted(m.CASES))
def test_core_names(name: str, kind: str, tmp_path: Path) -> None:
    _, state, expected = model(name)
    source = m.write_nemo(tmp_path / "m.nemo", m.model_config(m.CASES[name]), state)
    assert np.abs(exported(source, tmp_path, kv_cache=kind) - expected).max() <= 1e-4


Spelling = Callable[[dict[str, Any], m.Case], dict[str, Any]]
SPELLINGS: dict[str, tuple[Spelling, dict[str, Any], tuple[str, ...]]] = {
    # what is done to the state, what the configuration then says, the cases that can be spelt so
    "TransformerEngine's norms": (lambda s, c: m.te_norm_names(s), {}, ("gpt", "gpt_next", "nemotron")),
    "legacy": (m.legacy, {"mcore_gpt": False}, ("gpt", "gpt_erf", "gpt_next")),
    "legacy with TransformerEngine": (m.legacy_te, {"mcore_gpt": False, "transformer_engine": True},
        ("gpt", "gpt_next")),
    "megatron_legacy rows": (m.megatron_legacy_qkv, {"megatron_legacy": True}, ("gpt", "gpt_next")),
    "NeMo 2's prefix": (lambda s, c: {f"module.{name.removeprefix('model.')}": value for name, value in s.items()}, {},
        ("gpt",)),
    "two gate weights": (lambda s, c: m.legacy(s, c, split_gate=True), {"mcore_gpt": False, "activation": "swiglu"},
        ("gpt_next",)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("spelling", "name"), [(spelling, name) for spelling, (_, _, names) in SPELLINGS.items() for name in names]
)
def test_other_spellings(spelling: str, name: str, tmp_path: Path) -> None:
    _, state, expected = model(name)
    change, says, _ = SPELLINGS[spelling]
    source = m.write_nemo(tmp_path / "m.nemo", m.model_config(m.CASES[name], **says), change(state, m.CASES[name]))
    assert np.abs(exported(source, tmp_path) - expected).max() <= 1e-4


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", ["gpt", "gpt_next", "nemotron"])
def test_shards_are_merged(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    _, state, expected = model(name)
    source = m.write_nemo(tmp_path / "m.nemo", m.model_config(m.CASES[name]), state, tp=tp, pp=pp)
    assert np.abs(exported(source, tmp_path) - expected).max() <= 1e-4


def test_swiglu_of_core_is_gated_shard_by_shard_without_the_word_fast(tmp_path: Path) -> None:
    _, state, expected = model("gpt_next")
    source = m.write_nemo(tmp_path / "m.nemo", m.model_config(m.CASES["gpt_next"], activation="swiglu"), state, tp=2)
    assert np.abs(exported(source, tmp_path) - expected).max() <= 1e-4


def test_megatron_legacy_rows_are_ordered_within_each_shard(tmp_path: Path) -> None:
    _, state, expected = model("gpt")
    source = m.write_nemo(
        tmp_path / "m.nemo",
        m.model_config(m.CASES["gpt"], megatron_legacy=True),
        m.megatron_legacy_qkv(state, m.CASES["gpt"]),
        tp=2,
    )
    assert np.abs(exported(source, tmp_path) - expected).max() <= 1e-4


@pytest.mark.parametrize("change", [m.legacy, m.legacy_te])
def test_legacy_shards(change: Spelling, tmp_path: Path) -> None:
    _, state, expected = model("gpt_next")
    config = m.model_config(m.CASES["gpt_next"], mcore_gpt=False, transformer_engine=change is m.legacy_te)
    source = m.write_nemo(tmp_path / "m.nemo", config, change(state, m.CASES["gpt_next"]), tp=2)
    assert np.abs(exported(source, tmp_path) - expected).max() <= 1e-4


def test_forms_of_a_checkpoint(tmp_path: Path) -> None:
    """gzip-compressed, unpacked, and Lightning's .ckpt hold the same model; tokenizer files go beside the output."""
    _, state, expected = model("gpt")
    config = m.model_config(m.CASES["gpt"])
    files = {f"{'0' * 31}a_vocab.json": b"{}"}
    sources = [
        m.write_nemo(tmp_path / "z.nemo", config, state, gz=True, files=files),
        m.write_nemo(tmp_path / "folder", config, state, folder=True),
        m.write_ckpt(tmp_path / "m.ckpt", config, state),
    ]
    for index, source in enumerate(sources):
        out = tmp_path / f"out{index}"
        out.mkdir()
        assert np.abs(exported(source, out) - expected).max() <= 1e-4
    assert (tmp_path / "out0" / "vocab.json").read_bytes() == b"{}"


def test_bf16_weights_are_kept_bit_for_bit(tmp_path: Path) -> None:
    made, state, _ = model("gpt_next")
    source = m.write_nemo(tmp_path / "m.nemo", m.model_config(m.CASES["gpt_next"]), state, dtype=torch.bfloat16)
    rounded = {name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()}
    expected = m.logits(m.load(made, m.CASES["gpt_next"], rounded), IDS)
    m.load(made, m.CASES["gpt_next"], state)
    assert np.abs(exported(source, tmp_path, dtype="fp32") - expected).max() <= 1e-4


# --- FP8 --------------------------------------------------------------------------------------------------------------


def fake_fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """What TransformerEngine's cast does: times scale_fwd, saturate, round to E4M3, and back."""
    return (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale


def fp8_logits(name: str, scales: dict[str, tuple[float, float]]) -> Array:
    """megatron-core's model with inputs and weights of its linear layers through FP8."""
    made, state, _ = model(name)
    hooks = []
    with torch.no_grad():
        for module_name, module in made.named_modules():
            pair = next((pair for part, pair in scales.items() if module_name.endswith(part)), None)
            if pair is not None:
                module.weight.copy_(fake_fp8(module.weight, pair[1]))
                hooks.append(
                    module.register_forward_pre_hook(
                        lambda _, inputs, scale=pair[0]: (fake_fp8(inputs[0], scale), *inputs[1:])
                    )
                )
    found = m.logits(made, IDS)
    for hook in hooks:
        hook.remove()
    m.load(made, m.CASES[name], state)
    return found


@pytest.mark.parametrize("kind", ["bytes", "uint8"])
@pytest.mark.parametrize("spelling", ["core", "legacy"])
def test_fp8_scales_become_quantize_and_dequantize(spelling: str, kind: Any, tmp_path: Path) -> None:
    """TransformerEngine's extra state; LayerNormMLP holds the scales of both its products."""
    _, state, plain = model("gpt")
    scales = {
        "linear_qkv": (100.0, 400.0),
        "linear_proj": (130.0, 350.0),
        "linear_fc1": (90.0, 420.0),
        "linear_fc2": (60.0, 300.0),
    }
    state = m.te_norm_names(state) if spelling == "core" else m.legacy_te(state, m.CASES["gpt"])
    for n in range(2):
        layer = f"model.decoder.layers.{n}" if spelling == "core" else f"model.language_model.encoder.layers.{n}"
        if spelling == "core":
            modules = {
                f"{'self_attention' if 'fc' not in part else 'mlp'}.{part}": [*pair, 1.0]
                for part, pair in scales.items()
            }
        else:
            modules = {
                "self_attention.layernorm_qkv": [*scales["linear_qkv"], 1.0],
                "self_attention.proj": [*scales["linear_proj"], 1.0],
                "layernorm_mlp": [*scales["linear_fc1"], 1.0, *scales["linear_fc2"], 1.0],
            }  # fmt: skip
        state |= {f"{layer}.{module}._extra_state": m.extra_state(kind, values) for module, values in modules.items()}
    source = m.write_nemo(
        tmp_path / "m.nemo",
        m.model_config(m.CASES["gpt"], transformer_engine=True, fp8=True, mcore_gpt=spelling == "core"),
        state,
    )
    expected = fp8_logits("gpt", scales)
    found = exported(source, tmp_path)
    assert rel_l2(found, expected) <= 2e-3 < 1e-2 < rel_l2(plain, expected)
    assert ops(tmp_path / "m.onnx").count("QuantizeLinear") == 2 * 4


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    from tests.support import refuse

    _, state, _ = model("gpt")
    bad = {"position_embedding_type": "alibi", "activation": "mish", "normalization": "scalenorm",
        "transformer_block_type": "post_ln", "num_moe_experts": 8,
           "rotary_interleaved": True}  # fmt: skip
    for key, value in bad.items():
        source = m.write_nemo(tmp_path / f"{key}.nemo", m.model_config(m.CASES["gpt"], **{key: value}), state)
        assert str(value) in refuse("export", source, "-o", tmp_path / "m.onnx")
    for name, member, words in (
        ("new", "weights/x.distcp", "NeMo 2"),
        ("dist", "model_weights/metadata.json", "distributed checkpoint"),
    ):
        folder = tmp_path / name
        (folder / member).parent.mkdir(parents=True)
        (folder / member).write_bytes(b"{}")
        if name == "dist":
            (folder / "model_config.yaml").write_text("num_layers: 2")
        assert words in refuse("export", folder, "-o", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    from tests.support import refuse

    _, state, _ = model("gpt")
    folder = m.write_nemo(tmp_path / "m", m.model_config(m.CASES["gpt"]), state, tp=2, pp=2, folder=True)
    (folder / "tp_rank_01_pp_rank_000" / "model_weights.ckpt").unlink()
    assert "the shard of pipeline rank 0, tensor rank 1 is missing" in refuse(
        "export", folder, "-o", tmp_path / "m.onnx"
    )
