"""Tiny random checkpoints of the Hugging Face families, written by transformers, and their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

Array = np.ndarray[Any, Any]
_LLAMA = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 112,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {**_GPT2, "tie_word_embeddings": True}),
    "gpt2_gelu_inner": ("GPT2", {**_GPT2, "activation_function": "gelu", "n_inner": 100}),
    "bigcode_mqa": ("GPTBigCode", {**_GPT2, "multi_query": True}),
    "bigcode_mha": ("GPTBigCode", {**_GPT2, "multi_query": False}),
    "llama": ("Llama", _LLAMA),
    "llama_tied_biased": ("Llama", {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": ("Llama", {**_LLAMA, "head_dim": 32, "rms_norm_eps": 1e-5}),
    "llama_linear": (
        "Llama",
        {**_LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama_llama3": ("Llama", {**_LLAMA, "rope_parameters": _LLAMA3}),
    "llama_yarn": ("Llama", {**_LLAMA, "rope_parameters": _YARN}),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 5}),
    "mistral_full": ("Mistral", {**_LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2_windows": (
        "Qwen2",
        {**_LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "nemotron": (
        "Nemotron",
        {
            **_LLAMA,
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
}


def make(name: str, folder: Path, **saving: Any) -> Any:
    """The model `name`, saved into `folder`; no parameter has the value it is initialized with, so that a wrong mapping
    shows.
    """
    kind, settings = CASES[name]
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}{'ForCausalLM' if kind != 'GPT2' else 'LMHeadModel'}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **saving)
    return model


def logits(model: Any, ids: Array, mask: Array) -> Array:
    """fp32 logits [batch, sequence, vocabulary] of one full run in eager attention."""
    model.set_attn_implementation("eager")
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
            use_cache=False,
        )
    return out.logits.float().numpy()
