"""Summarize articles, score them with ROUGE, and time it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxtools.base.errors import UsageError
from onnxtools.base.options import option
from onnxtools.base.progress import counted
from onnxtools.cli.flags import from_parameters
from onnxtools.cli.runtimes import RuntimeChoice, open_tokenizer, opened, runtime_command, say_notes
from onnxtools.evaluate.summaries import SCORES, SummaryOptions, read_articles, summarize
from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.runtime import RuntimeOptions

_HELP = """Summarize the articles of a JSONL file (fields article and highlights) with MODEL.

    Prints ROUGE-1, 2, L and Lsum against the references, total latency, output tokens and tokens per second of
    each runtime. With --check-accuracy the exit code is 1 where ROUGE-1 is below the threshold.

    \b
    Example:
      onnxtools summarize model.onnx --dataset articles.jsonl --check-accuracy --rouge1-threshold 14
    """


@dataclass(frozen=True)
class ScoreOptions:
    """What `summarize` reads, and what it demands."""

    dataset: Path = option(None, "A JSONL file with article and highlights.", path=True, required=True)
    limit: int | None = option(None, "The first N articles alone.", minimum=1)
    check_accuracy: bool = option(False, "Exit code 1 where ROUGE-1 is below the threshold.", switch=True)
    rouge1_threshold: float = option(14.0, "In percent.")

    def __post_init__(self) -> None:
        if not 0 <= self.rouge1_threshold <= 100:
            raise UsageError(f"rouge1-threshold is {self.rouge1_threshold}; it takes 0 to 100, in percent")


def _callback(model: Path, as_json: bool, **values: Any) -> None:
    from onnxtools.cli.render import console, print_json, table

    scoring: ScoreOptions = from_parameters(ScoreOptions, values)
    options: GenerationOptions = from_parameters(GenerationOptions, values)
    prompting: SummaryOptions = from_parameters(SummaryOptions, values)
    choice: RuntimeChoice = from_parameters(RuntimeChoice, values)
    articles = read_articles(scoring.dataset, scoring.limit)
    result: dict[str, Any] = {}
    with opened(model, choice.runtime, from_parameters(RuntimeOptions, values)) as runtimes:
        say_notes(runtimes)
        for runtime in runtimes:
            tokenizer = open_tokenizer(choice.tokenizer, runtime, model)
            with counted(f"{model.name} ({runtime.name})", len(articles)) as tick:
                result[runtime.name] = summarize(runtime, tokenizer, articles, options, prompting, tick)
    threshold = scoring.rouge1_threshold if scoring.check_accuracy else 0
    failed = [name for name, scores in result.items() if scores["rouge1"] < threshold]
    if as_json:
        print_json(
            {
                "model": str(model),
                "dataset": str(scoring.dataset),
                "runtimes": result,
                "passed": not failed if scoring.check_accuracy else None,
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
        table(f"summaries of {scoring.dataset}", columns, rows, right=columns[1:])
        for name in failed:
            console().print(
                f"{name}: ROUGE-1 {result[name]['rouge1']:.2f} is below {threshold:g}", style="red", markup=False
            )
    sys.exit(1 if failed else 0)


command = runtime_command("summarize", _HELP, _callback, [ScoreOptions, SummaryOptions, GenerationOptions])
