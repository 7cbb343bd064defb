"""`Names`: where a family keeps its weights in a checkpoint, for all families that only rename and fuse."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from onnxtools.exporter.config import DecoderConfig, LatentAttention, SelfAttention
from onnxtools.exporter.family import Source
from onnxtools.exporter.weight_shapes import weight_shapes
from onnxtools.storage.lazy import Tensor, columns, flatten, folded, pick_rows, plus_one, row_range

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+?)(\.weight|\.bias)?")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Names:
    """Names of a checkpoint's weights, and what of them is fused.

    A module that has no entry keeps its canonical name (that of Llama).

    Attributes:
        layer: the name of layer `{}`.
        modules: canonical module of a layer, or `mlp.experts.{}.part`, to its name behind `layer`.
        top: canonical module outside the layers to its name.
        qkv: the module of a layer that holds queries, keys and values.
        qkv_rows: its rows: `parts`: [queries; keys; values]; `groups`: [key/value heads, queries of it + 2, head_dim].
        gate_up: the module of a layer that holds the rows of gate and up.
        plus_one: gains of norms are stored minus one.
        prefix: a first part of all names but the head's, which a model saved without its head lacks.
    """

    layer: str = "model.layers.{}"
    modules: Mapping[str, str] = field(default_factory=dict)
    top: Mapping[str, str] = field(default_factory=dict)
    qkv: str | None = None
    qkv_rows: Literal["parts", "groups"] = "parts"
    gate_up: str | None = None
    plus_one: bool = False
    prefix: str = "model."

    def read(self, c: DecoderConfig, source: Source, own: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The weights by canonical name, for every name of `weight_shapes`; those in `own` are not looked up."""
        return _Reader(self, c, source).read(own or {})


class _Reader:
    def __init__(self, names: Names, c: DecoderConfig, source: Source) -> None:
        self.names, self.c, self.source = names, c, source
        table = self.top("model.embed_tokens")
        # A model saved without its head (GPT2Model) has names without the prefix.
        self.headless = f"{table}.weight" not in source and f"{table.removeprefix(names.prefix)}.weight" in source

    def read(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = dict(own)
        for name, shape in weight_shapes(self.c).items():
            if name == "lm_head.weight" or name in own:
                continue
            tensor = self.weight(name, shape)
            tensors[name] = plus_one(tensor) if self.names.plus_one and name.endswith("norm.weight") else tensor
        return tensors | self.source.head(self.c, f"{self.top('lm_head')}.weight", tensors["model.embed_tokens.weight"])

    def weight(self, name: str, shape: tuple[int, ...]) -> Tensor:
        layer = _LAYER.fullmatch(name)
        if layer is None:
            module, _, kind = name.rpartition(".")
            return self.take(f"{self.top(module)}.{kind}", *shape)
        n, module, kind = int(layer[1]), layer[2], layer[3] or ""
        if self.names.qkv is not None and module in _QKV:
            return self.qkv(n, module, kind, shape)
        if self.names.gate_up is not None and module in ("mlp.gate_proj", "mlp.up_proj"):
            fused = self.take(self.within(n, self.names.gate_up, kind), 2 * shape[0], *shape[1:])
            return (
                row_range(fused, 0, shape[0]) if module == "mlp.gate_proj" else row_range(fused, shape[0], 2 * shape[0])
            )
        if module in _LATENT:
            return self.latent(n, module)
        return self.take(self.within(n, self.module(module), kind), *shape)

    def top(self, module: str) -> str:
        return self.names.top.get(module, module)

    def within(self, n: int, module: str, kind: str) -> str:
        return f"{self.names.layer.format(n)}.{module}{kind}"

    def module(self, module: str) -> str:
        expert = _EXPERT.fullmatch(module)
        if expert is not None:
            return self.names.modules.get(f"mlp.experts.{{}}.{expert[2]}", f"mlp.experts.{{}}.{expert[2]}").format(
                expert[1]
            )
        return self.names.modules.get(module, module)

    def take(self, name: str, *shape: int) -> Tensor:
        return self.source.take(name.removeprefix(self.names.prefix) if self.headless else name, *shape)

    def qkv(self, n: int, module: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        """The rows (of Conv1D's weights, the columns) of queries, keys or values."""
        a, beside = self.c.blocks[n].attention, self.c.linear_in_out and kind == ".weight"
        assert isinstance(a, SelfAttention) and self.names.qkv is not None
        sizes, part = (a.q_size, a.kv_size, a.kv_size), _QKV.index(module)
        whole = (shape[0], sum(sizes)) if beside else (sum(sizes), *shape[1:])
        fused = self.take(self.within(n, self.names.qkv, kind), *whole)
        if self.names.qkv_rows == "groups":
            return pick_rows(fused, group_rows(a)[part], module)
        start = sum(sizes[:part])
        return (columns if beside else row_range)(fused, start, start + sizes[part])

    def latent(self, n: int, module: str) -> Tensor:
        """The up-projection of the latent to keys or values, [heads, channels, rank].

        Its rows in the checkpoint are [heads, key channels + value channels].
        """
        a = self.c.blocks[n].attention
        assert isinstance(a, LatentAttention)
        each = a.nope_dim + a.value_dim
        fused = self.take(self.within(n, self.module("self_attn.kv_b_proj"), ".weight"), a.heads * each, a.kv_rank)
        low, high = (0, a.nope_dim) if module == "self_attn.k_b_proj" else (a.nope_dim, each)
        rows = pick_rows(fused, [(head * each + low, head * each + high) for head in range(a.heads)], module)
        return folded(rows, a.heads)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LATENT = ("self_attn.k_b_proj", "self_attn.v_b_proj")


def group_rows(a: SelfAttention) -> list[list[tuple[int, int]]]:
    """Row ranges of queries, keys and values in a weight of rows [kv_heads, heads / kv_heads + 2, head_dim]."""
    each, d = a.heads // a.kv_heads, a.head_dim
    starts = [group * (each + 2) * d for group in range(a.kv_heads)]
    spans = ((0, each), (each, each + 1), (each + 1, each + 2))
    return [flatten([[(start + first * d, start + last * d)] for start in starts]) for first, last in spans]
