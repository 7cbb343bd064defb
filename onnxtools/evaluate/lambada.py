"""LAMBADA (Paperno et al., ACL 2016): the last word of a passage, from its context.

The demo's five figures are as its code defines them (FACTS-te-nemo, 3.4): `ppl_last_token` is a figure a word, not a
token, and its top-N counts a passage whose FIRST piece of the word is anywhere among the N best of ANY target position.
Beside them: the whole word (lm-eval's `acc`) and perplexities a token.
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
    """One passage.

    Attributes:
        word: sum of log-probabilities of the word's pieces, and how many they are.
        sequence: mean of log-probabilities over all predicted tokens.
        total: sum of them, and how many.
        hits: whether the whole word was the greedy choice; then the demo's top 1, 3 and 5.
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
    """(context, last word) of a JSONL file: fields `context` and `continuation`, or `text`, whose last word is split
    off.

    Raises:
        JobError: no such file, not JSONL, or other fields.
    """
    found = []
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
        found.append((context, word))
    return found


def split_text(text: str) -> tuple[str, str]:
    """A passage as its context and its last word with the space before it; other spaces are the context's."""
    context, space, word = text.rstrip().rpartition(" ")
    return context, space + word.strip()


def tokenized(rows: Sequence[tuple[str, str]], tokenizer: Tokenizer, longest: int | None) -> list[Passage]:
    """Context and word as `Tokenizer.pair` cuts them; the context's beginning is cut where the model's positions end.

    A word that neither begins with a space nor follows white space gets a space.

    Raises:
        JobError: a word that has no token of its own.
    """
    found = []
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
        found.append(Passage(before, pieces))
    return found


def score_lambada(
    runtime: Runtime,
    passages: Sequence[Passage],
    *,
    batch_size: int,
    known: dict[int, PassageResult],
    done: Callable[[int, PassageResult], None],
) -> list[PassageResult]:
    """Results of all passages; those in `known` are not run again."""
    missing = [i for i in range(len(passages)) if i not in known]
    texts = [[*passages[i].context, *passages[i].word] for i in missing]
    found = dict(known)

    def keep(at: int, scored: Scored) -> None:
        index = missing[at]
        found[index] = _result(scored, passages[index])
        done(index, found[index])

    score_texts(runtime, texts, [len(passages[i].word) for i in missing], batch_size=batch_size, done=keep)
    return [found[i] for i in range(len(passages))]


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
    """The figures; `*_ci95` are 95% intervals."""
    n = len(results)
    words, sequences = [r.word for r in results], [r.total / r.tokens for r in results]
    shares = {
        name: sum(getattr(r, field) for r in results) / n
        for name, field in (("acc", "exact"), ("acc_top1", "top1"), ("acc_top3", "top3"), ("acc_top5", "top5"))
    }
    mean, half = mean_interval(words)
    return {
        "n": n, **shares, "ppl_last_token": perplexity(mean), "ppl_sequence": perplexity(float(np.mean(sequences))),
        "ppl_token": perplexity(sum(words) / sum(r.pieces for r in results)),
        "ppl_token_all": perplexity(sum(r.total for r in results) / sum(r.tokens for r in results)),
        "acc_ci95": share_interval(sum(r.exact for r in results), n),
        "ppl_last_token_ci95": (perplexity(mean + half), perplexity(mean - half)),
    }  # fmt: skip


def compare_lambada(a: Sequence[PassageResult], b: Sequence[PassageResult]) -> dict[str, Any]:
    """b minus a, passage by passage: the difference of whole-word accuracy, and the factor of the word's perplexity;
    each with half its 95% interval.
    """
    accuracy, half = mean_interval([float(y.exact) - float(x.exact) for x, y in zip(a, b, strict=True)])
    logs, log_half = mean_interval([x.word - y.word for x, y in zip(a, b, strict=True)])
    return {
        "acc_difference": accuracy, "acc_difference_half_ci95": half, "ppl_last_token_factor": perplexity(-logs),
        "ppl_last_token_factor_ci95": (perplexity(log_half - logs), perplexity(-logs - log_half)),
        "only_first_right": sum(x.exact and not y.exact for x, y in zip(a, b, strict=True)),
        "only_second_right": sum(y.exact and not x.exact for x, y in zip(a, b, strict=True)),
    }  # fmt: skip


class Journal:
    """Results on disk as they come, so that an interrupted run goes on where it was: JSONL, the first line says of
    what.

    The file is locked (flock) until `close`, or until the process ends, however it ends.

    Raises:
        JobError: the file is of another model or dataset, or another run writes it now.
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
                self._read(path, of)
            if not self.known and path.stat().st_size == 0:
                self._write(of)
        except BaseException:
            self._file.close()
            raise

    def _read(self, path: Path, of: dict[str, Any]) -> None:
        """Take over what is there; a last line that was cut off in the middle is removed, anything else that is wrong
        is refused.
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
        self._write({"index": index, **asdict(result)})

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _checked(result: PassageResult) -> PassageResult:
    """Raises: ValueError for figures that no passage has."""
    numbers = (result.word, result.total)
    if not (
        all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)
        and result.pieces >= 1
        and result.tokens >= result.pieces
    ):
        raise ValueError(result)
    return result
