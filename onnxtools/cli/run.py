"""Continue prompts with a model, in any runtime."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.options import option
from onnxtools.cli.flags import from_parameters
from onnxtools.cli.runtimes import RuntimeChoice, open_tokenizer, opened, runtime_command, say_notes
from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.runtime import RuntimeOptions

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


@dataclass(frozen=True)
class PromptOptions:
    """What `run` continues."""

    prompt: tuple[str, ...] = option((), "A text to continue.")
    prompts_file: Path | None = option(
        None, "A text file with a prompt a line; - is stdin, as is no prompt at all.", path=True
    )
    batch_size: int = option(0, "Prompts run together; 0 is all.", minimum=0)


def _callback(model: Path, as_json: bool, **values: Any) -> None:
    from onnxtools.cli.render import print_json

    prompts: PromptOptions = from_parameters(PromptOptions, values)
    texts = _prompts(prompts.prompt, prompts.prompts_file)
    options: GenerationOptions = from_parameters(GenerationOptions, values)
    choice: RuntimeChoice = from_parameters(RuntimeChoice, values)
    result: dict[str, Any] = {}
    with opened(model, choice.runtime, from_parameters(RuntimeOptions, values)) as runtimes:
        say_notes(runtimes)
        for runtime in runtimes:
            if len(runtimes) > 1 and not as_json:
                click.echo(f"[{runtime.name}]")
            tokenizer = open_tokenizer(choice.tokenizer, runtime, model)
            result[runtime.name] = _run(runtime, tokenizer, texts, options, prompts.batch_size, as_json)
    if as_json:
        print_json({"model": str(model), "runtimes": result})


def _prompts(prompts: tuple[str, ...], file: Path | None) -> list[str]:
    texts = list(prompts)
    if file is None and not texts and not sys.stdin.isatty():
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
        texts += [line for line in text.split("\n") if line.strip()]
    if not texts:
        raise UsageError("there is no prompt; give --prompt, --prompts-file, or a prompt a line on stdin")
    empty = next((i for i, prompt in enumerate(texts) if not prompt), None)
    if empty is not None:
        raise UsageError(f"prompt {empty} is empty; give some text")
    return texts


def _run(
    runtime: Runtime,
    tokenizer: Tokenizer,
    texts: list[str],
    options: GenerationOptions,
    batch: int,
    as_json: bool,
) -> list[dict[str, Any]]:
    """Run, print unless `as_json`, and return what `--json` says of this runtime, a mapping for each beam."""
    from onnxtools.generation.prompts import as_demo, continue_texts

    # One greedy or sampled text is shown while it grows.
    streams = len(texts) == 1 and options.num_beams == 1 and not as_json
    waiting = texts[:1]  # the prompt comes with the first piece, so that nothing comes before an error

    def show(_: int, piece: str) -> None:
        click.echo("".join(waiting) + piece, nl=False)
        waiting.clear()

    continued = continue_texts(
        runtime, tokenizer, texts, options, batch_size=batch, show=show if streams else None, logprobs=as_json
    )
    if streams:
        click.echo("".join(waiting))
    elif not as_json:
        _print(continued)
    return [as_demo([beams[i] for beams in continued]) for i in range(options.num_return_sequences)]


def _print(continued: list[list[Text]]) -> None:
    for index, beams in enumerate(continued):
        if len(continued) > 1:
            click.echo(f"--- {index}")
        for number, text in enumerate(beams):
            click.echo(
                f"beam {number} result ({text.score:.4f}): {text.sentence}" if text.score is not None else text.sentence
            )


command = runtime_command("run", _HELP, _callback, [PromptOptions, GenerationOptions])
