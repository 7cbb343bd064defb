"""Write the ONNX graph of a checkpoint (NeMo, Hugging Face, GGUF) or of random weights, straight from its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxtools.base.errors import UsageError
from onnxtools.base.options import option
from onnxtools.cli.flags import OUTPUT_OPTION, PATH, check_output, from_parameters, make_command, one_output
from onnxtools.exporter.export_options import ExportOptions

if TYPE_CHECKING:
    from onnxtools.exporter.export import Exported

_HELP = """Write SOURCE as an ONNX model with a KV cache; no tracing, no GPU, no framework of the checkpoint's author.

SOURCE is a Hugging Face folder (config.json with safetensors or .bin) or a name on its hub, a .nemo archive or its
unpacked folder, a Megatron .ckpt, or a .gguf file. Weights go from their file to ours one piece at a time; in the
folder of the checkpoint itself the graph refers to them where they lie. The tokenizer's files and onnxtools.json
(what the model is) go beside the output.

Every option can come from a YAML file (--config; keys as below, and `source`, `output`), and --set overrides it.

\b
Examples:
  onnxtools export ./SmolLM2 -o model.onnx
  onnxtools export Qwen/Qwen3-0.6B -o model.onnx
  onnxtools export model.nemo -o model.onnx --dtype bf16
  onnxtools export SmolLM2.Q4_1.gguf -o model.onnx
  onnxtools export --random --n-layer 96 --n-embd 12288 --n-head 96 --no-weights -o gpt175b.onnx
  onnxtools export --config config.yaml --set dtype=fp16
"""


@dataclass(frozen=True)
class ConfigOptions:
    """Where `export` has its options from, beside its flags."""

    config: Path | None = option(None, "Options as YAML.", path=True)
    set: tuple[str, ...] = option((), "An option's value; wins over --config.", metavar="KEY=VALUE")


def _callback(
    source: Path | None, output: Path | None, output_option: Path | None, as_json: bool, **values: Any
) -> None:
    from onnxtools.exporter.export import export

    config: ConfigOptions = from_parameters(ConfigOptions, values)
    given = _settings(config.config, config.set)
    if source is not None and output is None and output_option is None and source.suffix == ".onnx":
        source, output = None, source  # --random takes no SOURCE
    from_file = {key: _path(given, key, config.config) for key in ("source", "output")}
    source = source or from_file["source"]
    output = one_output(
        output, output_option or (from_file["output"] if output is None else None), "export SOURCE -o MODEL.onnx"
    )
    check_output(output)
    _show(export(source, output, from_parameters(ExportOptions, values, given)), source, as_json)


def _settings(config_path: Path | None, settings: tuple[str, ...]) -> dict[str, Any]:
    """Option values of a YAML file, then of `key=value` settings."""
    from onnxtools.base.inputs import parse_yaml
    from onnxtools.pipeline.recipe_file import read_yaml

    options = read_yaml(config_path, "a configuration") if config_path is not None else {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"export: --set takes key=value, not {setting!r}")
        try:
            options[key.strip()] = parse_yaml(value)
        except ValueError:
            raise UsageError(f"export: --set {setting!r} is not YAML; quote the value") from None
    return {str(key).replace("-", "_"): value for key, value in options.items()}


def _path(given: dict[str, Any], key: str, config_path: Path | None) -> Path | None:
    """A path of the YAML file, relative to it."""
    value = given.pop(key, None)
    if value is None:
        return None
    return (config_path.parent if config_path is not None else Path()) / str(value)


command = make_command(
    "export",
    _HELP,
    _callback,
    [
        click.Argument(["source"], metavar="[SOURCE]", type=PATH, required=False),
        click.Argument(["output"], metavar="[OUTPUT]", type=PATH, required=False),
        OUTPUT_OPTION,
    ],
    [ConfigOptions, ExportOptions],
)


def _show(exported: Exported, source: Path | None, as_json: bool) -> None:
    from onnxtools.cli.render import console, print_json, size, table

    c, path = exported.config, exported.saved.path
    if as_json:
        print_json({
            "output": str(path), "source": str(source) if source else None,
            "config": {**c.to_json(), **c.tokens_json()}, "weight_bytes": exported.model.weight_bytes(),
            "files": [str(file) for file in exported.saved.beside], "notes": [*exported.notes, *exported.saved.lines()],
        })  # fmt: skip
        return
    a, m = c.blocks[0].attention, c.blocks[0].inner
    attention = f"{a.heads} heads of {a.head_dim}, {a.kv_heads} for keys and values"
    mlp = f"{m.size}, {m.activation}{', gated' if m.gated else ''}"
    rotary = [f"rotary, {rope.dim} of {a.head_dim} channels, {rope.kind}" for rope in c.ropes[:1]]
    positions = rotary[0] if rotary else "learned" if c.learned_positions else "ALiBi"
    rows = [
        ("family", c.family), ("layers", str(len(c.blocks))), ("hidden", str(c.hidden_size)), ("attention", attention),
        ("MLP", mlp),
        ("norm", c.blocks[0].norm.kind), ("positions", f"{positions}, up to {c.max_position_embeddings}"),
        ("vocabulary", f"{c.vocab_size}{', tied' if c.tie_word_embeddings else ''}"),
        ("weights", size(exported.model.weight_bytes())),
    ]  # fmt: skip
    table(f"export: {source or 'random weights'} -> {path}", ("", ""), rows)
    beside = ", ".join(file.name for file in exported.saved.beside)
    for line in (*exported.notes, *exported.saved.lines(), f"beside it: {beside}"):
        console().print(f"  {line}", markup=False)
