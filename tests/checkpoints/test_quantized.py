"""Checkpoints that are quantized already, packed here as their tools document it: logits of the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

pytest.importorskip("transformers", reason="the checkpoints are written by transformers (make setup installs it)")

import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from tests.exporter import hf
from tests.exporter.driver import decode
from tests.support import ops, refuse, succeed

Array = np.ndarray[Any, Any]
Parts = dict[str, Array]
IDS, MASK = np.random.default_rng(3).integers(3, 97, (2, 12)), np.ones((2, 12), np.int64)
GROUP = 32
E4M3 = ml_dtypes.float8_e4m3fn


# --- packers: weight [out, in] -> the parts that a tool stores, and the numbers that they mean -----------------------


def fp8(w: Array, scale: Array) -> Array:
    return np.clip(w / scale, -448, 448).astype(E4M3)


def fp8_tensor(w: Array) -> tuple[Parts, Array]:
    """modelopt and compressed-tensors: one scale a weight, and one for the activation."""
    scale = np.array(np.abs(w).max() / 448, np.float32)
    codes = fp8(w, scale)
    parts = {"weight": codes, "weight_scale": scale.reshape(1), "input_scale": np.array([0.05], np.float32)}
    return parts, codes.astype(np.float32) * scale


def fp8_channel(w: Array) -> tuple[Parts, Array]:
    """compressed-tensors: one scale an output, activations by token."""
    scale = (np.abs(w).max(axis=1, keepdims=True) / 448).astype(np.float32)
    codes = fp8(w, scale)
    return {"weight": codes, "weight_scale": scale}, codes.astype(np.float32) * scale


def fp8_block(w: Array) -> tuple[Parts, Array]:
    """DeepSeek: blocks of 32 x 16 (128 x 128 there); the scale is called the inverse of what it is."""
    high, wide = 32, 16
    rows, columns = -(-w.shape[0] // high), w.shape[1] // wide
    padded = np.pad(w, ((0, rows * high - w.shape[0]), (0, 0)))
    amax = np.abs(padded.reshape(rows, high, columns, wide)).max(axis=(1, 3))
    scale = (amax / 448).astype(np.float32)
    whole = np.repeat(np.repeat(scale, high, axis=0), wide, axis=1)[: w.shape[0]]
    codes = fp8(w, whole)
    return {"weight": codes, "weight_scale_inv": scale}, codes.astype(np.float32) * whole


def int8_channel(w: Array) -> tuple[Parts, Array]:
    scale = (np.abs(w).max(axis=1, keepdims=True) / 127).astype(np.float32)
    codes = np.rint(w / scale).astype(np.int8)
    return {"weight": codes, "weight_scale": scale}, codes * scale


def grouped(w: Array, *, symmetric: bool, index: Array | None = None) -> tuple[Array, Array, Array, Array]:
    """Codes 0..15 [out, in], scales and zero points [out, groups], numbers; `index` is the group of an input."""
    index = np.arange(w.shape[1]) // GROUP if index is None else index
    groups = int(index.max()) + 1
    low = np.stack([w[:, index == g].min(axis=1) for g in range(groups)], axis=1)
    high = np.stack([w[:, index == g].max(axis=1) for g in range(groups)], axis=1)
    if symmetric:
        scale, zero = np.maximum(-low, high) / 7, np.full(low.shape, 8)
    else:
        scale = (high - low) / 15
        zero = np.clip(np.rint(-low / scale), 1, 15).astype(int)
    scale = scale.astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(w / scale[:, index]) + zero[:, index], 0, 15).astype(np.int64)
    return codes, scale, zero, ((codes - zero[:, index]) * scale[:, index]).astype(np.float32)


def words(codes: Array, order: tuple[int, ...] = tuple(range(8))) -> Array:
    """Eight codes of the last axis in an int32; nibble i holds code order[i]."""
    eight = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint32)
    packed = np.zeros(eight.shape[:-1], np.uint32)
    for nibble, place in enumerate(order):
        packed |= eight[..., place] << np.uint32(4 * nibble)
    return packed.view(np.int32)


def awq(w: Array, symmetric: bool = False) -> tuple[Parts, Array]:
    codes, scale, zero, numbers = grouped(w, symmetric=symmetric)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {"qweight": words(codes.T, order), "qzeros": words(zero.T, order), "scales": scale.T.astype(np.float16)}
    return parts, numbers


def gptq(w: Array, *, act_order: bool = False, symmetric: bool = True) -> tuple[Parts, Array]:
    index = np.arange(w.shape[1]) // GROUP
    index = np.random.default_rng(4).permutation(index) if act_order else index
    codes, scale, zero, numbers = grouped(w, symmetric=symmetric, index=index)
    parts = {
        "qweight": np.ascontiguousarray(words(codes).T), "qzeros": words(zero.T - 1),
        "scales": scale.T.astype(np.float16), "g_idx": index.astype(np.int32),
    }  # fmt: skip
    return parts, numbers


def packed(w: Array, *, symmetric: bool = True, act_order: bool = False) -> tuple[Parts, Array]:
    """compressed-tensors, pack-quantized."""
    index = np.arange(w.shape[1]) // GROUP
    index = np.random.default_rng(4).permutation(index) if act_order else index
    codes, scale, zero, numbers = grouped(w, symmetric=symmetric, index=index)
    parts = {
        "weight_packed": words(codes), "weight_scale": scale.astype(np.float16),
        "weight_shape": np.array(w.shape, np.int64),
    }  # fmt: skip
    if not symmetric:  # packed along the outputs
        parts["weight_zero_point"] = np.ascontiguousarray(words(zero.T).T)
    if act_order:
        parts["weight_g_idx"] = index.astype(np.int32)
    return parts, numbers


def modelopt_int4(w: Array) -> tuple[Parts, Array]:
    """modelopt, W4A16_AWQ: factors of the inputs, and bytes of two neighbouring outputs."""
    factors = np.random.default_rng(6).uniform(0.5, 2, w.shape[1]).astype(np.float32)
    codes, scale, _, numbers = grouped(w / factors, symmetric=True)
    signed = (codes - 8).astype(np.int8)
    bytes_ = (signed[0::2] & 15 | signed[1::2] << 4).astype(np.uint8)
    return {"weight": bytes_, "weight_scale": scale, "pre_quant_scale": factors}, numbers * factors


def nf4(w: Array) -> tuple[Parts, Array]:
    """bitsandbytes with nested quantization of the magnitudes."""
    table = np.array([-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379,
                      0.4407, 0.5626, 0.723, 1], np.float32)  # fmt: skip
    flat = w.reshape(-1, 64)
    amax = np.abs(flat).max(axis=1)
    steps = np.linspace(-1, 1, 256, dtype=np.float32)
    offset, size = np.float32(amax.mean()), 256
    nested = np.array(
        [np.abs(part - offset).max() for part in np.split(amax, range(size, len(amax), size))], np.float32
    )
    wide = np.repeat(nested, size)[: len(amax)]
    coded = np.abs((amax - offset)[:, None] / wide[:, None] - steps).argmin(axis=1).astype(np.uint8)
    amax = steps[coded] * wide + offset
    codes = np.abs((flat / amax[:, None])[..., None] - table).argmin(axis=-1).astype(np.uint8)
    numbers = (table[codes] * amax[:, None]).reshape(w.shape).astype(np.float32)
    pairs = codes.reshape(-1, 2)
    state = {"blocksize": 64, "shape": list(w.shape), "dtype": "float32", "nested_blocksize": size,
             "nested_offset": float(offset)}  # fmt: skip
    parts = {
        "weight": (pairs[:, 0] << 4 | pairs[:, 1]).reshape(-1, 1), "weight.absmax": coded, "weight.quant_map": table,
        "weight.nested_absmax": nested, "weight.nested_quant_map": steps,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8).copy(),
    }  # fmt: skip
    return parts, numbers


# --- a checkpoint of each --------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[Array], tuple[Parts, Array]]]] = {
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_tensor),
    "fp8 by output": ({"quant_method": "compressed-tensors"}, fp8_channel),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [32, 16]}, fp8_block),
    "int8 by output": ({"quant_method": "compressed-tensors"}, int8_channel),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
    "awq symmetric": ({"quant_method": "awq", "bits": 4}, lambda w: awq(w, symmetric=True)),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}, gptq),
    "gptq zero points": ({"quant_method": "gptq", "bits": 4}, lambda w: gptq(w, symmetric=False)),
    "gptq act-order": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, lambda w: gptq(w, act_order=True)),
    "packed int4": ({"quant_method": "compressed-tensors"}, packed),
    "packed zero points": ({"quant_method": "compressed-tensors"}, lambda w: packed(w, symmetric=False)),
    "packed act-order": ({"quant_method": "compressed-tensors"}, lambda w: packed(w, act_order=True)),
    "modelopt int4": ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, modelopt_int4),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4),
}  # fmt: skip
STATIC = {"modelopt fp8"}
"""Layouts that round the activations too."""


def made(layout: str, folder: Path, model_name: str = "llama") -> Any:
    """A packed checkpoint in `folder`; returns transformers' model of the numbers that it means."""
    settings, pack = LAYOUTS[layout]
    model = hf.make(model_name, folder, {"intermediate_size": 96})
    state: dict[str, Any] = {
        name: torch.from_numpy(array) for name, array in load_file(folder / "model.safetensors").items()
    }
    stored, meant = dict(state), dict(state)
    for name in state:
        if name.endswith("proj.weight"):
            parts, numbers = pack(state[name].numpy())
            del stored[name]
            meant[name] = torch.from_numpy(numbers)
            for part, array in parts.items():
                tensor = torch.from_numpy(array.view(np.uint8) if array.dtype == E4M3 else np.ascontiguousarray(array))
                stored[f"{name.removesuffix('.weight')}.{part}"] = (
                    tensor.view(torch.float8_e4m3fn) if array.dtype == E4M3 else tensor
                )
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    model.load_state_dict(meant, strict=False)
    return model


@pytest.mark.parametrize("form", ["concat", "gqa"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_numbers_that_are_stored(layout: str, form: str, tmp_path: Path) -> None:
    model = made(layout, tmp_path / "hf")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--dtype", "fp32", "--kv-cache", form)
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"))
    found, expected = decode(tmp_path / "m.onnx", form, IDS, MASK, [9, 1, 1, 1]), hf.logits(model, IDS, MASK)
    if layout in STATIC:
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.2
        assert ops(tmp_path / "m.onnx").count("QuantizeLinear") == 8  # one for each input that layers share
    else:
        assert np.abs(found - expected).max() <= 1e-4
    assert ops(tmp_path / "m.onnx").count("DequantizeLinear") == (0 if layout == "nf4" else 14 + 8 * (layout in STATIC))


def test_mxfp4_experts_of_gpt_oss(tmp_path: Path) -> None:
    """Blocks of 32 codes along the inputs, the first of two in the low nibble, and scales 2^(s - 127)."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    model, rng = hf.make("gpt_oss", tmp_path / "hf", {"intermediate_size": 96}), np.random.default_rng(9)
    state = load_torch(tmp_path / "hf/model.safetensors")
    meant = dict(state)
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = state.pop(name).shape
        codes = rng.integers(0, 16, (experts, outputs, inputs // 32, 32)).astype(np.uint8)
        scales = rng.integers(122, 125, codes.shape[:3]).astype(np.uint8)
        state[f"{name}_blocks"] = torch.from_numpy(codes[..., 0::2] | codes[..., 1::2] << 4)
        state[f"{name}_scales"] = torch.from_numpy(scales)
        numbers = table[codes] * 2.0 ** (scales[..., None].astype(np.float32) - 127)
        meant[name] = torch.from_numpy(numbers.reshape(experts, outputs, inputs).swapaxes(1, 2).copy()).float()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "hf/model.safetensors")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    model.load_state_dict(meant, strict=False)
    said = succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--dtype", "fp32").out
    assert "4 weights were MXFP4, de-quantized" in " ".join(said.split())
    expected = hf.logits(model, IDS, MASK)
    assert np.abs(decode(tmp_path / "m.onnx", "concat", IDS, MASK, [9, 1, 1, 1]) - expected).max() <= 1e-4


@pytest.mark.parametrize("layout", ["fp8 by output", "packed int4", "awq"])
def test_fused_rows_keep_their_codes_where_they_can(layout: str, tmp_path: Path) -> None:
    """Phi-3's QKV and gate-up are cut into rows; words of outputs (AWQ) cannot be, and are de-quantized."""
    model = made(layout, tmp_path / "hf", "phi3")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--dtype", "fp32")
    expected = hf.logits(model, IDS, MASK)
    assert np.abs(decode(tmp_path / "m.onnx", "concat", IDS, MASK, [9, 1, 1, 1]) - expected).max() <= 1e-4
    assert ops(tmp_path / "m.onnx").count("DequantizeLinear") == (4 if layout == "awq" else 14)


def test_codes_and_scales_are_the_checkpoints_own(tmp_path: Path) -> None:
    made("fp8 by output", tmp_path / "hf")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--dtype", "fp32")
    theirs = load_torch(tmp_path / "hf/model.safetensors")
    ours = {t.name: t for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    name = "model.layers.1.mlp.down_proj"
    assert ours[f"{name}.weight"].raw_data == theirs[f"{name}.weight"].view(torch.uint8).numpy().tobytes()
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(ours[f"{name}.weight_scale"]), theirs[f"{name}.weight_scale"].numpy().reshape(-1)
    )


def test_biases_of_zeros_that_gptq_adds_are_left_out(tmp_path: Path) -> None:
    model = made("gptq", tmp_path / "hf")
    state = load_file(tmp_path / "hf/model.safetensors")
    state["model.layers.0.self_attn.o_proj.bias"] = np.zeros(64, np.float16)
    save_file({n: torch.from_numpy(a) for n, a in state.items()}, tmp_path / "hf/model.safetensors")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--dtype", "fp32")
    expected = hf.logits(model, IDS, MASK)
    assert np.abs(decode(tmp_path / "m.onnx", "concat", IDS, MASK, [12]) - expected).max() <= 1e-4
    state["model.layers.0.self_attn.o_proj.bias"][3] = 1
    save_file({n: torch.from_numpy(a) for n, a in state.items()}, tmp_path / "hf/model.safetensors")
    assert "unknown: model.layers.0.self_attn.o_proj.bias" in refuse(
        "export", tmp_path / "hf", "-o", tmp_path / "n.onnx"
    )


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        ("gptq", {"bits": 8}, "8 bits"), ("awq", {"version": "gemv"}, "gemv"),
        ("gptq", {"quant_method": "hqq"}, "quantization_config"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(layout: str, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    made(layout, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    line = refuse("export", tmp_path / "hf", "-o", tmp_path / "m.onnx")
    assert words in line and str(tmp_path / "hf") in line


def test_blocks_need_opset_21(tmp_path: Path) -> None:
    made("awq", tmp_path / "hf")
    assert "--opset is 19" in refuse("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--opset", "19")


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_a_missing_part_is_named(part: str, tmp_path: Path) -> None:
    made("gptq", tmp_path / "hf")
    state = load_file(tmp_path / "hf/model.safetensors")
    del state[f"model.layers.1.mlp.up_proj.{part}"]
    save_file({n: torch.from_numpy(a) for n, a in state.items()}, tmp_path / "hf/model.safetensors")
    assert f"mlp.up_proj.{part} is missing" in refuse("export", tmp_path / "hf", "-o", tmp_path / "m.onnx")


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = load_torch(folder / "model.safetensors")
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


UP = "model.layers.1.mlp.up_proj"
DAMAGED: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "groups of other sizes": ("gptq act-order", lambda s: s[f"{UP}.g_idx"].fill_(1), "groups of one size"),
    "words of int64": ("gptq", lambda s: s.update({f"{UP}.qweight": s[f"{UP}.qweight"].long()}), "words of eight"),
    "an activation scale of 0": ("modelopt fp8", lambda s: s[f"{UP}.input_scale"].zero_(), "one positive number"),
    "several activation scales": (
        "modelopt fp8", lambda s: s.update({f"{UP}.input_scale": torch.ones(3)}), "one positive number"
    ),
    "scales of other blocks": (
        "fp8 blocks", lambda s: s.update({f"{UP}.weight_scale_inv": torch.ones(2, 2)}), "in blocks of 32 x 16"
    ),
    "zero points of another type": (
        "packed zero points",
        lambda s: s.update({f"{UP}.weight_zero_point": s[f"{UP}.weight_zero_point"].long()}),
        "weight_zero_point is INT64",
    ),
    "magnitudes without their table": ("nf4", lambda s: s.pop(f"{UP}.weight.nested_absmax"), "absmax does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_parts_are_named(case: str, tmp_path: Path) -> None:
    layout, change, words = DAMAGED[case]
    made(layout, tmp_path / "hf")
    edited(tmp_path / "hf", change)
    assert words in refuse("export", tmp_path / "hf", "-o", tmp_path / "m.onnx")


def test_blocks_without_their_size_are_not_guessed(tmp_path: Path) -> None:
    """40 rows in blocks of 32 have two rows of scales, and so have 40 rows in blocks of 20."""
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"weights": {"block_structure": [32, 16]}}},
    }
    model = made("fp8 blocks", tmp_path / "hf", "llama")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--dtype", "fp32")
    expected = hf.logits(model, IDS, MASK)
    assert np.abs(decode(tmp_path / "m.onnx", "concat", IDS, MASK, [12]) - expected).max() <= 1e-4
    edited(tmp_path / "hf", lambda s: s.update({f"{UP}.weight_scale_inv": torch.ones(5, 4)}))  # 96 is no multiple of 5
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert "two positive integers" in refuse("export", tmp_path / "hf", "-o", tmp_path / "n.onnx")


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    def pack(w: Array) -> tuple[Parts, Array]:
        largest = np.abs(w).max(axis=1).astype(np.float32)
        codes = np.rint(w * (127 / largest)[:, None]).astype(np.int8)
        return {"weight": codes, "SCB": largest}, codes * (largest / 127)[:, None]

    LAYOUTS["bnb int8"] = ({"quant_method": "bitsandbytes", "load_in_8bit": True}, pack)
    try:
        model = made("bnb int8", tmp_path / "hf")
    finally:
        del LAYOUTS["bnb int8"]
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--dtype", "fp32")
    expected = hf.logits(model, IDS, MASK)
    assert np.abs(decode(tmp_path / "m.onnx", "concat", IDS, MASK, [12]) - expected).max() <= 1e-4


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_scales_are_not_rounded_to_the_compute_type(dtype: str, tmp_path: Path) -> None:
    made("fp8 by output", tmp_path / "hf")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--dtype", dtype)
    scale = next(t for t in onnx.load(tmp_path / "m.onnx").graph.initializer if t.name == f"{UP}.weight_scale")
    theirs = load_torch(tmp_path / "hf/model.safetensors")[f"{UP}.weight_scale"].reshape(-1)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(scale), theirs.numpy())
