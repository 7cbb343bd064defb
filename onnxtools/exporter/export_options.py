"""`ExportOptions`: the one definition behind `export`'s flags, its YAML keys and the record in onnxtools.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnxtools.base import registry
from onnxtools.base.errors import UsageError
from onnxtools.base.options import option

OLDEST_OPSET, NEWEST_OPSET = 19, 24


@dataclass(frozen=True)
class ExportOptions:
    """How the graph is written, and the sizes of a random model."""

    kv_cache: Literal["concat", "scatter", "gqa", "none"] = option(
        "concat",
        "concat: past and present, standard ONNX. scatter: static cache, TensorScatter-24. gqa: "
        "com.microsoft.GroupQueryAttention. none: no cache.",
    )
    cache_length: int | None = option(None, "Length of scatter's static cache. [default: the model's longest sequence]")
    logits: Literal["all", "last"] = option("all", "Logits of all new tokens, or of the last real one of each row.")
    opset: int = option(
        24, "24 is the canonical form; 19 writes norms, rotary embedding and attention in primitive operators."
    )
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = option(
        "auto", "Type of weights and activations; norms, softmax and logits are fp32. auto is the checkpoint's."
    )
    use_one_input: bool = option(
        False, "input_ids (and the cache) are the only inputs: no attention_mask, no position_ids, so no padding."
    )
    weights: bool = option(True, "Write the weights; off writes the graph alone.")
    copy_weights: bool = option(
        False, "Copy weights even where the graph could refer to the checkpoint in the same folder."
    )
    revision: str | None = option(None, "Branch, tag or commit of a name of the Hugging Face hub. [default: main]")
    random: bool = option(
        False, "Random weights. The sizes come from a folder with config.json, or from --family and the options below."
    )
    family: str | None = option(
        None,
        f"Family of a random model without a folder: {', '.join(registry.names(registry.FAMILIES))}. [default: gpt2]",
    )
    n_layer: int | None = option(None, "Layers of a random model.")
    n_embd: int | None = option(None, "Hidden size of a random model.")
    n_head: int | None = option(None, "Attention heads of a random model.")
    n_kv_head: int | None = option(None, "Key/value heads of a random model.")
    n_inner: int | None = option(None, "Size of the MLP of a random model. [default: 4 x --n-embd]")
    n_positions: int | None = option(None, "Longest sequence of a random model.")
    vocab_size: int | None = option(None, "Vocabulary of a random model.")

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_embd", "n_head", "n_kv_head", "n_inner", "n_positions", "vocab_size", "family"):
            value = getattr(self, name)
            if value is not None and not self.random:
                raise UsageError(
                    f"export: --{name.replace('_', '-')} is of a random model; add --random, or leave it out"
                )
            if isinstance(value, int) and value < 1:
                raise UsageError(f"export: --{name.replace('_', '-')} is {value}; it takes 1 or more")
        if self.copy_weights and not self.weights:
            raise UsageError("export: --copy-weights and --no-weights contradict each other; leave one out")
        if not OLDEST_OPSET <= self.opset <= NEWEST_OPSET:
            raise UsageError(f"export: opset is {self.opset}; it takes {OLDEST_OPSET} to {NEWEST_OPSET}")
        if self.kv_cache == "scatter" and self.opset < 24:
            raise UsageError(
                f"export: --kv-cache scatter needs opset 24 (TensorScatter) and opset is {self.opset}; use --opset 24 "
                "or --kv-cache concat"
            )
        if self.cache_length is not None and (self.kv_cache != "scatter" or self.cache_length < 1):
            raise UsageError(
                f"export: cache_length is {self.cache_length} with --kv-cache {self.kv_cache}; it is the positive "
                "length of a scatter cache"
            )
        if self.use_one_input and self.kv_cache in ("scatter", "gqa"):
            raise UsageError(
                f"export: --kv-cache {self.kv_cache} needs to be told how full the cache is; use --use-one-input with "
                "concat or none"
            )
