"""LAMBADA (Paperno et al., ACL 2016): the last word of a passage, from its context.

The demo's five figures are as its code defines them (FACTS-te-nemo, 3.4): `ppl_last_token` is per word, not per token,
and its top-N counts a passage if the FIRST piece of the word is among the N best of ANY target position. Two figures
are added: whole-word accuracy (lm-eval's `acc`) and perplexities per token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxtools.base.errors import JobError
from onnxtools.base.inputs import check_regular, shown
from onnxtools.base.jsonl import read_jsonl
from onnxtools.checkpoints.tokenizer import Tokenizer
from onnxtools.evaluate.scores import Scored, mean_interval, perplexity, score_texts, share_interval
from onnxtools.generation.runtime import Runtime
from onnxtools.storage.files import try_lock


@dataclass(frozen=True)
class Passage:
    """A context and its last word, as tokens."""

    context: list[int]
    word: list[int]


@dataclass(frozen=True)
class PassageResult:
    """The scores of one passage.

    Attributes:
        word: sum of log-probabilities of the word's pieces.
        pieces: number of the word's pieces.
        total: sum of log-probabilities over all predicted tokens.
        tokens: number of predicted tokens.
        exact: whether the whole word was the greedy choice.
        top1, top3, top5: the demo's top 1, 3 and 5.
    """

    word: float
    pieces: int
    total: float
    tokens: int
    exact: bool
    top1: bool
    top3: bool
    top5: bool


def read_lambada(path: Path, limit: int | None = None) -> list[tuple[str, str]]:
    """(context, last word) of each line of a JSONL file, of at most `limit` lines.

    A line has the fields `context` and `continuation`, or `text`, whose last word is split off.

    Raises:
        JobError: no such file, not JSONL, other fields, or an empty context or word.
    """
    pairs = []
    for number, row in read_jsonl(path, limit):
        if "context" in row and "continuation" in row:
            context, word = row["context"], row["continuation"]
            word = word.strip() if isinstance(word, str) else word
        elif "text" in row:
            context, word = split_text(row["text"]) if isinstance(row["text"], str) else (None, None)
        else:
            raise JobError(
                f"{path}:{number}: has the fields {shown(list(row)) if row else 'none'}; LAMBADA's are context and "
                "continuation, or text"
            )
        if not isinstance(context, str) or not isinstance(word, str):
            raise JobError(f"{path}:{number}: context and continuation, or text, must be text; mend the line")
        if not context.strip() or not word.strip():
            raise JobError(
                f"{path}:{number}: the {'context' if not context.strip() else 'last word'} is empty; remove the line"
            )
        pairs.append((context, word))
    return pairs


def split_text(text: str) -> tuple[str, str]:
    """A passage as its context and its last word with the space before it; other spaces belong to the context."""
    context, space, word = text.rstrip().rpartition(" ")
    return context, space + word.strip()


def tokenized(rows: Sequence[tuple[str, str]], tokenizer: Tokenizer, longest: int | None) -> list[Passage]:
    """Context and word as tokens, split by `Tokenizer.pair`.

    A word that neither begins with a space nor follows white space gets a space.

    Args:
        longest: positions of the model; tokens beyond them are cut from the beginning of the context.

    Raises:
        JobError: a word that has no token of its own.
    """
    passages = []
    for number, (context, word) in enumerate(rows):
        joint = "" if context[-1:].isspace() or word.startswith(" ") else " "
        before, pieces = tokenizer.pair(context, joint + word)
        if not pieces:
            raise JobError(
                f"passage {number}: its last word {word.strip()[:40]!r} has no token of its own in {tokenizer.path}; "
                "remove the line"
            )
        if longest is not None:
            before = before[-max(longest + 1 - len(pieces), 1) :]
        passages.append(Passage(before, pieces))
    return passages


def score_lambada(
    runtime: Runtime,
    passages: Sequence[Passage],
    *,
    batch_size: int,
    known: dict[int, PassageResult],
    done: Callable[[int, PassageResult], None],
) -> list[PassageResult]:
    """Results of all passages, in order.

    Args:
        known: results by index of passages that are not run again.
        done: called with the index and result of each passage that was run.

    Raises:
        JobError: logits that are NaN or infinite.
    """
    pending = [i for i in range(len(passages)) if i not in known]
    texts = [[*passages[i].context, *passages[i].word] for i in pending]
    results = dict(known)

    def keep(position: int, scored: Scored) -> None:
        index = pending[position]
        results[index] = _result(scored, passages[index])
        done(index, results[index])

    score_texts(runtime, texts, [len(passages[i].word) for i in pending], batch_size=batch_size, done=keep)
    return [results[i] for i in range(len(passages))]


def _result(scored: Scored, passage: Passage) -> PassageResult:
    pieces, first = len(passage.word), passage.word[0]
    top = [bool((scored.top[:, :n] == first).any()) for n in (1, 3, 5)]
    return PassageResult(
        float(scored.logprobs[-pieces:].sum()),
        pieces,
        float(scored.logprobs.sum()),
        len(scored.logprobs),
        bool((scored.ranks == 0).all()),
        *top,
    )


def summarize_lambada(results: Sequence[PassageResult]) -> dict[str, Any]:
    """The figures by name, for one passage or more; `*_ci95` are 95% intervals."""
    n = len(results)
    words, sequences = [r.word for r in results], [r.total / r.tokens for r in results]
    shares = {
        name: sum(getattr(r, field) for r in results) / n
        for name, field in (("acc", "exact"), ("acc_top1", "top1"), ("acc_top3", "top3"), ("acc_top5", "top5"))
    }
    mean, half = mean_interval(words)
    return {
        "n": n,
        **shares,
        "ppl_last_token": perplexity(mean),
        "ppl_sequence": perplexity(float(np.mean(sequences))),
        "ppl_token": perplexity(sum(words) / sum(r.pieces for r in results)),
        "ppl_token_all": perplexity(sum(r.total for r in results) / sum(r.tokens for r in results)),
        "acc_ci95": share_interval(sum(r.exact for r in results), n),
        "ppl_last_token_ci95": (perplexity(mean + half), perplexity(mean - half)),
    }


def compare_lambada(a: Sequence[PassageResult], b: Sequence[PassageResult]) -> dict[str, Any]:
    """Compare `b` with `a`, passage by passage.

    `acc_difference` is the difference of whole-word accuracy, b minus a, with half its 95% interval.
    `ppl_last_token_factor` is the perplexity of the word under b over that under a, with its 95% interval.
    """
    accuracy, half = mean_interval([float(y.exact) - float(x.exact) for x, y in zip(a, b, strict=True)])
    logs, log_half = mean_interval([x.word - y.word for x, y in zip(a, b, strict=True)])
    return {
        "acc_difference": accuracy,
        "acc_difference_half_ci95": half,
        "ppl_last_token_factor": perplexity(-logs),
        "ppl_last_token_factor_ci95": (perplexity(log_half - logs), perplexity(-logs - log_half)),
        "only_first_right": sum(x.exact and not y.exact for x, y in zip(a, b, strict=True)),
        "only_second_right": sum(y.exact and not x.exact for x, y in zip(a, b, strict=True)),
    }


class Journal:
    """Results that are written to disk as they come, so that an interrupted run can be resumed.

    The file is JSONL; its first line, `of`, names the model, dataset, tokenizer and runtime. The file is locked (flock)
    until `close`, or until the process ends in any way.

    Attributes:
        known: results by index that the file already held.

    Raises:
        JobError: the file is of another model or dataset, is damaged, or is being written by another run.
    """

    def __init__(self, path: Path, of: dict[str, Any]) -> None:
        self.known: dict[int, PassageResult] = {}
        if path.exists():
            check_regular(path, JobError)
        self._file = path.open("a", encoding="utf-8")
        try:
            if not try_lock(self._file.fileno()):
                raise JobError(
                    f"{path}: another run of `accuracy` writes it now; wait for it, or name another file with --resume"
                )
            if path.stat().st_size:
                self._resume(path, of)
            if not self.known and path.stat().st_size == 0:
                self._write(of)
        except BaseException:
            self._file.close()
            raise

    def _resume(self, path: Path, of: dict[str, Any]) -> None:
        """Read the results in the file; an incomplete last line is removed, any other defect is refused.

        Raises:
            JobError: the file is damaged, or its results are of another model, dataset, tokenizer or runtime.
        """
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            header, *rows = [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
            assert isinstance(header, dict)
            for row in rows:
                index = int(row.pop("index"))
                self.known[index] = _checked(PassageResult(**row))
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
            raise JobError(
                f"{path}: is no journal of `accuracy`, or a damaged one; name another file with --resume"
            ) from None
        if header != json.loads(json.dumps(of)):
            raise JobError(
                f"{path}: holds results of another model, dataset, tokenizer or runtime; name another file with "
                "--resume"
            )
        with path.open("rb+") as file:
            file.truncate(len(whole))

    def add(self, index: int, result: PassageResult) -> None:
        """Append the result of passage `index` and flush the file."""
        self._write({"index": index, **asdict(result)})

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file, which also releases its lock."""
        self._file.close()


def _checked(result: PassageResult) -> PassageResult:
    """`result`, if its figures are possible.

    Raises:
        ValueError: figures that no passage has.
    """
    numbers = (result.word, result.total)
    if not (
        all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)
        and result.pieces >= 1
        and result.tokens >= result.pieces
    ):
        raise ValueError(result)
    return result
