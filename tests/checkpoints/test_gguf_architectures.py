"""GGUF files of several architectures: tensors named by the `gguf` package, logits of the model they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

pytest.importorskip("transformers", reason="the references are transformers' own models (make setup installs it)")

from onnxtools.checkpoints.gguf import read_gguf
from onnxtools.storage.rows import read_rows
from tests.exporter import hf
from tests.exporter.driver import decode
from tests.support import refuse, succeed

IDS, MASK = np.random.default_rng(3).integers(3, 97, (2, 18)), np.ones((2, 18), np.int64)
SPLITS = [10, 1, 1, 1, 5]
SETTINGS = {
    "qwen2": ("qwen2", gguf.MODEL_ARCH.QWEN2, {}), "qwen3": ("qwen3", gguf.MODEL_ARCH.QWEN3, {}),
    "gemma": ("gemma", gguf.MODEL_ARCH.GEMMA, {}),
    "gemma2": ("gemma2", gguf.MODEL_ARCH.GEMMA2, {"query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3", gguf.MODEL_ARCH.GEMMA3, {
        "query_pre_attn_scalar": 16, "sliding_window_pattern": 6, "num_hidden_layers": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }),
    "phi3": ("phi3_window", gguf.MODEL_ARCH.PHI3, {}), "phi3 longrope": ("phi3_longrope", gguf.MODEL_ARCH.PHI3, {}),
}  # fmt: skip


def write(path: Path, model: Any, architecture: gguf.MODEL_ARCH, drop: tuple[str, ...] = ()) -> None:
    """The file that llama.cpp's converter writes: names by gguf-py's table, Gemma's gains with their 1."""
    c, name = model.config, gguf.MODEL_ARCH_NAMES[architecture]
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if getattr(c, "head_dim", None):
        writer.add_key_length(c.head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if name in ("gemma2", "gemma3", "phi3") and c.sliding_window:
        writer.add_sliding_window(c.sliding_window)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if name == "phi3":
        writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(c.original_max_position_embeddings)
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))
    names = gguf.get_tensor_name_map(architecture, c.num_hidden_layers)
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array = tensor.float().numpy() + (1 if name.startswith("gemma") and theirs.endswith("norm.weight") else 0)
        mapped = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, theirs
        if mapped not in drop:
            writer.add_tensor(mapped, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def made(case: str, folder: Path) -> tuple[Any, gguf.MODEL_ARCH]:
    name, architecture, settings = SETTINGS[case]
    return hf.make(name, folder, settings), architecture


@pytest.mark.parametrize("case", SETTINGS)
def test_logits_are_those_of_the_model(case: str, tmp_path: Path) -> None:
    model, architecture = made(case, tmp_path / "hf")
    write(tmp_path / "m.gguf", model, architecture)
    succeed("export", tmp_path / "m.gguf", "-o", tmp_path / "m.onnx", "--dtype", "fp32")
    found = decode(tmp_path / "m.onnx", "concat", IDS, MASK, SPLITS)
    assert np.abs(found - hf.logits(model, IDS, MASK)).max() <= 1e-4


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    model, architecture = made("qwen3", tmp_path / "hf")
    write(tmp_path / "m.gguf", model, architecture, drop=("blk.1.attn_q_norm.weight",))
    assert "1 weights missing: blk.1.attn_q_norm.weight" in refuse(
        "export", tmp_path / "m.gguf", "-o", tmp_path / "m.onnx"
    )


# --- K-quants: decoded here by the layout of llama.cpp's ggml-common.h and ggml-quants.c ------------------------------


def q6_k(blocks: np.ndarray) -> np.ndarray:
    """[blocks, 210 bytes]: 128 low nibbles, 64 bytes of high pairs, 16 int8 scales, an fp16 scale."""
    out = np.empty((len(blocks), 256), np.float32)
    for row, block in zip(out, blocks, strict=True):
        low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
        d = float(block[208:210].view(np.float16)[0])
        for half in range(2):
            for i in range(32):
                ql, qh = low[half * 64 :], high[half * 32 + i]
                codes = (
                    (ql[i] & 15) | ((qh >> 0 & 3) << 4), (ql[i + 32] & 15) | ((qh >> 2 & 3) << 4),
                    (ql[i] >> 4) | ((qh >> 4 & 3) << 4), (ql[i + 32] >> 4) | ((qh >> 6 & 3) << 4),
                )  # fmt: skip
                for part, code in enumerate(codes):
                    scale = d * scales[half * 8 + part * 2 + i // 16]
                    row[half * 128 + part * 32 + i] = scale * (int(code) - 32)
    return out


def q4_k(blocks: np.ndarray) -> np.ndarray:
    """[blocks, 144 bytes]: fp16 scale and minimum, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles."""
    out = np.empty((len(blocks), 256), np.float32)
    for row, block in zip(out, blocks, strict=True):
        d, minimum = (float(x) for x in block[:4].view(np.float16))
        s = block[4:16].astype(int)
        scales = [s[j] & 63 if j < 4 else (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4) for j in range(8)]
        minima = [s[j + 4] & 63 if j < 4 else (s[j + 4] >> 4) | ((s[j] >> 6) << 4) for j in range(8)]
        for pair in range(4):
            nibbles = block[16 + 32 * pair : 48 + 32 * pair].astype(int)
            for j, codes in ((2 * pair, nibbles & 15), (2 * pair + 1, nibbles >> 4)):
                row[32 * j : 32 * j + 32] = d * scales[j] * codes - minimum * minima[j]
    return out


@pytest.mark.parametrize(("name", "decoder", "scales"), [("Q6_K", q6_k, [208]), ("Q4_K", q4_k, [0, 2])])
def test_k_quants_are_those_of_llama_cpp(name: str, decoder: Any, scales: list[int], tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[name]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = np.random.default_rng(5).integers(0, 256, (12 * 2, size), dtype=np.uint8)
    for place in scales:
        blocks[:, place : place + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", blocks.reshape(12, 2 * size), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(tmp_path / "m.gguf").tensors["w"]
    found = np.concatenate([read_rows(tensor, start, min(start + 5, 12)) for start in range(0, 12, 5)])
    np.testing.assert_allclose(found.reshape(-1, 256), decoder(blocks), rtol=1e-6, atol=1e-7)
