"""Score a model: LAMBADA's last word, or the perplexity of a text."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxtools.base.errors import JobError, UsageError, one_line
from onnxtools.base.options import option
from onnxtools.base.progress import counted
from onnxtools.cli.flags import from_parameters
from onnxtools.cli.runtimes import RuntimeChoice, open_tokenizer, opened, runtime_command, say_notes
from onnxtools.generation.runtime import RuntimeOptions

if TYPE_CHECKING:
    from onnxtools.checkpoints.tokenizer import Tokenizer
    from onnxtools.evaluate.lambada import Passage, PassageResult
    from onnxtools.evaluate.wikitext import WindowScores
    from onnxtools.generation.runtime import Runtime

_HELP = """Score MODEL on LAMBADA (the last word of a passage) or on a text's perplexity.

    LAMBADA prints the NeMo demo's five figures as it defines them, and beside them the accuracy on whole words
    (lm-eval's acc) and the perplexity per token of the word. --compare scores a second model and prints the
    paired difference.

    \b
    Examples:
      onnxtools accuracy model.onnx --dataset lambada --path lambada_openai.jsonl --limit 500
      onnxtools accuracy model.onnx --dataset lambada_openai.jsonl --compare fp8.onnx --resume scores.jsonl
      onnxtools accuracy model.onnx --dataset wikitext --path wikitext2_test.txt --max-length 1024
    """

_HUB = {"lambada": ("EleutherAI/lambada_openai", "default")}


@dataclass(frozen=True)
class AccuracyOptions:
    """What `accuracy` scores, and how."""

    dataset: str = option("", "lambada, wikitext, or a file: .jsonl (LAMBADA's fields) or .txt.", required=True)
    path: Path | None = option(
        None, "File of the data. [default for lambada: EleutherAI/lambada_openai of the Hugging Face hub]", path=True
    )
    limit: int | None = option(None, "Score the first N passages, or windows, alone.", minimum=1)
    batch_size: int = option(8, "Texts scored together.", minimum=1)
    compare: Path | None = option(None, "A second model: print the paired difference.", path=True)
    resume: Path | None = option(
        None, "Keep LAMBADA's results in this JSONL file, and go on from what is there.", path=True
    )
    max_length: int = option(2048, "Tokens of a window of wikitext.", minimum=2)
    stride: int | None = option(None, "Tokens from one window to the next. [default: --max-length]", minimum=1)


@dataclass(frozen=True)
class Job:
    """Models, runtimes and a tokenizer, and what is asked of them."""

    models: tuple[Path, ...]
    options: AccuracyOptions
    choice: RuntimeChoice
    runtime_options: RuntimeOptions

    def runtimes(self) -> Iterator[tuple[Path, Runtime, Tokenizer]]:
        """Each model in each runtime, with its tokenizer; one model is open at a time."""
        for path in self.models:
            with opened(path, self.choice.runtime, self.runtime_options) as runtimes:
                say_notes(runtimes)
                for runtime in runtimes:
                    yield path, runtime, open_tokenizer(self.choice.tokenizer, runtime, path)

    def label(self, path: Path, runtime: Runtime, taken: Collection[str]) -> str:
        """What the figures are called; a model compared with itself is called twice."""
        name = runtime.name if self.options.compare is None else f"{path} ({runtime.name})"
        return f"{name} again" if name in taken else name


def _callback(model: Path, as_json: bool, **values: Any) -> None:
    from onnxtools.base.inputs import absent
    from onnxtools.cli.render import print_json

    options: AccuracyOptions = from_parameters(AccuracyOptions, values)
    kind, file = _dataset(options.dataset, options.path)
    compare = options.compare
    if compare is not None and not compare.exists():
        raise JobError(f"--compare {absent(compare)}: no such file or folder; check the path")
    choice: RuntimeChoice = from_parameters(RuntimeChoice, values)
    models = (model,) if compare is None else (model, compare)
    job = Job(models, options, choice, from_parameters(RuntimeOptions, values))
    if kind == "lambada" and options.stride is not None:
        raise UsageError("--stride is for wikitext; leave it out with LAMBADA")
    if kind == "wikitext" and options.resume is not None:
        raise UsageError("--resume is for LAMBADA; leave it out with --dataset wikitext")
    result = _lambada(job, file) if kind == "lambada" else _wikitext(job, file)
    if as_json:
        print_json(result)
    elif kind == "lambada":
        _print_lambada(result)
    else:
        _print_wikitext(result)


def _dataset(name: str, path: Path | None) -> tuple[str, Path | None]:
    """Which score, and the file of its data; None is LAMBADA of the Hugging Face hub."""
    if name in ("lambada", "wikitext"):
        if path is None and name == "wikitext":
            raise UsageError("--dataset wikitext needs --path, a text file")
        return name, path
    if path is not None and Path(name).is_file():
        raise UsageError(f"--dataset {name} and --path {path} both name a file; leave out --path")
    if path is not None or not Path(name).suffix:
        raise UsageError(
            f"no dataset is called {name!r}; it is lambada or wikitext with --path, or a .jsonl or .txt file"
        )
    return "wikitext" if Path(name).suffix == ".txt" else "lambada", Path(name)


def _hub_rows(limit: int | None) -> list[tuple[str, str]]:
    from onnxtools.evaluate.lambada import split_text

    name, configuration = _HUB["lambada"]
    try:
        import datasets

        rows = datasets.load_dataset(name, configuration, split="test")
    except Exception as error:  # not installed, offline, or whatever the hub answers
        raise JobError(
            f"{name} cannot be fetched ({type(error).__name__}: {one_line(error, 100)}); give the data with --path"
        ) from None
    return [split_text(str(row["text"])) for row in rows][:limit]


def _lambada(job: Job, file: Path | None) -> dict[str, Any]:
    from onnxtools.evaluate.lambada import compare_lambada, read_lambada, summarize_lambada

    limit = job.options.limit
    rows = read_lambada(file, limit) if file is not None else _hub_rows(limit)
    scores: dict[str, list[PassageResult]] = {}
    for path, runtime, tokenizer in job.runtimes():
        scores[job.label(path, runtime, scores)] = _score_lambada(job, path, runtime, tokenizer, rows, len(scores))
    result: dict[str, Any] = {
        "dataset": str(file or _HUB["lambada"][0]),
        "models": {label: summarize_lambada(results) for label, results in scores.items()},
    }
    if len(scores) > 1:
        first, *others = scores.items()
        result["compared"] = {f"{label} - {first[0]}": compare_lambada(first[1], results) for label, results in others}
    return result


def _score_lambada(
    job: Job, path: Path, runtime: Runtime, tokenizer: Tokenizer, rows: Sequence[tuple[str, str]], number: int
) -> list[PassageResult]:
    """Scores of the model with that number; its journal, of the first `--resume`, of the others a name of their own."""
    from onnxtools.evaluate.lambada import Journal, score_lambada, tokenized

    passages = tokenized(rows, tokenizer, runtime.info.max_positions)
    file, journal = job.options.resume, None
    if file is not None:
        file = file if number == 0 else file.with_suffix(f".{number}{file.suffix}")
        journal = Journal(file, _of(runtime, path, job.runtime_options, passages))
    try:
        scored = dict(journal.known) if journal is not None else {}
        with counted(f"{path.name} ({runtime.name})", len(passages), len(scored)) as tick:

            def done(index: int, result: PassageResult) -> None:
                if journal is not None:
                    journal.add(index, result)
                tick()

            scored = {index: result for index, result in scored.items() if index < len(passages)}
            return score_lambada(runtime, passages, batch_size=job.options.batch_size, known=scored, done=done)
    finally:
        if journal is not None:
            journal.close()


def _of(runtime: Runtime, path: Path, options: RuntimeOptions, passages: Sequence[Passage]) -> dict[str, Any]:
    """What a journal's results are of; a changed model, dataset, tokenizer or way of running is another one."""
    import dataclasses

    from onnxtools.ir.model import file_stamps

    digest = hashlib.sha256(repr([(p.context, p.word) for p in passages]).encode()).hexdigest()
    return {
        "model": str(path.resolve()),
        "files": file_stamps(path),
        "runtime": runtime.name,
        "options": dataclasses.asdict(options),
        "passages": digest,
    }


def _wikitext(job: Job, file: Path | None) -> dict[str, Any]:
    from onnxtools.evaluate.wikitext import compare_wikitext

    assert file is not None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{file}: cannot be read ({error}); give a text file") from None
    scores: dict[str, WindowScores] = {}
    for path, runtime, tokenizer in job.runtimes():
        scores[job.label(path, runtime, scores)] = _score_wikitext(job, path, runtime, tokenizer, text)
    result: dict[str, Any] = {
        "dataset": str(file),
        "models": {label: scored.figures for label, scored in scores.items()},
    }
    if len(scores) > 1:
        first, *others = scores.items()
        result["compared"] = {f"{label} - {first[0]}": compare_wikitext(first[1], scored) for label, scored in others}
    return result


def _score_wikitext(job: Job, path: Path, runtime: Runtime, tokenizer: Tokenizer, text: str) -> WindowScores:
    from onnxtools.evaluate.wikitext import Windows, score_wikitext

    options = job.options
    tokens, words = tokenizer.pieces(text), len(text.split())
    length = min(options.max_length, runtime.info.max_positions or options.max_length)
    windows = Windows(length, options.stride or length)
    if options.limit is not None and windows.end(options.limit) < len(tokens):
        tokens = tokens[: windows.end(options.limit)]
        words = len(tokenizer.decode(tokens).split())
    if len(tokens) < 2 or not words:
        file = options.path or options.dataset
        raise UsageError(f"{file}: has {len(tokens)} tokens and {words} words; perplexity needs two and one")
    with counted(f"{path.name} ({runtime.name})", len(list(windows.of(tokens)))) as tick:
        return score_wikitext(runtime, tokens, words, windows, options.batch_size, tick)


def _print_wikitext(result: dict[str, Any]) -> None:
    from onnxtools.cli.render import console, table

    columns = ("model", "tokens", "ppl(token)", "ppl(word)", "window", "stride")
    rows = [
        (label, s["n"], f"{s['ppl_token']:.4f}", f"{s['ppl_word']:.4f}", s["max_length"], s["stride"])
        for label, s in result["models"].items()
    ]
    table(f"perplexity of {result['dataset']}", columns, rows, right=columns[1:])
    for label, d in result.get("compared", {}).items():
        low, high = d["ppl_token_factor_ci95"]
        line = f"{label}: ppl(token) x {d['ppl_token_factor']:.4f} (95%, window by window: {low:.4f} to {high:.4f})"
        console().print(line, markup=False, soft_wrap=True)


def _print_lambada(result: dict[str, Any]) -> None:
    from onnxtools.cli.render import console, table

    for label, s in result["models"].items():
        line = (
            f"{label}: Lambada ppl(last token): {s['ppl_last_token']:.4f}, ppl(sequence): {s['ppl_sequence']:.4f}, "
            f"acc(top1): {s['acc_top1']:.4f}, acc(top3): {s['acc_top3']:.4f}, acc(top5): {s['acc_top5']:.4f}"
        )
        console().print(line, markup=False, soft_wrap=True)
    columns = ("model", "n", "acc (whole word)", "95%", "ppl(token)")
    rows = []
    for label, s in result["models"].items():
        low, high = s["acc_ci95"]
        rows.append((label, s["n"], f"{s['acc']:.4f}", f"{low:.4f} to {high:.4f}", f"{s['ppl_token']:.4f}"))
    table(f"LAMBADA, {result['dataset']}", columns, rows, right=columns[1:])
    for label, d in result.get("compared", {}).items():
        low, high = d["ppl_last_token_factor_ci95"]
        line = (
            f"{label}: acc {100 * d['acc_difference']:+.2f} +- {100 * d['acc_difference_half_ci95']:.2f} points "
            f"(only the first right {d['only_first_right']}, only the second {d['only_second_right']}), "
            f"ppl(last token) x {d['ppl_last_token_factor']:.4f} ({low:.4f} to {high:.4f})"
        )
        console().print(line, markup=False, soft_wrap=True)


command = runtime_command("accuracy", _HELP, _callback, [AccuracyOptions])
