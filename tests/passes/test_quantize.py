"""`quantize`: what is stored equals numpy's own quantization bit for bit, scales come from what PyTorch sees, and the
file runs anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

pytest.importorskip("transformers")

from tests.calibration.test_run import by_hooks
from tests.calibration.texts import calibration_file, tokens
from tests.exporter import hf
from tests.generation.models import exported, reference
from tests.passes.test_folding import run
from tests.support import refuse, rel_l2, succeed
from tests.support import run as app

Array = np.ndarray[Any, Any]


def stored(path: Path) -> dict[str, Array]:
    """Initializers; INT4 as int8, unpacked here, low nibble first."""
    found = {}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT4:
            raw = np.frombuffer(tensor.raw_data, np.uint8)
            nibbles = np.stack([raw & 15, raw >> 4], axis=-1).reshape(tuple(tensor.dims)).astype(np.int8)
            found[tensor.name] = np.where(nibbles > 7, nibbles - 16, nibbles)
        else:
            found[tensor.name] = numpy_helper.to_array(tensor)
    return found


def torch_weights(name: str) -> dict[str, Array]:
    return {key: value.detach().numpy() for key, value in reference(name).named_parameters()}


def quantized(tmp_path: Path, *flags: str, name: str = "llama", form: str = "concat", calibrated: bool = True) -> Path:
    calib = ["--calib", calibration_file(tmp_path)] if calibrated else []
    succeed("quantize", exported(name, form), tmp_path / "q.onnx", *flags, *calib)
    return tmp_path / "q.onnx"


def logits_error(path: Path, name: str = "llama") -> float:
    ids = np.random.default_rng(2).integers(0, 97, (2, 9))
    return rel_l2(run(path), hf.logits(reference(name), ids, np.ones((2, 9), np.int64)))


def as_e4m3(x: Array) -> Array:
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def test_fp8_weights_and_scales_are_numpys(tmp_path: Path) -> None:
    found, weights = stored(quantized(tmp_path, "--fp8")), torch_weights("llama")
    names = [key for key in weights if key.endswith("_proj.weight")]
    assert len(names) == 14
    for key in names:
        scale = np.float32(np.abs(weights[key]).max()) / np.float32(448)
        assert found[f"{key}_scale"] == scale
        np.testing.assert_array_equal(found[f"{key}_float8e4m3fn"].astype(np.float32), as_e4m3(weights[key] / scale))


def test_activation_scales_are_what_pytorch_sees(tmp_path: Path) -> None:
    model = onnx.load(quantized(tmp_path, "--fp8"))
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node}
    seen = by_hooks(reference("llama"), tokens())
    checked = 0
    for node in model.graph.node:
        if node.op_type == "Gemm" and "_proj" in node.name:
            weight = producers[node.input[1]].input[0].removesuffix(".weight_float8e4m3fn")
            assert producers[node.input[0]].op_type == "DequantizeLinear"
            assert values[producers[node.input[0]].input[1]] == pytest.approx(
                np.abs(seen[weight]).max() / 448, rel=1e-5
            )
            checked += 1
    assert (
        checked == 14 and sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == 8
    )  # layers that share their input share the pair


def test_int8_per_channel_is_numpys(tmp_path: Path) -> None:
    found, weights = stored(quantized(tmp_path, "--int8", "--per-channel", "--all-layers")), torch_weights("llama")
    for key in (key for key in weights if key.endswith("_proj.weight")):
        scale = (np.abs(weights[key]).max(axis=1) / np.float32(127)).astype(np.float32)
        np.testing.assert_array_equal(found[f"{key}_scale"], scale)
        np.testing.assert_array_equal(found[f"{key}_int8"], np.rint(weights[key] / scale[:, None]).clip(-128, 127))


def test_int4_rounded_to_nearest_is_numpys(tmp_path: Path) -> None:
    found, weights = (
        stored(quantized(tmp_path, "--int4-rtn", "--block-size", "16", calibrated=False)),
        torch_weights("llama"),
    )
    for key in (key for key in weights if key.endswith("_proj.weight")):
        rows, columns = weights[key].shape
        blocks = weights[key].reshape(rows, columns // 16, 16)
        scale = np.abs(blocks).max(axis=2) / np.float32(7)
        np.testing.assert_array_equal(found[f"{key}_scale"], scale)
        np.testing.assert_array_equal(
            found[f"{key}_int4"], np.rint(blocks / scale[..., None]).clip(-8, 7).reshape(rows, columns)
        )


@pytest.mark.parametrize(("flags", "limit"), [
    (["--fp8"], 0.15), (["--fp8", "--per-channel", "--calib-method", "mse"], 0.15), (["--int8"], 0.05),
    (["--int8", "--per-token", "--per-channel"], 0.03),
    (["--smoothquant", "0.5"], 0.05), (["--smoothquant", "0.8", "--per-token", "--per-channel", "--all-layers"], 0.03),
    (["--int4-awq"], 0.3),
    (["--fp8", "--gptq"], 0.15), (["--int4-awq", "--gptq"], 0.3),
    (["--smoothquant", "0.5", "--gptq", "--per-channel", "--all-layers"], 0.1),
    (["--kv-cache", "int8"], 0.02), (["--kv-cache", "fp8"], 0.06), (["--fp8", "--kv-cache", "fp8"], 0.2),
])  # fmt: skip
@pytest.mark.parametrize(
    ("name", "form"), [("llama", "concat"), ("llama", "scatter"), ("gpt2", "concat"), ("llama", "gqa")]
)
def test_the_result_runs_and_is_near(flags: list[str], limit: float, name: str, form: str, tmp_path: Path) -> None:
    if form == "gqa" and "fp8" in flags[1:]:
        pytest.skip("ONNX Runtime's GroupQueryAttention takes an FP8 cache on CUDA alone")
    error = logits_error(quantized(tmp_path, *flags, name=name, form=form), name)
    assert 1e-5 < error < limit


def test_smoothing_adds_no_node_and_helps_where_channels_differ(tmp_path: Path) -> None:
    """A model whose norms have a gain of 40 in two channels, as large models have."""
    import torch

    from tests.exporter.hf import make

    folder = tmp_path / "outliers"
    model = make("llama", folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[[3, 17]] *= 40
            elif name.endswith(
                ("q_proj.weight", "k_proj.weight", "v_proj.weight", "up_proj.weight", "gate_proj.weight")
            ):
                parameter[:, [3, 17]] /= 40
    model.save_pretrained(folder)
    succeed("export", folder, "-o", tmp_path / "m.onnx")
    calib = calibration_file(tmp_path)
    errors, nodes = [], []
    ids = np.random.default_rng(2).integers(0, 97, (2, 9))
    expected = hf.logits(model, ids, np.ones((2, 9), np.int64))
    for flags in (["--int8"], ["--smoothquant", "0.5"]):
        out = tmp_path / f"{flags[0].strip('-')}.onnx"
        succeed("quantize", tmp_path / "m.onnx", out, *flags, "--calib", calib)
        errors.append(rel_l2(run(out), expected))
        nodes.append(len(onnx.load(out).graph.node))
    assert errors[1] < errors[0] / 2 and nodes[0] == nodes[1]


def test_awq_is_better_than_rounding_to_nearest(tmp_path: Path) -> None:
    rtn = quantized(tmp_path, "--int4-rtn", calibrated=False)
    error = logits_error(rtn)
    assert logits_error(quantized(tmp_path, "--int4-awq")) < 0.9 * error


@pytest.mark.parametrize(("form", "flags", "whole"), [
    ("concat", [], {"q_proj", "k_proj"}), ("none", [], {"q_proj", "k_proj"}), ("gqa", [], {"qkv_proj"}),
    ("concat", ["--gptq"], set()),
])  # fmt: skip
def test_awq_does_not_clip_what_queries_and_keys_come_from(
    form: str, flags: list[str], whole: set[str], tmp_path: Path
) -> None:
    """Rounding to nearest with amax / 7 never gives -8; a clipped block that has a large negative number does."""
    codes = {
        key.split(".")[-2]: codes
        for key, codes in stored(quantized(tmp_path, "--int4-awq", *flags, form=form)).items()
        if key.endswith("weight_int4")
    }
    assert whole < set(codes)
    assert {name for name, found in codes.items() if found.min() > -8} == whole


def test_gptq_makes_up_for_its_rounding(tmp_path: Path) -> None:
    """The errors of the outputs on the calibration texts themselves, layer by layer."""
    calib, errors = calibration_file(tmp_path, tokens(count=40)), []
    for flags in ([], ["--gptq"]):
        out = succeed(
            "quantize",
            exported("llama", "concat"),
            tmp_path / "q.onnx",
            "--int4-awq",
            *flags,
            "--calib",
            calib,
            "--json",
        ).out
        errors.append(
            [row["error"] for row in json.loads(out)["steps"][0]["result"]["table"] if row["error"] is not None]
        )
    assert len(errors[0]) == 12 and np.mean(errors[1]) < 0.9 * np.mean(errors[0])


@pytest.mark.parametrize("form", ["concat", "gqa"])
def test_lowered_to_matmulnbits_the_outputs_stay(form: str, tmp_path: Path) -> None:
    quantized(tmp_path, "--int4-rtn", calibrated=False, form=form)
    succeed("lower-ort", tmp_path / "q.onnx", tmp_path / "o.onnx")
    assert sum(node.op_type == "MatMulNBits" for node in onnx.load(tmp_path / "o.onnx").graph.node) == (
        8 if form == "gqa" else 12
    )
    assert rel_l2(run(tmp_path / "o.onnx"), run(tmp_path / "q.onnx")) < 1e-4
    succeed("quantize", exported("llama", form), tmp_path / "d.onnx", "--int4-rtn", "--lower", "ort")
    np.testing.assert_array_equal(run(tmp_path / "d.onnx"), run(tmp_path / "o.onnx"))


def test_the_worst_layers_are_left_and_named(tmp_path: Path) -> None:
    out = succeed(
        "quantize",
        exported("llama", "concat"),
        tmp_path / "q.onnx",
        "--fp8",
        "--exclude-worst",
        "3",
        "--calib",
        calibration_file(tmp_path),
        "--json",
    )
    table = json.loads(out.out)["steps"][0]["result"]["table"]
    measured = [row for row in table if row["error"] is not None]
    left = [row["error"] for row in measured if "worst" in row["left"]]
    assert len(left) == 3 and min(left) >= max(row["error"] for row in measured if not row["left"])


def test_pruned_zeros_stay_zero(tmp_path: Path) -> None:
    succeed("prune", exported("llama", "concat"), tmp_path / "p.onnx")
    for flags, suffix in ((["--fp8"], "float8e4m3fn"), (["--smoothquant", "0.5"], "int8")):
        succeed("quantize", tmp_path / "p.onnx", tmp_path / "q.onnx", *flags, "--calib", calibration_file(tmp_path))
        array = stored(tmp_path / "q.onnx")[f"model.layers.0.self_attn.q_proj.weight_{suffix}"].astype(np.float32)
        assert ((array.reshape(-1, 4) == 0).sum(axis=1) >= 2).all()


@pytest.mark.parametrize(("flags", "names", "code"), [
    ([], "nothing to do", 2), (["--fp8"], "--calib", 2), (["--fp8", "--calib", "absent.jsonl"], "absent.jsonl", 1),
    (["--smoothquant", "1.5"], "0 to 1", 2),
    (["--smoothquant", "-0.1"], "0 to 1", 2), (["--int4-rtn", "--block-size", "48"], "power of two", 2),
    (["--int4-rtn", "--block-size", "128"], "does not divide K = 64", 2),
    (["--fp8", "--smoothquant", "0.5"], "leave one out", 2),
    (["--int4-rtn", "--per-token"], "--per-token", 2), (["--int4-rtn", "--calib-size", "0"], "calib_size", 2),
    (["--fp8", "--calib", "{wild}"], "holds token 97", 1), (["--fp8", "--calib", "{fields}"], "'text'", 2),
    (["--fp8", "--calib", "{empty}"], "holds no rows", 1),
    (["--fp8", "--calib", "{words}"], "tokenizer", 1),
])  # fmt: skip
def test_bad_input_is_one_line(flags: list[str], names: str, code: int, tmp_path: Path) -> None:
    files = {"wild": '{"text": [1, 97]}', "fields": '{"body": [1, 2]}', "empty": "", "words": '{"text": "some words"}'}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    given = [flag.format(**{name: tmp_path / f"{name}.jsonl" for name in files}) for flag in flags]
    assert names in refuse("quantize", exported("llama", "concat"), tmp_path / "q.onnx", *given, code=code)
    assert not (tmp_path / "q.onnx").exists()


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    quantized(tmp_path, "--fp8")
    assert "quantized already" in refuse(
        "quantize", tmp_path / "q.onnx", tmp_path / "r.onnx", "--int8", "--calib", calibration_file(tmp_path)
    )
    quantized(tmp_path, "--kv-cache", "int8")
    assert (
        "int8 already"
        in refuse(
            "quantize",
            tmp_path / "q.onnx",
            tmp_path / "r.onnx",
            "--kv-cache",
            "fp8",
            "--calib",
            calibration_file(tmp_path),
        ).lower()
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_damaged_weight_is_named(value: float, tmp_path: Path) -> None:
    model = onnx.load(exported("llama", "concat"))
    tensor = next(t for t in model.graph.initializer if t.name == "model.layers.1.mlp.up_proj.weight")
    array = numpy_helper.to_array(tensor).copy()
    array[3, 3] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "m.onnx")
    assert "model.layers.1.mlp.up_proj.weight" in refuse(
        "quantize", tmp_path / "m.onnx", tmp_path / "q.onnx", "--int4-rtn"
    )
    assert "while calibrating" in refuse(
        "quantize", tmp_path / "m.onnx", tmp_path / "q.onnx", "--fp8", "--calib", calibration_file(tmp_path)
    )


def test_a_channel_that_is_always_zero_is_harmless(tmp_path: Path) -> None:
    """A gain of zero: the activation is zero there, and so may be a row of a weight."""
    model = onnx.load(exported("llama", "concat"))
    for tensor in model.graph.initializer:
        if tensor.name.endswith(("input_layernorm.weight", "up_proj.weight")):
            array = numpy_helper.to_array(tensor).copy()
            array[5] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "m.onnx")
    for flags in (["--fp8", "--per-channel"], ["--smoothquant", "0.5", "--per-token"], ["--int4-awq"]):
        succeed("quantize", tmp_path / "m.onnx", tmp_path / "q.onnx", *flags, "--calib", calibration_file(tmp_path))
        assert np.isfinite(run(tmp_path / "q.onnx")).all()


def test_weights_in_matmul_layout_are_quantized_along_k(tmp_path: Path) -> None:
    """GPT-2 stores [in, out]."""
    found, weights = (
        stored(quantized(tmp_path, "--int4-rtn", "--block-size", "32", name="gpt2", calibrated=False)),
        torch_weights("gpt2"),
    )
    fc = weights["transformer.h.0.mlp.c_fc.weight"]
    blocks = fc.reshape(2, 32, fc.shape[1])
    scale = np.abs(blocks).max(axis=1) / np.float32(7)
    np.testing.assert_array_equal(found["model.layers.0.mlp.up_proj.weight_scale"], scale)
    np.testing.assert_array_equal(
        found["model.layers.0.mlp.up_proj.weight_int4"], np.rint(blocks / scale[:, None]).clip(-8, 7).reshape(fc.shape)
    )


def test_nemotrons_flags_are_ours(tmp_path: Path) -> None:
    calib = ["--calib", calibration_file(tmp_path)]
    for alias, own in (
        (["--qformat", "fp8"], ["--fp8"]), (["--qformat", "int4_awq"], ["--int4-awq"]),
        (["--qformat", "int8_sq"], ["--smoothquant", "0.5"]),
        (["--qformat", "full_prec", "--kv-cache-dtype", "int8"], ["--kv-cache", "int8"]),
    ):  # fmt: skip
        for name, flags in (("a", alias), ("b", own)):
            succeed("quantize", exported("llama", "concat"), tmp_path / f"{name}.onnx", *flags, *calib)
        a, b = stored(tmp_path / "a.onnx"), stored(tmp_path / "b.onnx")
        assert list(a) == list(b) and all(np.array_equal(a[key], b[key]) for key in a)
    succeed(
        "quantize", exported("llama", "concat"), tmp_path / "h.onnx", "--qformat", "fp8", "--dtype", "float16", *calib
    )
    kinds = {
        t.data_type
        for t in onnx.load(tmp_path / "h.onnx").graph.initializer
        if len(t.dims) == 2 and "rope" not in t.name
    }
    assert kinds == {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT16}
    assert 1e-4 < logits_error(tmp_path / "h.onnx") < 0.15
    assert "contradict" in refuse(
        "quantize", exported("llama", "concat"), tmp_path / "c.onnx", "--qformat", "fp8", "--int8", *calib, code=2
    )


def test_the_summary_is_a_row_a_kind_of_layer(tmp_path: Path) -> None:
    out = succeed(
        "quantize", exported("llama", "concat"), tmp_path / "q.onnx", "--fp8", "--calib", calibration_file(tmp_path)
    ).out
    assert "/model/layers.*/mlp/up_proj/Gemm" in out and "SNR dB" in out


def test_what_was_used_and_what_matched_nothing_is_said(tmp_path: Path) -> None:
    command = (
        "quantize",
        exported("llama", "concat"),
        tmp_path / "q.onnx",
        "--fp8",
        "--calib",
        calibration_file(tmp_path, tokens(count=3)),
    )
    out = " ".join(succeed(*command, "--exclude", "*.mlp.*", "--exclude", "nosuch").out.split())
    assert "warning: calibrated on 3 texts" in out and "fewer than --calib-size 128" in out
    assert "nothing matches --exclude nosuch" in out and "--exclude *.mlp" not in out
    out = succeed(*command, "--calib-size", "3").out
    assert "calibrated on 3 texts" in out and "fewer" not in out


def test_products_lowered_to_matmulnbits_are_counted_as_quantized(tmp_path: Path) -> None:
    succeed("quantize", exported("llama", "concat"), tmp_path / "q.onnx", "--int4-rtn", "--lower", "ort")
    found = json.loads(succeed("inspect", tmp_path / "q.onnx", "--json").out)["quantization"]
    assert (found["quantized_products"], found["products"]) == (12, 15), "K = 112 of two products is no multiple of 32"
    assert 0.5 < found["weight_fraction"] < 1


def test_only_the_model_is_quantized(tmp_path: Path) -> None:
    told = app("validate", exported("llama", "concat"), quantized(tmp_path, "--int4-rtn", calibrated=False))
    assert told.code == 1 and "accuracy --compare" in told.out and "not compared" not in told.out


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_fp8_products_become_gemm_float8(dtype: str, tmp_path: Path) -> None:
    """The operator has a CUDA kernel alone, so here its definition in numpy: scaleA * scaleB * A @ B^T, and the Gemm's
    bias behind it.
    """
    source = exported("llama", "none", "--dtype", dtype)
    succeed("quantize", source, tmp_path / "q.onnx", "--fp8", "--calib", calibration_file(tmp_path))
    assert (
        "14 products became GemmFloat8"
        in succeed("lower-ort", tmp_path / "q.onnx", tmp_path / "g.onnx", "--fp8", "--no-check").out
    )
    before, after = onnx.load(tmp_path / "q.onnx"), onnx.load(tmp_path / "g.onnx")
    made = {o: n for n in before.graph.node for o in n.output}
    old = {n.output[0]: n for n in before.graph.node if n.op_type == "Gemm"}
    weights = {t.name: t for t in after.graph.initializer}
    for node in (n for n in after.graph.node if n.op_type == "GemmFloat8"):
        assert node.domain == "com.microsoft" and {a.name: a.i for a in node.attribute} == {
            "transB": 1,
            "dtype": onnx.TensorProto.FLOAT16 if dtype == "fp16" else 1,
        }
        activation, weight, bias, *scales = node.input
        assert (
            not bias
            and [weights[s].data_type for s in scales] == [onnx.TensorProto.FLOAT] * 2
            and weights[weight].data_type == onnx.TensorProto.FLOAT8E4M3FN
        )
        gemm = old.pop(node.output[0])
        dequantize = [made[name] for name in gemm.input[:2]]
        assert [d.input[0] for d in dequantize] == [activation, weight]
        for side, scale in zip(dequantize, scales, strict=True):
            value = next(numpy_helper.to_array(t) for t in before.graph.initializer if t.name == side.input[1])
            assert numpy_helper.to_array(weights[scale]) == value.astype(np.float32)
    assert "no Gemm with FP8" in succeed("lower-ort", source, tmp_path / "n.onnx", "--fp8").out
