"""Megatron GPT and GPT-Next from NeMo (`.nemo`, `.ckpt`).

The weight names are those of legacy Megatron, of legacy Megatron with TransformerEngine, or of megatron-core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.checkpoints.checkpoint import nested
from onnxtools.checkpoints.te_extra_state import forward_scales
from onnxtools.exporter.config import Activation, Block, DecoderConfig, Mlp, Norm, SelfAttention, repeated
from onnxtools.exporter.family import Family, FP8Scales, Source
from onnxtools.exporter.names import group_rows
from onnxtools.exporter.rope import Rope
from onnxtools.exporter.settings import head_dim_of, integer, number
from onnxtools.storage.lazy import Tensor, pick_rows, plus_one, row_range

_LAYER_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    # {part: (spellings of its module, or of its weight and bias)}, tried in order; `{}` is "weight" or "bias".
    "legacy": {
        "norm1": ("input_layernorm.{}", "self_attention.layernorm_qkv.layer_norm_{}"),
        "qkv": ("self_attention.query_key_value.{}", "self_attention.layernorm_qkv.{}"),
        "out": ("self_attention.dense.{}", "self_attention.proj.{}"),
        "norm2": ("post_attention_layernorm.{}", "layernorm_mlp.layer_norm_{}"),
        "fc1": ("mlp.dense_h_to_4h.{}", "layernorm_mlp.fc1_{}"),
        "fc1_up": ("mlp.dense_h_to_4h_2.{}",),
        "fc2": ("mlp.dense_4h_to_h.{}", "layernorm_mlp.fc2_{}"),
    },
    "core": {
        "norm1": ("input_layernorm.{}", "self_attention.linear_qkv.layer_norm_{}"),
        "qkv": ("self_attention.linear_qkv.{}",),
        "out": ("self_attention.linear_proj.{}",),
        "norm2": ("pre_mlp_layernorm.{}", "mlp.linear_fc1.layer_norm_{}"),
        "fc1": ("mlp.linear_fc1.{}",),
        "fc1_up": (),
        "fc2": ("mlp.linear_fc2.{}",),
    },
}
_GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
_UNSUPPORTED = {
    "headscale": True,
    "qk_layernorm": True,
    "num_moe_experts": None,
    "multi_query_attention": True,
    "rotary_interleaved": True,
}


def config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of NeMo's model configuration.

    Raises:
        ModelError: a setting that is missing, damaged or not supported.
    """
    hidden, heads = integer(raw, "megatron", "hidden_size"), integer(raw, "megatron", "num_attention_heads")
    head_dim = (
        head_dim_of("megatron", hidden, heads)
        if raw.get("kv_channels") is None
        else integer(raw, "megatron", "kv_channels")
    )
    for key, value in _UNSUPPORTED.items():
        if raw.get(key) and (value is None or raw[key] == value):
            raise ModelError(f"megatron: {key}={shown(raw[key])} is not supported; only dense decoders without it are")
    if raw.get("transformer_block_type", "pre_ln") != "pre_ln":
        raise ModelError(
            f"megatron: transformer_block_type is {shown(raw['transformer_block_type'])}; only pre_ln is supported"
        )
    positions_key = next(
        (name for name in ("max_position_embeddings", "encoder_seq_length") if raw.get(name) is not None),
        "max_position_embeddings",
    )
    positions = integer(raw, "megatron", positions_key)
    activation, gated = _activation(raw)
    bias = bool(raw.get("bias", True))
    normalization = str(raw.get("normalization", "layernorm")).lower()
    if normalization not in ("layernorm", "layernorm1p", "rmsnorm"):
        raise ModelError(
            f"megatron: normalization {shown(normalization)} is not supported; layernorm, layernorm1p and rmsnorm are"
        )
    norm = Norm(
        "rms_norm" if normalization == "rmsnorm" else "layer_norm",
        number(raw, "megatron", "layernorm_epsilon", default=1e-5),
        bias=normalization != "rmsnorm",
    )
    attention = SelfAttention(
        heads,
        integer(raw, "megatron", "num_query_groups", default=heads),
        head_dim,
        head_dim**-0.5 if raw.get("normalize_attention_scores", True) else 1.0,
        rope=_rope(raw, head_dim),
        bias=bias or bool(raw.get("qkv_bias")),
        output_bias=bias,
    )
    mlp = Mlp(integer(raw, "megatron", "ffn_hidden_size", default=4 * hidden), activation, gated, bias)
    return DecoderConfig(
        family="megatron",
        vocab_size=integer(raw, "megatron", "_vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=positions,
        blocks=repeated("megatron", Block(attention, mlp, norm), integer(raw, "megatron", "num_layers")),
        norm=norm,
        tie_word_embeddings=bool(raw.get("share_embeddings_and_output_weights", True)),
        learned_positions=attention.rope is None,
        **_token_ids(raw),
    )


def _activation(raw: Mapping[str, Any]) -> tuple[Activation, bool]:
    """(activation, gated). `gelu` is erf or tanh by the flags that choose Megatron's implementation (FACTS 6.5)."""
    activation = str(raw.get("activation", "gelu")).removeprefix("fast-")
    gated = activation in _GATED
    name = _GATED.get(activation, {"squared-relu": "relu2"}.get(activation, activation))
    if raw.get("openai_gelu"):  # in NeMo it overrides every activation
        return "gelu_tanh", gated
    if name == "gelu":
        fused = raw.get("bias_activation_fusion", True) and raw.get("bias", True) and not raw.get("onnx_safe")
        tanh = fused or (raw.get("transformer_engine") and not raw.get("mcore_gpt"))
        return ("gelu_tanh" if tanh else "gelu"), gated
    if name in ("silu", "relu", "relu2"):
        return name, gated  # type: ignore[return-value]
    raise ModelError(
        f"megatron: the activation {shown(raw.get('activation'))} is not supported; gelu, squared-relu, relu, swiglu, "
        "geglu and reglu are"
    )


def _rope(raw: Mapping[str, Any], head_dim: int) -> Rope | None:
    kind = raw.get("position_embedding_type", "learned_absolute")
    if kind == "learned_absolute":
        return None
    if kind != "rope":
        raise ModelError(
            f"megatron: position_embedding_type {shown(kind)} is not supported; learned_absolute and rope are"
        )
    dim = int(head_dim * number(raw, "megatron", "rotary_percentage", default=1.0))
    theta = number(raw, "megatron", "rotary_base", default=10000.0)
    factor = number(raw, "megatron", "seq_len_interpolation_factor", default=1.0)
    return Rope(dim, theta, "linear", {"factor": factor}) if factor != 1 else Rope(dim, theta)


def _token_ids(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids of GPT-2's BPE, NeMo's default tokenizer; other tokenizers have them in their own files."""
    is_gpt2 = nested(raw, "tokenizer", "type") == "GPT2BPETokenizer"
    return {"bos_token_id": 50256, "eos_token_ids": (50256,)} if is_gpt2 else {}


def weights(c: DecoderConfig, source: Source) -> dict[str, Tensor]:
    """The weights by canonical name; fused QKV and gated weights are split, zero-centred gains get their 1 back."""
    return _Reader(c, source).read()


class _Reader:
    def __init__(self, c: DecoderConfig, source: Source) -> None:
        self.c, self.source = c, source
        roots = [
            name.removesuffix("embedding.word_embeddings.weight")
            for name in source.tensors
            if name.endswith("embedding.word_embeddings.weight")
        ]
        self.root = roots[0] if roots else "model."
        self.kind = "legacy" if any(".encoder.layers." in f".{name}" for name in source.tensors) else "core"
        self.stack = f"{self.root}{'encoder' if self.kind == 'legacy' else 'decoder'}"
        zero_centred = str(source.config.get("normalization", "")).lower() == "layernorm1p" or source.config.get(
            "layernorm_zero_centered_gamma"
        )
        self.centred = bool(zero_centred)

    def read(self) -> dict[str, Tensor]:
        c, take = self.c, self.source.take
        tensors = {
            "model.embed_tokens.weight": take(
                f"{self.root}embedding.word_embeddings.weight", c.vocab_size, c.hidden_size
            )
        }
        if c.learned_positions:
            tensors["model.embed_positions.weight"] = take(
                f"{self.root}embedding.position_embeddings.weight", c.max_position_embeddings, c.hidden_size
            )
        if c.tie_word_embeddings:
            self.source.skip("model.word_embeddings.weight")
        tensors |= self.source.head(c, f"{self.root}output_layer.weight", tensors["model.embed_tokens.weight"])
        for n in range(len(c.blocks)):
            tensors |= self._layer(n)
        tensors |= {
            f"model.norm.{kind}": self._gain(kind, take(f"{self.stack}.final_layernorm.{kind}", c.hidden_size))
            for kind in self._norm_kinds()
        }
        return tensors

    def _norm_kinds(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.c.blocks[0].norm.bias else ("weight",)

    def _gain(self, kind: str, tensor: Tensor) -> Tensor:
        return plus_one(tensor) if kind == "weight" and self.centred else tensor

    def _take(self, layer: int, part: str, kind: str, *shape: int) -> Tensor:
        """The weight or bias of a layer, by the first of its spellings that the checkpoint has."""
        names = [f"{self.stack}.layers.{layer}.{spelling.format(kind)}" for spelling in _LAYER_NAMES[self.kind][part]]
        return self.source.take(next((name for name in names if name in self.source), names[0]), *shape)

    def _layer(self, n: int) -> dict[str, Tensor]:
        c, to, block = self.c, f"model.layers.{n}", self.c.blocks[n]
        attention, mlp, tensors = block.attention, block.inner, dict[str, Tensor]()
        assert isinstance(attention, SelfAttention)
        for kind in self._norm_kinds():
            tensors[f"{to}.input_layernorm.{kind}"] = self._gain(kind, self._take(n, "norm1", kind, c.hidden_size))
            tensors[f"{to}.post_attention_layernorm.{kind}"] = self._gain(
                kind, self._take(n, "norm2", kind, c.hidden_size)
            )
        for kind in ("weight", "bias") if attention.bias else ("weight",):
            wide = (c.hidden_size,) if kind == "weight" else ()
            fused = self._take(n, "qkv", kind, attention.q_size + 2 * attention.kv_size, *wide)
            for name, ranges in zip("qkv", self._qkv_rows(attention), strict=True):
                tensors[f"{to}.self_attn.{name}_proj.{kind}"] = pick_rows(fused, ranges, name)
        for kind in ("weight", "bias") if mlp.bias else ("weight",):
            wide = (c.hidden_size,) if kind == "weight" else ()
            tensors[f"{to}.self_attn.o_proj.{kind}"] = self._take(
                n, "out", kind, c.hidden_size, *((attention.q_size,) if kind == "weight" else ())
            )
            tensors |= {f"{to}.mlp.{name}.{kind}": tensor for name, tensor in self._fc1(n, kind, mlp, wide).items()}
            tensors[f"{to}.mlp.down_proj.{kind}"] = self._take(
                n, "fc2", kind, c.hidden_size, *((mlp.size,) if kind == "weight" else ())
            )
        return tensors

    def _fc1(self, n: int, kind: str, mlp: Mlp, wide: tuple[int, ...]) -> dict[str, Tensor]:
        """The first linear layers of the MLP; gated ones are [gate; up] in one weight, or two (`dense_h_to_4h_2`)."""
        size = mlp.size
        if not mlp.gated:
            return {"up_proj": self._take(n, "fc1", kind, size, *wide)}
        if f"{self.stack}.layers.{n}.mlp.dense_h_to_4h_2.{kind}" in self.source:
            return {
                "gate_proj": self._take(n, "fc1", kind, size, *wide),
                "up_proj": self._take(n, "fc1_up", kind, size, *wide),
            }
        fused = self._take(n, "fc1", kind, 2 * size, *wide)
        return {"gate_proj": row_range(fused, 0, size), "up_proj": row_range(fused, size, 2 * size)}

    def _qkv_rows(self, c: SelfAttention) -> list[list[tuple[int, int]]]:
        """Row ranges of q, k and v in the fused weight.

        Its rows are [groups, heads / groups + 2, head_dim], or [3, heads, head_dim] with `megatron_legacy`.
        """
        if self.source.config.get("megatron_legacy"):
            return [[(i * c.q_size, (i + 1) * c.q_size)] for i in range(3)]
        return group_rows(c)


_FP8_MODULES: dict[str, tuple[tuple[str, int, tuple[str, ...]], ...]] = {
    # (TransformerEngine's module, index of the GEMM's activation scale in scale_fwd, canonical linear layers).
    # scale_fwd has 3 slots per GEMM.
    "legacy": (
        ("self_attention.layernorm_qkv", 0, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attention.proj", 0, ("self_attn.o_proj",)),
        ("layernorm_mlp", 0, ("mlp.gate_proj", "mlp.up_proj")),
        ("layernorm_mlp", 3, ("mlp.down_proj",)),
    ),
    "core": (
        ("self_attention.linear_qkv", 0, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attention.linear_proj", 0, ("self_attn.o_proj",)),
        ("mlp.linear_fc1", 0, ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.linear_fc2", 0, ("mlp.down_proj",)),
    ),
}


def scales(c: DecoderConfig, source: Source) -> dict[str, FP8Scales]:
    """FP8 scales by canonical layer name, from TransformerEngine's extra state.

    scale_fwd multiplies before the cast, so ONNX's scale is its reciprocal.
    """
    reader = _Reader(c, source)
    by_layer: dict[str, FP8Scales] = {}
    for n in range(len(c.blocks)):
        for module, slot, linears in _FP8_MODULES[reader.kind]:
            forward = forward_scales(source.tensors.get(f"{reader.stack}.layers.{n}.{module}._extra_state"), module)
            if forward is None:
                continue
            pair = FP8Scales(float(1 / forward[slot]), float(1 / forward[slot + 1]))
            by_layer.update(
                {
                    f"model.layers.{n}.{linear}": pair
                    for linear in linears
                    if c.blocks[n].inner.gated or linear != "mlp.gate_proj"
                }
            )
    return by_layer


FAMILY = Family(
    "megatron", ("megatron",), config, weights, scales=scales,
    ignored=("*_extra_state", "*.inv_freq", "*.core_attention.*"),
    example={
        "num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "max_position_embeddings": 2048,
        "_vocab_size": 50304,
        "ffn_hidden_size": 8192, "position_embedding_type": "rope", "rotary_percentage": 0.5,
        "activation": "fast-swiglu", "bias": False,
        "normalization": "layernorm1p", "share_embeddings_and_output_weights": False,
    },
)  # fmt: skip
