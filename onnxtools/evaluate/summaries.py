"""`summarize`: articles in, summaries out, ROUGE against the reference (Lin, ACL 2004; package rouge-score)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.extras import install_line
from onnxtools.base.inputs import shown
from onnxtools.base.jsonl import read_jsonl
from onnxtools.base.options import option
from onnxtools.checkpoints.tokenizer import Streams, Tokenizer, cut_at
from onnxtools.generation.generate import generate
from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.runtime import Runtime

TEMPLATE = "{article}\n\nTL;DR:\n"
"""The prompt of TensorRT-LLM's GPT example (examples/summarize.py): the article, then TL;DR."""
SCORES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclass(frozen=True)
class Article:
    """A text and its reference summary, CNN/DailyMail's `article` and `highlights`."""

    article: str
    highlights: str


def read_articles(path: Path, limit: int | None = None) -> list[Article]:
    """The articles of a JSONL file, of at most `limit` lines.

    Raises:
        JobError: no such file, not JSONL, or other fields.
    """
    articles = []
    for number, row in read_jsonl(path, limit):
        if not all(isinstance(row.get(name), str) and row[name].strip() for name in ("article", "highlights")):
            raise JobError(
                f"{path}:{number}: has the fields {shown(list(row)) if row else 'none'}; article and highlights are "
                "wanted, with text in them"
            )
        articles.append(Article(row["article"], row["highlights"]))
    return articles


@dataclass(frozen=True)
class SummaryOptions:
    """How articles become prompts."""

    batch_size: int = option(1, "Articles run together.", minimum=1)
    template: str = option("{article}\\n\\nTL;DR:\\n", "The prompt; \\n is a new line.")
    max_input_len: int = option(923, "Tokens of a prompt; the article is cut.", minimum=8)


def summarize(
    runtime: Runtime,
    tokenizer: Tokenizer,
    articles: Sequence[Article],
    options: GenerationOptions,
    prompting: SummaryOptions,
    done: Callable[[int], None],
) -> dict[str, Any]:
    """Summarize `articles`: the summaries, their mean ROUGE F-measures in percent, and the time in seconds.

    Raises:
        UsageError: a template that does not hold {article} once.
        JobError: rouge-score is not installed, or no room for an article in the model.
    """
    scorer = _scorer()
    template, room = prompting.template.replace("\\n", "\n"), _room(runtime, options, prompting.max_input_len)
    prompts = [_prompt(tokenizer, article.article, template, room) for article in articles]
    texts: list[str] = []
    tokens, seconds = 0, 0.0
    for start in range(0, len(prompts), prompting.batch_size):
        batch = prompts[start : start + prompting.batch_size]
        streams = Streams(tokenizer, batch, options.stop) if options.stop and options.num_beams == 1 else None
        began = time.perf_counter()
        best = [beams[0] for beams in generate(runtime, batch, options, on_token=streams)]
        seconds += time.perf_counter() - began
        tokens += sum(len(generated.token_ids) for generated in best)
        texts += [
            cut_at(tokenizer.continuation(p, generated.token_ids), options.stop)[0].strip()
            for p, generated in zip(batch, best, strict=True)
        ]
        done(len(batch))
    scores = [scorer.score(a.highlights, text) for a, text in zip(articles, texts, strict=True)]
    return {
        "n": len(articles),
        **{name: 100 * sum(s[name].fmeasure for s in scores) / len(scores) for name in SCORES},
        "total_latency_s": seconds,
        "output_tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "summaries": texts,
    }


def _scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise JobError(f"summarize needs the package rouge-score; {install_line('scores')}") from None
    return rouge_scorer.RougeScorer(list(SCORES), use_stemmer=True)


def _room(runtime: Runtime, options: GenerationOptions, longest: int) -> int:
    """Largest number of tokens of a prompt."""
    positions = runtime.info.max_positions
    room = longest if positions is None else min(longest, positions - options.max_new_tokens)
    if room < 8:
        raise JobError(
            f"{options.max_new_tokens} new tokens leave {room} of the model's {positions} positions for an article; "
            "lower --max-new-tokens"
        )
    return room


def _prompt(tokenizer: Tokenizer, article: str, template: str, room: int) -> list[int]:
    """The template's tokens around the first tokens of the article, `room` in all."""
    if (times := template.count("{article}")) != 1:
        raise UsageError(f"the template {template!r} has {{article}} {times} times; write it once")
    before, _, after = template.partition("{article}")
    body, tail = tokenizer.pair(before + article.strip(), after)
    return [*body[: max(room - len(tail), len(tokenizer.encode(before)) + 1)], *tail]
