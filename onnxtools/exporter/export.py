"""`export`: writes a checkpoint, or a random model of given sizes, as an ONNX file.

The tokenizer and onnxtools.json are written beside it.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxtools.analysis.cache import CacheSpec
from onnxtools.base import registry
from onnxtools.base.dtypes import BY_NAME
from onnxtools.base.errors import ModelError, UsageError
from onnxtools.base.version import __version__
from onnxtools.checkpoints.beside import check_folder
from onnxtools.checkpoints.checkpoint import Checkpoint
from onnxtools.checkpoints.converted_tokenizer import add_tokenizer
from onnxtools.checkpoints.hub import fetched
from onnxtools.checkpoints.open import open_checkpoint
from onnxtools.exporter.config import DecoderConfig
from onnxtools.exporter.decoder import build_decoder
from onnxtools.exporter.export_options import ExportOptions
from onnxtools.exporter.family import Family, Source, Weights, family_for
from onnxtools.exporter.weight_shapes import weight_shapes
from onnxtools.ir import description
from onnxtools.ir.description import INFO_FILE
from onnxtools.ir.model import Model
from onnxtools.storage.lazy import RandomRows, Tensor
from onnxtools.storage.quantized_weight import QuantizedWeight
from onnxtools.storage.save import SaveReport

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_SIZES = {
    "n_layer": ("n_layer", "num_hidden_layers", "num_layers", "n_layers"),
    "n_embd": ("n_embd", "hidden_size", "d_model"), "n_head": ("n_head", "num_attention_heads", "n_heads", "num_heads"),
    "n_kv_head": ("num_key_value_heads", "num_query_groups"),
    "n_inner": ("n_inner", "intermediate_size", "ffn_hidden_size", "ffn_dim"),
    "n_positions": ("n_positions", "max_position_embeddings", "max_seq_len", "seq_length"),
    "vocab_size": ("_vocab_size", "vocab_size"),
}  # fmt: skip
"""Size options of `export` to their spellings in configurations.

The first spelling that the family's example has is set, or else the first of all.
"""


@dataclass
class Exported:
    """The result of an export.

    Attributes:
        model: the graph, as it was saved.
        config: the decoder that it holds.
        saved: what was written.
        notes: notes on the checkpoint, for people.
    """

    model: Model
    config: DecoderConfig
    saved: SaveReport
    notes: list[str]


def export(source: str | os.PathLike[str] | None, output: str | os.PathLike[str], options: ExportOptions) -> Exported:
    """Write `output` (.onnx), its data file, the tokenizer's files and onnxtools.json.

    Args:
        source: Hugging Face folder or name on its hub, .nemo archive or folder, .ckpt or .gguf; None with
            `options.random`.
        output: path of the .onnx file.
        options: how the graph is written.

    Raises:
        UsageError: neither a source nor --random.
        ModelError: the checkpoint cannot be read, or its weights do not fit its configuration.
    """
    if source is None and not options.random:
        raise UsageError("export: name a checkpoint, or say --random")
    output = Path(output)
    checkpoint = _checkpoint(Path(source), options) if source is not None else None
    config, weights, dtype = _random(checkpoint, options) if options.random else _bound(_opened(checkpoint), options)
    model = build_decoder(config, options, weights, dtype)
    info = describe(config, options, dtype)
    files: dict[str, Path | bytes] = {
        **(checkpoint.files if checkpoint is not None else {}),
        INFO_FILE: description.write(model, info),
    }
    check_folder(output, files)
    saved = model.save(output, copy_weights=options.copy_weights, weights=options.weights, beside=files)
    return Exported(model, config, saved, list(checkpoint.notes) if checkpoint is not None else [])


def _checkpoint(source: Path, options: ExportOptions) -> Checkpoint:
    path = fetched(source, options.revision, weights=not options.random)
    if options.revision is not None and path == source:
        raise UsageError(f"export: --revision is of a name of the hub, and {source} is a path; leave it out")
    checkpoint = open_checkpoint(path, weights=not options.random)
    if path != source:
        checkpoint.notes.append(f"{source} at revision {path.name}, in {path}")
    add_tokenizer(checkpoint)
    return checkpoint


def _opened(checkpoint: Checkpoint | None) -> Checkpoint:
    assert checkpoint is not None
    return checkpoint


def _bound(checkpoint: Checkpoint, options: ExportOptions) -> tuple[DecoderConfig, Weights, ir.DataType]:
    """The configuration, every weight by canonical name, and the compute type of a checkpoint."""
    family = family_for(checkpoint.architecture, str(checkpoint.path))
    config = _configured(family, checkpoint.config, str(checkpoint.path))
    if len(config.blocks) > len(checkpoint.tensors):
        raise ModelError(
            f"{checkpoint.path}: {len(config.blocks)} layers need more than its {len(checkpoint.tensors)} weights; "
            "fetch it again"
        )
    source = Source(checkpoint.tensors, checkpoint.config)
    tensors = family.weights(config, source)
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        config = dataclasses.replace(config, tie_word_embeddings=False)
        checkpoint.notes.append(
            "warning: the head is said to be the embedding, but a different one is stored; it is used, as transformers "
            "does"
        )
    source.check(str(checkpoint.path), (*family.ignored, *map(glob.escape, checkpoint.spare)))
    forgotten = [name for name in weight_shapes(config) if name not in tensors]
    if forgotten:
        raise ModelError(
            f"{checkpoint.path}: the family {family.name!r} gives no {forgotten[0]!r} ({len(forgotten)} weights); mend "
            "its `weights`"
        )
    scales = family.scales(config, source)
    if scales:
        checkpoint.notes.append(f"FP8 scales of {len(scales)} linear layers became QuantizeLinear and DequantizeLinear")
    if scales and all(s.activation == 1 for s in scales.values()):
        checkpoint.notes.append("warning: every FP8 activation scale is 1: the checkpoint was never calibrated in FP8")
    return config, Weights(tensors, scales), _dtype(options, tensors)


def _configured(family: Family, raw: Mapping[str, Any], label: str) -> DecoderConfig:
    """The configuration that the family reads from `raw`; an error names `label`, its origin.

    Raises:
        ModelError: the configuration is not of this family, or damaged.
    """
    try:
        return family.config(raw)
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from None
    # A damaged configuration can raise nearly any exception.
    except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError) as error:
        raise ModelError(
            f"{label}: its configuration is damaged ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _dtype(options: ExportOptions, weights: Mapping[str, Tensor]) -> ir.DataType:
    if options.dtype != "auto":
        return BY_NAME[options.dtype]
    first = weights["model.layers.0.self_attn.o_proj.weight"]
    stored = first.parts.scale.dtype if isinstance(first, QuantizedWeight) else first.dtype
    if isinstance(first, QuantizedWeight) and stored == ir.DataType.FLOAT:  # scales say nothing then
        stored = weights["model.embed_tokens.weight"].dtype
    return stored if stored in _FLOATS else ir.DataType.FLOAT


def _random(checkpoint: Checkpoint | None, options: ExportOptions) -> tuple[DecoderConfig, Weights, ir.DataType]:
    """A random model: Normal(0, 0.02) weights as in GPT-2's initialization, gains near 1.

    Equal sizes give equal weights.
    """
    if checkpoint is None:
        family: Family = registry.load(options.family or "gpt2", registry.FAMILIES)
        raw: dict[str, Any] = dict(family.example)
        label = f"--family {family.name}"
        if not raw:
            raise UsageError(
                f"export: family {options.family!r} has no sizes of its own; name a folder with config.json"
            )
    else:
        family, raw, label = (
            family_for(checkpoint.architecture, str(checkpoint.path)),
            dict(checkpoint.config),
            str(checkpoint.path),
        )
        if options.family:
            raise UsageError(f"export: {label} says what family it is; leave out --family")
    for name, spellings in _SIZES.items():
        value = getattr(options, name)
        if value is not None:
            if name == "n_kv_head" and not any(s in family.example for s in spellings):
                raise UsageError(
                    f"export: family {family.name} has as many key/value heads as heads, or one; leave out --n-kv-head"
                )
            raw[next((s for s in spellings if s in family.example), spellings[0])] = value
    if options.n_embd and not options.n_inner:
        raw.update({name: 4 * options.n_embd for name in _SIZES["n_inner"] if name in raw})
    if options.n_head and not options.n_kv_head:
        raw.update({name: options.n_head for name in _SIZES["n_kv_head"] if name in raw})
    if options.n_embd or options.n_head:
        raw.pop("head_dim", None)
    if raw.get("_vocab_size", 0) is None:
        raise UsageError(f"export: {label} does not say how large the vocabulary is; add --vocab-size")
    config = _configured(family, raw, label)
    _check_sizes(config, options)
    dtype = BY_NAME["fp16" if options.dtype == "auto" else options.dtype]
    tensors: dict[str, Tensor] = {}
    for name, shape in weight_shapes(config).items():
        is_gain = name.endswith("norm.weight")
        tensors[name] = RandomRows(shape, dtype, name, 1.0 if is_gain else 0.0, 0.02)
    return config, Weights(tensors), dtype


def _check_sizes(config: DecoderConfig, options: ExportOptions) -> None:
    """Refuse a size option that the family's configuration does not have, so that none is ignored."""
    block = config.blocks[0]
    made = {
        "n_layer": len(config.blocks), "n_embd": config.hidden_size, "n_head": block.attention.heads,
        "n_kv_head": block.attention.kv_heads, "n_inner": block.inner.size,
        "n_positions": config.max_position_embeddings, "vocab_size": config.vocab_size,
    }  # fmt: skip
    for name, value in made.items():
        asked = getattr(options, name)
        if asked is not None and asked != value:
            raise UsageError(
                f"export: family {config.family} has no --{name.replace('_', '-')} of its own, it stays {value}; leave "
                "it out, or name a folder with config.json"
            )


def describe(config: DecoderConfig, options: ExportOptions, dtype: ir.DataType) -> dict[str, Any]:
    """The content of onnxtools.json: what the model is, for runtimes and engine profiles."""
    length = (options.cache_length or config.max_position_embeddings) if options.kv_cache == "scatter" else None
    heads, of_keys, of_values = config.blocks[0].attention.cache_sizes
    cache = CacheSpec(
        options.kv_cache,
        layers=len(config.blocks),
        heads=heads,
        head_dim=of_keys if of_keys == of_values else 0,
        dtype=dtype,
        length=length,
    )
    return {
        "format": 1,
        "producer": f"onnxtools {__version__}",
        "model": config.to_json(),
        "tokens": config.tokens_json(),
        "dtype": next(name for name, value in BY_NAME.items() if value == dtype),
        "kv_cache": cache.to_json() if options.kv_cache != "none" else None,
        "logits": options.logits,
        "options": {
            f.name: getattr(options, f.name)
            for f in dataclasses.fields(options)
            if getattr(options, f.name) != f.default
        },
    }
