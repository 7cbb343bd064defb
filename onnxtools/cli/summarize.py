"""Summarize articles, score them with ROUGE, and time it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from onnxtools.base.errors import UsageError
from onnxtools.base.progress import counted
from onnxtools.cli.flags import PATH, from_parameters
from onnxtools.cli.runtimes import open_tokenizer, opened, runtime_command, runtime_options, say_notes
from onnxtools.generation.generation_options import GenerationOptions

_HELP = """Summarize the articles of a JSONL file (fields article and highlights) with MODEL.

    Prints ROUGE-1, 2, L and Lsum against the references, total latency, output tokens and tokens per second of
    each runtime. With --check-accuracy the exit code is 1 where ROUGE-1 is below the threshold.

    \b
    Example:
      onnxtools summarize model.onnx --dataset articles.jsonl --check-accuracy --rouge1-threshold 14
    """


def _callback(
    model: Path,
    dataset: Path,
    limit: int | None,
    batch_size: int,
    template: str,
    max_input_len: int,
    check_accuracy: bool,
    rouge1_threshold: float,
    runtimes: tuple[str, ...],
    tokenizer_path: Path | None,
    as_json: bool,
    debug: bool,
    **given: Any,
) -> None:
    from onnxtools.cli.render import console, print_json, table
    from onnxtools.evaluate.summaries import SCORES, read_articles, summarize

    if not 0 <= rouge1_threshold <= 100:
        raise UsageError(f"rouge1-threshold is {rouge1_threshold}; it takes 0 to 100, in percent")
    options: GenerationOptions = from_parameters(GenerationOptions, given)
    articles = read_articles(dataset, limit)
    result: dict[str, Any] = {}
    with opened(model, runtimes, runtime_options(given)) as made:
        say_notes(made)
        for runtime in made:
            tokenizer = open_tokenizer(tokenizer_path, runtime, model)
            with counted(f"{model.name} ({runtime.name})", len(articles)) as tick:
                result[runtime.name] = summarize(
                    runtime, tokenizer, articles, options, batch_size=batch_size,
                    template=template.replace("\\n", "\n"), max_input_len=max_input_len,
                    done=tick,
                )  # fmt: skip
    failed = [name for name, found in result.items() if check_accuracy and found["rouge1"] < rouge1_threshold]
    if as_json:
        print_json(
            {
                "model": str(model),
                "dataset": str(dataset),
                "runtimes": result,
                "passed": not failed if check_accuracy else None,
            }
        )
    else:
        columns = ("runtime", "articles", *SCORES, "latency s", "output tokens", "tokens/s")
        rows = [
            (
                name,
                r["n"],
                *(f"{r[s]:.2f}" for s in SCORES),
                f"{r['total_latency_s']:.3f}",
                r["output_tokens"],
                f"{r['tokens_per_s']:.1f}",
            )
            for name, r in result.items()
        ]
        table(f"summaries of {dataset}", columns, rows, right=columns[1:])
        for name in failed:
            console().print(
                f"{name}: ROUGE-1 {result[name]['rouge1']:.2f} is below {rouge1_threshold:g}", style="red", markup=False
            )
    sys.exit(1 if failed else 0)


command = runtime_command(
    "summarize", _HELP, _callback, options=GenerationOptions,
    extra=[
        click.Option(["--dataset"], type=PATH, required=True, help="A JSONL file with article and highlights."),
        click.Option(["--limit"], type=click.IntRange(1), help="The first N articles alone."),
        click.Option(["--batch-size"], type=click.IntRange(1), default=1, show_default=True,
            help="Articles run together."),
        click.Option(["--template"], default="{article}\\n\\nTL;DR:\\n", show_default=True,
            help="The prompt; \\n is a new line."),
        click.Option(["--max-input-len"], type=click.IntRange(8), default=923, show_default=True,
            help="Tokens of a prompt; the article is cut."),
        click.Option(["--check-accuracy"], is_flag=True, help="Exit code 1 where ROUGE-1 is below the threshold."),
        click.Option(["--rouge1-threshold"], type=float, default=14.0, show_default=True, help="In percent."),
    ],
)  # fmt: skip
