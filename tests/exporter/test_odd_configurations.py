"""Configurations that are easy to take for something else: equal to transformers, or refused by the field's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the checkpoints are written by transformers (make setup installs it)")
import torch
import transformers

from tests.exporter import hf
from tests.exporter.driver import decode
from tests.support import max_abs, refuse, succeed

IDS = np.random.default_rng(3).integers(1, 90, (2, 20))
MASK = np.ones((2, 20), np.int64)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def edited(folder: Path, name: str, changes: dict[str, Any]) -> Path:
    hf.make(name, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return folder


EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "rope_scaling wins over rope_parameters": (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "original length beside llama3": (
        "llama",
        {
            "rope_parameters": "absent",
            "rope_scaling": {**LLAMA3, "rope_theta": 1e4},
            "original_max_position_embeddings": 8,
        },
    ),
    "the original length outside wins": (
        "llama",
        {
            "rope_parameters": "absent",
            "rope_scaling": {**LLAMA3, "rope_theta": 1e4, "original_max_position_embeddings": 16},
            "original_max_position_embeddings": 40,
        },
    ),
    "an older name of LongRoPE": (
        "phi3",
        {
            "rope_parameters": "absent",
            "rope_scaling": {"rope_type": "yarn", "short_factor": [1.3] * 8, "long_factor": [2.5] * 8},
            "original_max_position_embeddings": 10,
        },
    ),
    "windows of Qwen2-MoE": (
        "qwen2_moe",
        {"layer_types": "absent", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    ),
    "GPT-NeoX's older names": ("gpt_neox", {"rope_parameters": "absent", "rotary_pct": 0.5, "rotary_emb_base": 500.0}),
    "Gemma 3's older names": (
        "gemma3",
        {
            "rope_parameters": "absent",
            "rope_theta": 5000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "Gemma 2's exact GELU": ("gemma2", {"hidden_activation": "gelu"}),
    "no scaling of the scores": ("gpt2", {"scale_attn_weights": False}),
    "a norm's epsilon": ("llama", {"rms_norm_eps": 0.25}),
}


SAME: list[tuple[str, dict[str, Any]]] = [
    ("llama_linear", {"rope_scaling": {}}),
    ("mixtral_window", {"layer_types": ["full_attention"] * 2}),
    ("starcoder2_window", {"layer_types": ["full_attention"] * 2}),
    ("phi3_window", {"layer_types": ["full_attention"] * 2}),
    ("qwen3_moe_mixed", {"layer_types": ["full_attention"] * 2}),
    ("gemma3", {"attn_logit_softcapping": 2.0}),
    ("bigcode_mqa", {"scale_attn_by_inverse_layer_idx": True}),
    ("glm", {"attention_bias": "absent"}),
]
"""Settings that transformers does not read, or that are its defaults."""


@pytest.mark.parametrize(("name", "changes"), SAME, ids=[f"{name}-{next(iter(changes))}" for name, changes in SAME])
def test_settings_without_effect_in_transformers_have_none(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = edited(tmp_path / "hf", name, changes)
    succeed("export", folder, "-o", tmp_path / "m.onnx")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = decode(tmp_path / "m.onnx", "concat", IDS, MASK, [20])
    assert max_abs(found, hf.logits(model, IDS, MASK)) <= 1e-4


@pytest.mark.parametrize("case", EQUAL)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    name, changes = EQUAL[case]
    folder = edited(tmp_path / "hf", name, changes)
    succeed("export", folder, "-o", tmp_path / "m.onnx")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = hf.logits(model, IDS, MASK)
    assert max_abs(decode(tmp_path / "m.onnx", "concat", IDS, MASK, [20]), expected) <= 1e-4
    plain = hf.logits(
        transformers.AutoModelForCausalLM.from_pretrained(hf_plain(tmp_path, name), dtype=torch.float32).eval(),
        IDS,
        MASK,
    )
    assert max_abs(plain, expected) > 1e-3  # the change matters, so that ignoring it would be seen


def hf_plain(tmp_path: Path, name: str) -> Path:
    hf.make(name, tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bigcode_mqa", "nemotron"])
def test_a_stored_head_that_differs_from_the_tied_embedding_is_used(name: str, tmp_path: Path) -> None:
    kind, settings = hf.CASES[name]
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}{'ForCausalLM' if kind != 'GPT2' else 'LMHeadModel'}")(
        getattr(transformers, f"{kind}Config")(**{**settings, "tie_word_embeddings": False})
    )
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.1)
    model.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    out = succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx").out
    assert "different one is stored" in " ".join(out.split())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert not torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)
    assert max_abs(decode(tmp_path / "m.onnx", "concat", IDS, MASK, [20]), hf.logits(loaded, IDS, MASK)) <= 1e-4


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama", {"is_causal": False}, "is_causal"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("bigcode_mqa", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"num_attention_heads": 2}, "n_head is 4 and num_attention_heads is 2"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (
        "nemotron",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0}},
        "partial_rotary_factor",
    ),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 1e4, "low_freq_factor": 8.0}}, "low_freq_factor"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "factor"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": "x"}, "rms_norm_eps"),
    ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    ("gpt2", {"scale_attn_weights": "false"}, "scale_attn_weights"),
    ("llama", {"head_dim": "16"}, "head_dim"),
    ("llama", {"hidden_size": 64.5}, "hidden_size"),
    ("llama", {"max_position_embeddings": 0}, "max_position_embeddings"),
    ("llama", {"max_position_embeddings": 10**30}, "max_position_embeddings"),
    ("llama", {"num_hidden_layers": 3000}, "3000 layers"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("llama", {"eos_token_id": "x"}, "eos_token_id"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act"),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ("llama", {"use_sliding_window": True}, "sliding_window"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("mistral", {"layer_types": ["full_attention"]}, "2 layers"),
    ("mistral", {"layer_types": 5}, "5 attention"),
    ("mistral", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    ("qwen2", {"max_window_layers": "x"}, "max_window_layers"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "sliding_window"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
    ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "full_attention and sliding_attention"),
    (
        "llama_longrope",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 7,
                "long_factor": [1.0] * 8,
            }
        },
        "short_factor",
    ),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
    ("falcon_new", {"parallel_attn": False}, "new_decoder_architecture"),
    ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln"),
    ("mpt", {"attn_config": {"alibi": False}}, "alibi"),
    ("mpt", {"attn_config": 5}, "attn_config"),
    ("gpt_neo", {"attention_types": [[["global"], 1]]}, "2 layers"),
    ("gpt_neo", {"attention_types": 5}, "attention_types"),
    ("mixtral", {"num_experts_per_tok": 9}, "9 of 4 experts"),
    ("mixtral", {"num_local_experts": 10**9}, "num_experts"),
    ("qwen3_moe", {"mlp_only_layers": "x"}, "mlp_only_layers"),
    ("deepseek_v2", {"topk_method": "noaux"}, "topk_method"),
    ("deepseek_v3", {"n_group": 3}, "1 of 3 groups"),
    ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace"),
    ("exaone4_hybrid", {"layer_types": None, "sliding_window_pattern": "LXG"}, "sliding_window_pattern"),
    ("gptj", {"rotary_dim": 32}, "32 of 16 channels"),
    ("mistral", {"sliding_window": 10**30}, "sliding_window"),
    ("gpt_neo", {"window_size": 10**30}, "sliding_window"),
    ("gpt_neo", {"attention_types": [[["global", "local"], 10**9]]}, "attention_types"),
    ("gpt_neo", {"attention_types": [[["global", ["local"]], 1]]}, "attention_types"),
    ("deepseek_v3", {"n_group": 4}, "4 groups"),
    ("llama_yarn", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 4.0}}, "rope_theta"),
    ("opt", {"do_layer_norm_before": "no"}, "do_layer_norm_before"),
]


@pytest.mark.parametrize(
    ("name", "changes", "names"),
    REFUSED,
    ids=[next(iter(changes)) + f"-{i}" for i, (_, changes, _) in enumerate(REFUSED)],
)
def test_refused_by_name(name: str, changes: dict[str, Any], names: str, tmp_path: Path) -> None:
    folder = edited(tmp_path / "hf", name, changes)
    (tmp_path / "out").mkdir()
    # The tokens come from generation_config.json where there is one.
    (folder / "generation_config.json").unlink(missing_ok=True)
    line = refuse("export", folder, "-o", tmp_path / "out/m.onnx")
    assert names in line and str(folder) in line
    assert not list((tmp_path / "out").iterdir())


def test_a_value_beyond_fp16_is_an_error(tmp_path: Path) -> None:
    model = hf.make("llama", tmp_path / "hf")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    assert "model.layers.1.mlp.up_proj.weight" in refuse(
        "export", tmp_path / "hf", "-o", tmp_path / "out/m.onnx", "--dtype", "fp16"
    )
    assert not list((tmp_path / "out").iterdir())


def test_nothing_is_left_when_a_file_beside_the_model_cannot_be_written(tmp_path: Path) -> None:
    hf.make("llama", tmp_path / "hf")
    (tmp_path / "out/onnxtools.json").mkdir(parents=True)
    refuse("export", tmp_path / "hf", "-o", tmp_path / "out/m.onnx")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["onnxtools.json"]


def test_a_negated_tensor_is_refused(tmp_path: Path) -> None:
    state = hf.make("llama", tmp_path / "hf").state_dict()
    (tmp_path / "hf/model.safetensors").unlink()
    state["model.norm.weight"] = torch._neg_view(state["model.norm.weight"])
    torch.save(state, tmp_path / "hf/pytorch_model.bin")
    assert "neg" in refuse("export", tmp_path / "hf", "-o", tmp_path / "m.onnx")


@pytest.mark.parametrize("options", [["--n-layer", "3"], ["--family", "llama"], ["--no-weights", "--copy-weights"]])
def test_options_that_would_be_ignored_are_refused(options: list[str], tmp_path: Path) -> None:
    hf.make("llama", tmp_path / "hf")
    assert options[0].removeprefix("--no-") in refuse(
        "export", tmp_path / "hf", "-o", tmp_path / "m.onnx", *options, code=2
    )


def test_the_command_line_wins_over_the_files_own_output(tmp_path: Path) -> None:
    hf.make("llama", tmp_path / "hf")
    (tmp_path / "c.yaml").write_text("source: elsewhere\noutput: other.onnx\ndtype: fp16\n")
    succeed("export", tmp_path / "hf", "-o", tmp_path / "m.onnx", "--config", tmp_path / "c.yaml")
    assert (tmp_path / "m.onnx").is_file() and not (tmp_path / "other.onnx").exists()
