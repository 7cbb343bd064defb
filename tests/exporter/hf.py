"""Tiny random checkpoints of the Hugging Face families, written by transformers, and their logits."""

from __future__ import annotations

from collections.abc import Mapping
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

_GROUPS = {"n_group": 2, "topk_group": 1}
_LATENT = {
    **_LLAMA, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "kv_lora_rank": 32,
    "q_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
_MSCALE = {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.9}
_QWEN_MOE = {**_LLAMA, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OSS = {**_LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 5}
_PHI = {**_LLAMA, "num_key_value_heads": 4}
_FALCON = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 96,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OPT = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 64, "word_embed_proj_dim": 64,
}  # fmt: skip
_BLOOM = {"vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4}
_MPT = {"vocab_size": 97, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
_NEO = {
    "vocab_size": 97, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]], "window_size": 5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GEMMA = {**_LLAMA, "head_dim": 16}
_GEMMA3 = {**_GEMMA, "sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20}
_SHORT, _LONG = [1.0 + 0.1 * i for i in range(8)], [1.5 + 0.4 * i for i in range(8)]


def _rope(kind: str = "default", **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def _longrope(original: int) -> dict[str, Any]:
    """LongRoPE whose long factors begin behind `original` tokens: shorter than a first step, or longer than all."""
    factors = {"short_factor": _SHORT, "long_factor": _LONG, "original_max_position_embeddings": original}
    return {"original_max_position_embeddings": original, **_rope("longrope", **factors)}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {**_GPT2, "tie_word_embeddings": True}),
    "gpt2_gelu_inner": ("GPT2", {**_GPT2, "activation_function": "gelu", "n_inner": 100}),
    "gpt2_by_layer": ("GPT2", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "bigcode_mqa": ("GPTBigCode", {**_GPT2, "multi_query": True}),
    "bigcode_mha": ("GPTBigCode", {**_GPT2, "multi_query": False}),
    "llama": ("Llama", _LLAMA),
    "llama_tied_biased": ("Llama", {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": ("Llama", {**_LLAMA, "head_dim": 32, "rms_norm_eps": 1e-5}),
    "llama_linear": ("Llama", {**_LLAMA, **_rope("linear", factor=2.0)}),
    "llama_dynamic": ("Llama", {**_LLAMA, **_rope("dynamic", factor=2.0)}),
    "llama_llama3": ("Llama", {**_LLAMA, "rope_parameters": _LLAMA3}),
    "llama_yarn": ("Llama", {**_LLAMA, "rope_parameters": _YARN}),
    "llama_longrope": ("Llama", {**_LLAMA, **_longrope(40)}),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 5}),
    "mistral_full": ("Mistral", {**_LLAMA, "sliding_window": None}),
    "ministral": ("Ministral", {**_LLAMA, "head_dim": 32, "sliding_window": 5}),
    "ministral_mixed": (
        "Ministral",
        {**_LLAMA, "head_dim": 32, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen2": ("Qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2_windows": (
        "Qwen2",
        {**_LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_windows": (
        "Qwen3",
        {**_LLAMA, "head_dim": 32, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
         "attention_bias": True},
    ),
    "phi3": ("Phi3", {**_LLAMA, "pad_token_id": 0}),
    "phi3_window": ("Phi3", {**_LLAMA, "pad_token_id": 0, "sliding_window": 5}),
    "phi3_longrope": ("Phi3", {**_LLAMA, "pad_token_id": 0, **_longrope(8)}),
    "phi3_partial": (
        "Phi3", {**_LLAMA, "pad_token_id": 0, "head_dim": 32, **_rope(partial_rotary_factor=0.5)}
    ),
    "starcoder2": ("Starcoder2", _LLAMA),
    "starcoder2_window": ("Starcoder2", {**_LLAMA, "sliding_window": 5, "use_bias": False}),
    "stablelm": ("StableLm", {**_PHI, "head_dim": 16, **_rope(partial_rotary_factor=0.5)}),
    "stablelm_grouped": (
        "StableLm",
        {**_LLAMA, "qk_layernorm": True, "use_qkv_bias": True, **_rope(partial_rotary_factor=1.0)},
    ),
    "stablelm_parallel": (
        "StableLm", {**_LLAMA, "use_parallel_residual": True, **_rope(partial_rotary_factor=0.25)}
    ),
    "opt": ("OPT", _OPT),
    "opt_350m": ("OPT", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt_plain": (
        "OPT",
        {**_OPT, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "opt_no_final_norm": ("OPT", {**_OPT, "_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    "gemma": ("Gemma", _GEMMA),
    "granite": (
        "Granite",
        {**_LLAMA, "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
         "logits_scaling": 2.0},
    ),
    "granite_biased": ("Granite", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "gpt_neox": ("GPTNeoX", {**_LLAMA, "head_dim": 16, **_rope(partial_rotary_factor=0.25)}),
    "gpt_neox_serial": (
        "GPTNeoX",
        {**_LLAMA, "use_parallel_residual": False, "attention_bias": False, **_rope(partial_rotary_factor=1.0)},
    ),
    "phi": ("Phi", {**_LLAMA, **_rope(partial_rotary_factor=0.5)}),
    "phi_norms": ("Phi", {**_LLAMA, "qk_layernorm": True, **_rope(partial_rotary_factor=1.0)}),
    "gptj": ("GPTJ", {**_GPT2, "rotary_dim": 8}),
    "gptj_inner": ("GPTJ", {**_GPT2, "rotary_dim": 16, "n_inner": 96}),
    "falcon": ("Falcon", _FALCON),
    "falcon_biased": ("Falcon", {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon_alibi": (
        "Falcon",
        {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
    ),
    "falcon_new": ("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_one_norm": (
        "Falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1,
         "tie_word_embeddings": False},
    ),
    "cohere": ("Cohere", {**_LLAMA, "logit_scale": 0.3}),
    "cohere_norms": ("Cohere", {**_LLAMA, "use_qk_norm": True, "attention_bias": True}),
    "gemma2": ("Gemma2", {**_GEMMA, "sliding_window": 5, "query_pre_attn_scalar": 20}),
    "gemma2_capped": (
        "Gemma2",
        {**_GEMMA, "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2_uncapped": (
        "Gemma2", {**_GEMMA, "sliding_window": 64, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    ),
    "gemma3": ("Gemma3", _GEMMA3),
    "gemma3_scaled": (
        "Gemma3",
        {**_GEMMA3, "final_logit_softcapping": 3.0, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        }},
    ),
    "smollm3": ("SmolLM3", {**_LLAMA, "no_rope_layer_interval": 2, "pad_token_id": 0}),
    "smollm3_windows": (
        "SmolLM3",
        {**_LLAMA, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 5, "pad_token_id": 0},
    ),
    "olmo": ("Olmo", _LLAMA),
    "olmo_clipped": ("Olmo", {**_LLAMA, "clip_qkv": 0.3, "tie_word_embeddings": True, "attention_bias": True}),
    "olmo2": ("Olmo2", _LLAMA),
    "exaone4": ("Exaone4", {**_LLAMA, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "exaone4_hybrid": ("Exaone4", {**_LLAMA, "sliding_window": 5, "sliding_window_pattern": 2}),
    "glm": ("Glm", {**_LLAMA, "head_dim": 16, "pad_token_id": 0, "attention_bias": True}),
    "glm4": ("Glm4", {**_LLAMA, "head_dim": 32, "pad_token_id": 0}),
    "helium": ("Helium", {**_LLAMA, "head_dim": 16, "pad_token_id": 0}),
    "mixtral": ("Mixtral", {**_LLAMA, "num_local_experts": 4}),
    "mixtral_window": ("Mixtral", {**_LLAMA, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 5}),
    "qwen2_moe": ("Qwen2Moe", {**_QWEN_MOE, "shared_expert_intermediate_size": 64}),
    "qwen2_moe_mixed": (
        "Qwen2Moe",
        {**_QWEN_MOE, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 2, "norm_topk_prob": True,
         "qkv_bias": False},
    ),
    "qwen3_moe": ("Qwen3Moe", {**_QWEN_MOE, "head_dim": 32, "norm_topk_prob": True}),
    "qwen3_moe_mixed": (
        "Qwen3Moe", {**_QWEN_MOE, "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 5}
    ),
    "gpt_oss": ("GptOss", {**_OSS, "rope_parameters": {**_YARN, "truncate": False}}),
    "gpt_oss_limits": ("GptOss", {**_OSS, "swiglu_limit": 0.2, "swiglu_alpha": 1.1, **_rope()}),
    "deepseek_v2": ("DeepseekV2", {**_LATENT, **_GROUPS, "topk_method": "group_limited_greedy"}),
    "deepseek_v2_lite": (
        "DeepseekV2",
        {**_LATENT, "q_lora_rank": None, "routed_scaling_factor": 2.0, "rope_parameters": _MSCALE,
         "attention_bias": True},
    ),
    "deepseek_v3": ("DeepseekV3", {**_LATENT, **_GROUPS}),
    "deepseek_v3_plain": (
        "DeepseekV3",
        {**_LATENT, "n_group": 1, "topk_group": 1, "rope_interleave": False, "norm_topk_prob": False,
         "rope_parameters": _MSCALE},
    ),
    "bloom": ("Bloom", _BLOOM),
    "bloom_residual": ("Bloom", {**_BLOOM, "n_head": 8, "apply_residual_connection_post_layernorm": True}),
    "bloom_odd_heads": ("Bloom", {**_BLOOM, "hidden_size": 48, "n_head": 6}),
    "mpt": ("Mpt", _MPT),
    "mpt_clipped": (
        "Mpt", {**_MPT, "d_model": 48, "n_heads": 6, "attn_config": {"clip_qkv": 0.3, "softmax_scale": 0.4}}
    ),
    "gpt_neo": ("GPTNeo", _NEO),
    "nemotron": ("Nemotron", {**_LLAMA, "head_dim": 32, **_rope(partial_rotary_factor=0.5)}),
}  # fmt: skip


CONFIGS = {"Gemma3": "Gemma3Text"}
"""Classes of configurations that are not called like their models."""


def make(name: str, folder: Path, changes: Mapping[str, Any] | None = None, **saving: Any) -> Any:
    """The model `name`, saved into `folder`, with `changes` of its settings.

    No parameter has the value it is initialized with, so that a wrong mapping shows.
    """
    kind, settings = CASES[name]
    settings = {**settings, **(changes or {})}
    torch.manual_seed(7)
    config = getattr(transformers, f"{CONFIGS.get(kind, kind)}Config")(**settings)
    model = getattr(transformers, f"{kind}{'ForCausalLM' if kind != 'GPT2' else 'LMHeadModel'}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_()  # some are left uninitialized
            parameter.copy_(torch.where(parameter.abs() < 10, parameter, 0) + torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **saving)
    return model


_COUNTING = ("bloom", "mpt")
"""Models with ALiBi take no positions."""


def logits(model: Any, ids: Array, mask: Array) -> Array:
    """fp32 logits [batch, sequence, vocabulary] of one full run in eager attention."""
    model.set_attn_implementation("eager")
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    places = {"position_ids": torch.tensor(positions)} if model.config.model_type not in _COUNTING else {}
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **places, use_cache=False)
    return out.logits.float().numpy()
