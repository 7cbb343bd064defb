"""Continue prompts with a model, in any runtime."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxtools.base.errors import JobError, UsageError
from onnxtools.cli.flags import PATH, from_parameters
from onnxtools.cli.runtimes import open_tokenizer, opened, runtime_command, runtime_options, say_notes
from onnxtools.generation.generation_options import GenerationOptions

if TYPE_CHECKING:
    from onnxtools.checkpoints.tokenizer import Tokenizer
    from onnxtools.generation.prompts import Text
    from onnxtools.generation.runtime import Runtime

_HELP = """Continue prompts with MODEL: an ONNX file, a TensorRT engine, or a checkpoint.

    Greedy search unless a temperature, top-k, top-p or beams are given. Several prompts run as one batch. --json
    prints sentences, tokens, logprob (of the new tokens), token_ids and offsets.

    \b
    Examples:
      onnxtools run model.onnx --prompt "The capital of France is"
      echo "The capital of France is" | onnxtools run model.onnx
      onnxtools run model.onnx --prompt "Once upon a time" --temperature 0.8 --top-p 0.9 --max-new-tokens 100
      onnxtools run model.onnx --prompt "2 + 2 =" --num-beams 4 --runtime frameworks --checkpoint ./SmolLM2
    """


def _callback(
    model: Path,
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    batch_size: int,
    runtimes: tuple[str, ...],
    tokenizer_path: Path | None,
    as_json: bool,
    debug: bool,
    **given: Any,
) -> None:
    from onnxtools.cli.render import print_json

    texts = _prompts(prompts, prompts_file)
    options: GenerationOptions = from_parameters(GenerationOptions, given)
    result: dict[str, Any] = {}
    with opened(model, runtimes, runtime_options(given)) as made:
        say_notes(made)
        for runtime in made:
            found = _run(
                runtime,
                open_tokenizer(tokenizer_path, runtime, model),
                texts,
                options,
                batch_size,
                as_json,
                len(made) > 1,
            )
            result[runtime.name] = found
    if as_json:
        print_json({"model": str(model), "runtimes": result})


def _prompts(prompts: tuple[str, ...], file: Path | None) -> list[str]:
    found = list(prompts)
    if file is None and not found and not sys.stdin.isatty():
        file = Path("-")
    if file is not None:
        try:
            text = (
                sys.stdin.buffer.read().decode("utf-8-sig")
                if str(file) == "-"
                else file.read_text(encoding="utf-8-sig")
            )
        except (OSError, UnicodeDecodeError) as error:
            raise JobError(f"{file}: cannot be read ({error}); give a text file with a prompt a line") from None
        found += [line for line in text.split("\n") if line.strip()]
    if not found:
        raise UsageError("there is no prompt; give --prompt, --prompts-file, or a prompt a line on stdin")
    empty = next((i for i, text in enumerate(found) if not text), None)
    if empty is not None:
        raise UsageError(f"prompt {empty} is empty; give some text")
    return found


def _run(
    runtime: Runtime,
    tokenizer: Tokenizer,
    texts: list[str],
    options: GenerationOptions,
    batch: int,
    as_json: bool,
    titled: bool,
) -> list[dict[str, Any]]:
    """Run, print unless `as_json`, and return what `--json` says of this runtime, a mapping for each beam."""
    from onnxtools.generation.prompts import as_demo, continue_texts

    if titled and not as_json:
        click.echo(f"[{runtime.name}]")
    # One greedy or sampled text is shown while it grows.
    streams = len(texts) == 1 and options.num_beams == 1 and not as_json
    waiting = texts[:1]  # the prompt comes with the first piece, so that nothing comes before an error

    def show(_: int, piece: str) -> None:
        click.echo("".join(waiting) + piece, nl=False)
        waiting.clear()

    found = continue_texts(
        runtime, tokenizer, texts, options, batch_size=batch, show=show if streams else None, logprobs=as_json
    )
    if streams:
        click.echo("".join(waiting))
    elif not as_json:
        _print(found)
    return [as_demo([beams[i] for beams in found]) for i in range(options.num_return_sequences)]


def _print(found: list[list[Text]]) -> None:
    for index, beams in enumerate(found):
        if len(found) > 1:
            click.echo(f"--- {index}")
        for number, text in enumerate(beams):
            click.echo(
                f"beam {number} result ({text.score:.4f}): {text.sentence}" if text.score is not None else text.sentence
            )


command = runtime_command(
    "run", _HELP, _callback, options=GenerationOptions,
    extra=[
        click.Option(["--prompt", "prompts"], multiple=True, help="A text to continue. May be given several times."),
        click.Option(["--prompts-file"], type=PATH,
            help="A text file with a prompt a line; - is stdin, as is no prompt at all."),
        click.Option(["--batch-size"], type=click.IntRange(0), default=0, help="Prompts run together. [default: all]"),
    ],
)  # fmt: skip
