"""Score a model: LAMBADA's last word, or the perplexity of a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.progress import counted
from onnxtools.cli.flags import PATH
from onnxtools.cli.runtimes import open_tokenizer, opened, runtime_command, runtime_options, say_notes
from onnxtools.generation.runtime import default_runtime

if TYPE_CHECKING:
    from onnxtools.evaluate.lambada import Passage, PassageResult
    from onnxtools.evaluate.wikitext import WindowScores
    from onnxtools.generation.runtime import Runtime, RuntimeOptions

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


def _callback(
    model: Path,
    dataset: str,
    path: Path | None,
    limit: int | None,
    batch_size: int,
    compare: Path | None,
    resume: Path | None,
    max_length: int,
    stride: int | None,
    runtimes: tuple[str, ...],
    tokenizer_path: Path | None,
    as_json: bool,
    debug: bool,
    **given: Any,
) -> None:
    from onnxtools.base.inputs import absent
    from onnxtools.cli.render import print_json

    kind, file = _dataset(dataset, path)
    if compare is not None and not compare.exists():
        raise JobError(f"--compare {absent(compare)}: no such file or folder; check the path")
    options = runtime_options(given)
    if kind == "wikitext":
        if resume is not None:
            raise UsageError("--resume is for LAMBADA; leave it out with --dataset wikitext")
        result = _wikitext(
            model, compare, file, runtimes, options, tokenizer_path, batch_size, max_length, stride, limit
        )
    else:
        result = _lambada(model, compare, file, runtimes, options, tokenizer_path, batch_size, limit, resume)
    if as_json:
        print_json(result)
    else:
        _print(kind, result)


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
            f"{name} cannot be fetched ({type(error).__name__}: {' '.join(str(error).split())[:100]}); give the data "
            "with --path"
        ) from None
    return [split_text(str(row["text"])) for row in rows][:limit]


# --- LAMBADA
# ------------------------------------------------------------------------------------------------------------


def _lambada(
    model: Path,
    compare: Path | None,
    file: Path | None,
    runtimes: Sequence[str],
    options: RuntimeOptions,
    tokenizer_path: Path | None,
    batch: int,
    limit: int | None,
    resume: Path | None,
) -> dict[str, Any]:
    from onnxtools.evaluate.lambada import compare_lambada, read_lambada, summarize_lambada

    rows = read_lambada(file, limit) if file is not None else _hub_rows(limit)
    found: dict[str, list[PassageResult]] = {}
    for path, names in _models(model, compare, runtimes):
        with opened(path, names, options) as made:
            say_notes(made)
            for runtime in made:
                label = _label(path, runtime, compare, found)
                found[label] = _lambada_of(runtime, path, rows, options, tokenizer_path, batch, resume, len(found))
    result: dict[str, Any] = {
        "dataset": str(file or _HUB["lambada"][0]),
        "models": {label: summarize_lambada(results) for label, results in found.items()},
    }
    if len(found) > 1:
        first, *others = found.items()
        result["compared"] = {f"{label} - {first[0]}": compare_lambada(first[1], results) for label, results in others}
    return result


def _label(path: Path, runtime: Runtime, compare: Path | None, taken: Mapping[str, Any]) -> str:
    """What the figures are called; a model compared with itself is called twice."""
    name = runtime.name if compare is None else f"{path} ({runtime.name})"
    return f"{name} again" if name in taken else name


def _models(model: Path, compare: Path | None, runtimes: Sequence[str]) -> Iterator[tuple[Path, list[str]]]:
    """Each model with its runtimes; one open at a time."""
    for path in (model, compare) if compare is not None else (model,):
        yield path, list(runtimes) or [default_runtime(path)]


def _lambada_of(
    runtime: Runtime,
    path: Path,
    rows: Sequence[tuple[str, str]],
    options: RuntimeOptions,
    tokenizer_path: Path | None,
    batch: int,
    resume: Path | None,
    number: int,
) -> list[PassageResult]:
    from onnxtools.evaluate.lambada import Journal, score_lambada, tokenized

    tokenizer = open_tokenizer(tokenizer_path, runtime, path)
    passages = tokenized(rows, tokenizer, runtime.info.max_positions)
    journal = (
        Journal(
            resume if number == 0 else resume.with_suffix(f".{number}{resume.suffix}"),
            _of(runtime, path, options, passages),
        )
        if resume is not None
        else None
    )
    try:
        with counted(f"{path.name} ({runtime.name})", len(passages), len(journal.known) if journal else 0) as tick:

            def done(index: int, result: PassageResult) -> None:
                if journal is not None:
                    journal.add(index, result)
                tick()

            known = {i: r for i, r in journal.known.items() if i < len(passages)} if journal is not None else {}
            return score_lambada(runtime, passages, batch_size=batch, known=known, done=done)
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


# --- perplexity
# ----------------------------------------------------------------------------------------------------------


def _wikitext(
    model: Path,
    compare: Path | None,
    file: Path | None,
    runtimes: Sequence[str],
    options: RuntimeOptions,
    tokenizer_path: Path | None,
    batch: int,
    length: int,
    stride: int | None,
    limit: int | None,
) -> dict[str, Any]:
    from onnxtools.evaluate.wikitext import compare_wikitext, score_wikitext, windows

    assert file is not None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{file}: cannot be read ({error}); give a text file") from None
    found: dict[str, WindowScores] = {}
    for path, names in _models(model, compare, runtimes):
        with opened(path, names, options) as made:
            say_notes(made)
            for runtime in made:
                tokenizer = open_tokenizer(tokenizer_path, runtime, path)
                tokens = tokenizer.pieces(text)
                window = min(length, runtime.info.max_positions or length)
                words = len(text.split())
                step = stride or window
                if limit is not None and (limit - 1) * step + window < len(tokens):
                    tokens = tokens[: (limit - 1) * step + window]
                    words = len(tokenizer.decode(tokens).split())
                if len(tokens) < 2 or not words:
                    raise UsageError(
                        f"{file}: has {len(tokens)} tokens and {words} words; perplexity needs two and one"
                    )
                with counted(f"{path.name} ({runtime.name})", len(list(windows(tokens, window, step)))) as tick:
                    scored = score_wikitext(
                        runtime, tokens, words, length=window, stride=step, batch_size=batch, done=tick
                    )
                found[_label(path, runtime, compare, found)] = scored
    result: dict[str, Any] = {
        "dataset": str(file),
        "models": {label: scored.figures for label, scored in found.items()},
    }
    if len(found) > 1:
        first, *others = found.items()
        result["compared"] = {f"{label} - {first[0]}": compare_wikitext(first[1], scored) for label, scored in others}
    return result


def _print(kind: str, result: dict[str, Any]) -> None:
    from onnxtools.cli.render import console, table

    if kind == "wikitext":
        columns = ("model", "tokens", "ppl(token)", "ppl(word)", "window", "stride")
        rows = [
            (label, s["n"], f"{s['ppl_token']:.4f}", f"{s['ppl_word']:.4f}", s["max_length"], s["stride"]) for label,
            s in result["models"].items()
        ]  # fmt: skip
        table(f"perplexity of {result['dataset']}", columns, rows, right=columns[1:])
        for label, d in result.get("compared", {}).items():
            low, high = d["ppl_token_factor_ci95"]
            console().print(
                f"{label}: ppl(token) x {d['ppl_token_factor']:.4f} (95%, window by window: {low:.4f} to {high:.4f})",
                markup=False,
                soft_wrap=True,
            )
        return
    for label, s in result["models"].items():
        console().print(
            f"{label}: Lambada ppl(last token): {s['ppl_last_token']:.4f}, ppl(sequence): {s['ppl_sequence']:.4f}, "
            f"acc(top1): {s['acc_top1']:.4f},"
            f" acc(top3): {s['acc_top3']:.4f}, acc(top5): {s['acc_top5']:.4f}", markup=False, soft_wrap=True,
        )  # fmt: skip
    shown = ("model", "n", "acc (whole word)", "95%", "ppl(token)")
    scores = [
        (label, s["n"], f"{s['acc']:.4f}", f"{s['acc_ci95'][0]:.4f} to {s['acc_ci95'][1]:.4f}", f"{s['ppl_token']:.4f}")
        for label, s in result["models"].items()
    ]  # fmt: skip
    table(f"LAMBADA, {result['dataset']}", shown, scores, right=shown[1:])
    for label, d in result.get("compared", {}).items():
        low, high = d["ppl_last_token_factor_ci95"]
        console().print(
            f"{label}: acc {100 * d['acc_difference']:+.2f} +- {100 * d['acc_difference_half_ci95']:.2f} points (only "
            f"the first right {d['only_first_right']},"
            f" only the second {d['only_second_right']}), ppl(last token) x {d['ppl_last_token_factor']:.4f} "
            f"({low:.4f} to {high:.4f})",
            markup=False, soft_wrap=True,
        )  # fmt: skip


command = runtime_command(
    "accuracy", _HELP, _callback,
    extra=[
        click.Option(["--dataset"], required=True,
            help="lambada, wikitext, or a file: .jsonl (LAMBADA's fields) or .txt."),
        click.Option(["--path"], type=PATH,
            help="File of the data. [default for lambada: EleutherAI/lambada_openai of the Hugging Face hub]"),
        click.Option(["--limit"], type=click.IntRange(1), help="Score the first N passages, or windows, alone."),
        click.Option(["--batch-size"], type=click.IntRange(1), default=8, show_default=True,
            help="Texts scored together."),
        click.Option(["--compare"], type=PATH, help="A second model: print the paired difference."),
        click.Option(["--resume"], type=PATH,
            help="Keep LAMBADA's results in this JSONL file, and go on from what is there."),
        click.Option(["--max-length"], type=click.IntRange(2), default=2048, show_default=True,
            help="Tokens of a window of wikitext."),
        click.Option(["--stride"], type=click.IntRange(1),
            help="Tokens from one window to the next. [default: --max-length]"),
    ],
)  # fmt: skip
