"""`run`, `benchmark`, `accuracy` and `summarize` as a user calls them, on SmolLM2-135M, a real trained model."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

pytest.importorskip("accelerate", reason="transformers' GGUF loader, the reference, needs it (make setup installs it)")
import torch
import transformers

from onnxtools.checkpoints.tokenizer import Streams, Tokenizer
from tests.exporter.test_smollm2 import GGUF
from tests.support import SHARED, present, refuse, run, succeed

ARTICLES = Path(__file__).parents[2] / "fixtures/articles.jsonl"
LAMBADA, WIKITEXT = SHARED / "data/lambada_openai.jsonl", SHARED / "data/wikitext2_test.txt"
PROMPTS = (
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at",
    "The three primary colors are", "In 1969,",
    "My favourite recipe for bread", "To be or not", "The mitochondria", "Dear Sir or Madam,", "import numpy as np",
    "The opposite of hot is",
    "Roses are red,", "A triangle has", "The largest planet", "Q: What is 2 + 2?\nA:", "She opened the door and",
    "Breaking news:", "The theory of relativity",
    "List three fruits:",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    succeed("export", GGUF, "-o", folder / "model.onnx", "--kv-cache", "gqa")
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def concat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("concat")
    succeed("export", GGUF, "-o", folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def reference() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32
    ).eval()


def said(*args: str | Path) -> Any:
    return json.loads(succeed(*args, "--json").out)


# --- run
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["gqa", "concat"])
def test_64_greedy_tokens_of_20_prompts_equal_transformers(
    form: str, model: Path, concat: Path, reference: Any
) -> None:
    path = model if form == "gqa" else concat
    flags = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    found = said("run", path, *flags, "--max-new-tokens", "64", "--ignore-eos")["runtimes"]["onnxrt"][0]["token_ids"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path.parent / "tokenizer.json"), pad_token="<|im_end|>", padding_side="left"
    )
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        out = reference.generate(
            **batch, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=2
        )
    expected = [row[-64:] for row in out.tolist()]
    assert [row[-64:] for row in found] == expected


def test_run_says_paris_while_it_generates(model: Path) -> None:
    assert succeed("run", model, "--prompt", "The capital of France is", "--max-new-tokens", "4").out.startswith(
        "The capital of France is Paris."
    )


def test_run_prints_what_the_demo_printed(model: Path) -> None:
    [found] = said("run", model, "--prompt", "The capital of France is", "--max-new-tokens", "3")["runtimes"]["onnxrt"]
    assert set(found) >= {"sentences", "tokens", "logprob", "token_ids", "offsets"}
    [sentence], [tokens], [ids], [offsets], [logprob] = (
        found[k] for k in ("sentences", "tokens", "token_ids", "offsets", "logprob")
    )
    assert sentence.startswith("The capital of France is Paris") and tokens[:2] == ["The", "Ġcapital"]
    assert len(tokens) == len(ids) == len(offsets) == 8 and len(logprob) == 3 and max(logprob) <= 0
    assert [sentence[a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)] == [
        t.replace("Ġ", " ").replace("Ċ", "\n") for t in tokens
    ]


def test_beams_are_printed_by_number(model: Path) -> None:
    out = succeed(
        "run",
        model,
        "--prompt",
        "The capital of France is",
        "--num-beams",
        "3",
        "--num-return-sequences",
        "2",
        "--max-new-tokens",
        "5",
    ).out
    assert "beam 0 result" in out and "beam 1 result" in out and "Paris" in out


def test_a_stop_text_cuts_the_text(model: Path) -> None:
    [found] = said("run", model, "--prompt", "The capital of France is", "--stop", ".", "--max-new-tokens", "9")[
        "runtimes"
    ]["onnxrt"]
    assert found["sentences"] == ["The capital of France is Paris"] and found["finish"] == ["stop"]


def test_a_stop_text_of_several_tokens_is_not_shown(model: Path) -> None:
    """Paris. and what follows: the beginning of the stop text is held back until it is whole."""
    assert (
        succeed("run", model, "--prompt", "The capital of France is", "--stop", "ris.", "--max-new-tokens", "9").out
        == "The capital of France is Pa\n"
    )
    assert (
        succeed("run", model, "--prompt", "The capital of France is", "--stop", ".zzz", "--max-new-tokens", "2").out
        == "The capital of France is Paris.\n"
    )


def test_a_word_after_the_prompt_keeps_its_space() -> None:
    """A tokenizer of SentencePiece's kind writes the space into the word, and drops it at the beginning of a text."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁he": 0, "▁said": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer, inner.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    tokenizer, shown = Tokenizer(inner, Path("t")), list[str]()
    assert tokenizer.continuation(tokenizer.encode("he"), [1, 0]) == " said he"
    streams = Streams(tokenizer, [[0]], ("he",), lambda row, text: shown.append(text))
    assert [streams(0, 1), streams(0, 0)] == [False, True] and "".join(shown) == " said "


def test_characters_of_several_tokens_are_shown_whole(model: Path) -> None:
    prompt = "Translate to Chinese: hello -> 你好. thanks ->"
    out = succeed("run", model, "--prompt", prompt, "--max-new-tokens", "12").out
    [found] = said("run", model, "--prompt", prompt, "--max-new-tokens", "12")["runtimes"]["onnxrt"]
    assert out == found["sentences"][0] + "\n"


def test_runtimes_side_by_side(model: Path) -> None:
    found = said(
        "run",
        model,
        "--prompt",
        "Hello",
        "--runtime",
        "onnxrt",
        "--runtime",
        "frameworks:eager:nocache",
        "--checkpoint",
        GGUF,
        "--max-new-tokens",
        "5",
    )
    one, other = found["runtimes"]["onnxrt"], found["runtimes"]["frameworks:eager:nocache"]
    assert one[0]["token_ids"] == other[0]["token_ids"]


@pytest.mark.parametrize(("arguments", "names", "code"), [
    (["--prompt", ""], "prompt 0 is empty", 2), ([], "no prompt", 2),
    (["--prompt", "x", "--checkpoint", "x.gguf"], "--checkpoint is for", 2),
    (["--prompt", "x", "--runtime", "tensorflow"], "tensorflow", 2),
    (["--prompt", "x", "--runtime", "onnxrt:gpu"], "gpu", 2),
    (["--prompt", "x", "--runtime", "onnxrt", "--runtime", "onnxrt"], "twice", 2),
    (["--prompt", "x", "--max-new-tokens", "9000"], "8192 positions", 1),
    (["--prompt", "x", "--tokenizer", "absent"], "no tokenizer", 1),
    (["--prompt", "x", "--runtime", "frameworks"], "--checkpoint", 1),
    (["--prompts-file", "absent.txt"], "absent.txt", 1),
    (["--prompt", "x", "--device", "cuda"], "CUDA", 1),
])  # fmt: skip
def test_run_refuses(arguments: list[str], names: str, code: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert names in refuse("run", model, *arguments, code=code)


def test_a_prompt_is_not_shown_before_an_error(model: Path) -> None:
    assert run("run", model, "--prompt", "x", "--max-new-tokens", "9000").out == ""


# --- benchmark
# ------------------------------------------------------------------------------------------------------------


def test_benchmark_prints_the_demos_block_and_the_ratio(model: Path, tmp_path: Path) -> None:
    result = succeed(
        "benchmark", model, "--batch-size", "2", "--input-seq-len", "8", "--output-seq-len", "3", "--warmup", "1",
        "--iterations", "2", "--runtime", "onnxrt",
        "--runtime", "frameworks", "--checkpoint", GGUF, "--plot", tmp_path / "p.png",
    )  # fmt: skip
    for text in ("[E2E inference] Total Time: ", "[Without tokenizer] Total Time: ", "95th Percentile Time",
        "Throughput: ", "time per output token",
                 "peak memory", "limit of the machine", "x as fast as frameworks"):  # fmt: skip
        assert text in result.out
    assert "no CUDA device" in result.err
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_benchmarks_figures_follow_the_demos_definitions() -> None:
    from onnxtools.evaluate.timing import summary

    seconds = [float(s) for s in range(1, 11)]
    found = summary(seconds, 320)
    # sorted[int(10 * 0.95)] is the maximum, as FACTS-te-nemo 3.4 notes.
    assert (found["total_s"], found["average_s"], found["p95_s"], found["p99_s"]) == (55.0, 5.5, 10.0, 10.0)
    assert found["throughput_tokens_per_s"] == pytest.approx(320 / 5.5)
    hundred = summary([float(s) for s in range(100)], 1)
    assert (hundred["p95_s"], hundred["p99_s"]) == (95.0, 99.0)


def test_work_counts_the_bytes_and_operations_of_the_model(model: Path) -> None:
    from onnxtools.evaluate.limits import work
    from onnxtools.evaluate.timing import BenchmarkOptions

    found = work(model, BenchmarkOptions(batch_size=2, input_seq_len=10, output_seq_len=4))
    # SmolLM2-135M: 134.5 million parameters in fp32 (the tied table is read by the head), 30 layers of 3 KV heads of
    # 64.
    cache = 2 * 30 * 3 * 64 * 4 * 2 * 12
    assert found.step_bytes == pytest.approx(134.515e6 * 4 + cache, rel=2e-3)
    attention = 2 * 20 * 10 * 30 * 9 * 64
    assert found.prefill_flops == pytest.approx(2 * 134.48e6 * 20 + attention, rel=2e-3)


@pytest.mark.parametrize(("arguments", "names", "code"), [
    (["--batch-size", "0"], "batch-size is 0", 2), (["--iterations", "0"], "iterations is 0", 2),
    (["--input-seq-len", "8190"], "8192 positions", 1),
    (["--iterations", "1", "--warmup", "0", "--input-seq-len", "2", "--output-seq-len", "1", "--plot", "p.doc"], ".doc",
        2),
])  # fmt: skip
def test_benchmark_refuses(
    arguments: list[str], names: str, code: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = refuse_last("benchmark", model, *arguments, code=code)
    assert names in result and not (tmp_path / "p.doc").exists()


def refuse_last(*args: str | Path, code: int) -> str:
    """As `refuse`, after notes."""
    result = run(*args)
    *notes, line = result.err.splitlines()
    assert result.code == code and line.startswith("error: ") and all(note.startswith("note: ") for note in notes), (
        result.err
    )
    return line


# --- accuracy
# -------------------------------------------------------------------------------------------------------------


def test_lambada_equals_transformers(model: Path, tmp_path: Path) -> None:
    journal = tmp_path / "rows.jsonl"
    lambada = present(LAMBADA)
    # A journal is of one way of running, so that the second run repeats every flag of the first.
    common = [
        "--limit",
        "24",
        "--runtime",
        "onnxrt",
        "--runtime",
        "frameworks",
        "--checkpoint",
        GGUF,
        "--resume",
        journal,
    ]
    found = said("accuracy", model, "--dataset", "lambada", "--path", lambada, *common)
    ours, theirs = found["models"]["onnxrt"], found["models"]["frameworks"]
    assert ours["n"] == 24 and 0 < ours["acc"] < 1
    for name in ("acc", "acc_top1", "acc_top3", "acc_top5"):
        assert ours[name] == theirs[name]
    for name in ("ppl_last_token", "ppl_sequence", "ppl_token"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
    assert found["compared"]["frameworks - onnxrt"]["acc_difference"] == 0
    assert len(journal.read_text().splitlines()) == 25
    again = said("accuracy", model, "--dataset", lambada, *common)
    assert again["models"] == found["models"]


def test_wikitext_equals_transformers(concat: Path, reference: Any) -> None:
    found = said(
        "accuracy", concat, "--dataset", "wikitext", "--path", present(WIKITEXT), "--max-length", "256", "--limit", "2"
    )["models"]["onnxrt"]
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(concat.parent / "tokenizer.json")).encode(WIKITEXT.read_text()).ids[:512]
    with torch.no_grad():
        losses = [
            reference(torch.tensor([ids[i : i + 256]]), labels=torch.tensor([ids[i : i + 256]])).loss.item()
            for i in (0, 256)
        ]
    assert found["ppl_token"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-3) and found["n"] == 510


@pytest.mark.parametrize(("arguments", "names", "code"), [
    (["--dataset", "glue"], "'glue'", 2), (["--dataset", "wikitext"], "--path", 2),
    (["--dataset", "absent.jsonl"], "absent.jsonl", 1),
    (["--dataset", "wikitext", "--path", "absent.txt"], "absent.txt", 1),
    (["--dataset", "lambada", "--compare", "absent.onnx"], "absent.onnx", 1),
])  # fmt: skip
def test_accuracy_refuses(arguments: list[str], names: str, code: int, model: Path) -> None:
    assert names in refuse("accuracy", model, *arguments, code=code)


def test_a_model_compared_with_itself_differs_by_nothing(model: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "The capital of France is Paris"}\n{"text": "Two and two are four"}\n')
    found = said("accuracy", model, "--dataset", tmp_path / "d.jsonl", "--compare", model)
    assert len(found["models"]) == 2 and [c["acc_difference"] for c in found["compared"].values()] == [0]
    one = said("accuracy", model, "--dataset", tmp_path / "d.jsonl", "--limit", "1")
    assert [m["ppl_last_token_ci95"] for m in one["models"].values()] == [[None, None]]  # JSON knows no NaN
    (tmp_path / "t.txt").write_text("One two three four five six seven eight nine ten. " * 8)
    text = said(
        "accuracy",
        model,
        "--dataset",
        tmp_path / "t.txt",
        "--max-length",
        "16",
        "--stride",
        "8",
        "--limit",
        "3",
        "--compare",
        model,
    )
    assert {m["windows"] for m in text["models"].values()} == {3} and [
        c["ppl_token_factor"] for c in text["compared"].values()
    ] == [1]


def test_a_journal_is_of_one_tokenizer_and_one_dataset(model: Path, tmp_path: Path) -> None:
    rows = [
        '{"text": "The capital of France is Paris"}\n',
        '{"text": "Two and two are four"}\n',
        '{"text": "He said yes"}\n',
    ]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    (tmp_path / "b.jsonl").write_text("".join([rows[0], rows[2], rows[2]]))
    succeed("accuracy", model, "--dataset", tmp_path / "a.jsonl", "--resume", tmp_path / "j.jsonl")
    assert "another model" in refuse(
        "accuracy", model, "--dataset", tmp_path / "b.jsonl", "--resume", tmp_path / "j.jsonl"
    )


# --- summarize
# ------------------------------------------------------------------------------------------------------------


def test_summaries_are_scored_with_rouge(model: Path) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    found = said(
        "summarize", model, "--dataset", ARTICLES, "--limit", "2", "--max-new-tokens", "24", "--batch-size", "2"
    )["runtimes"]["onnxrt"]
    rows = [json.loads(line) for line in ARTICLES.read_text().splitlines()[:2]]
    scorer = RougeScorer(["rouge1", "rougeLsum"], use_stemmer=True)
    scores = [scorer.score(row["highlights"], text) for row, text in zip(rows, found["summaries"], strict=True)]
    for name in ("rouge1", "rougeLsum"):
        assert found[name] == pytest.approx(100 * np.mean([s[name].fmeasure for s in scores]))
    assert (
        found["rouge1"] > 5
        and found["output_tokens"] <= 48
        and found["tokens_per_s"] == pytest.approx(found["output_tokens"] / found["total_latency_s"])
    )


def test_the_prompt_is_the_article_and_tldr_and_fits_the_room() -> None:
    from onnxtools.checkpoints.tokenizer import Tokenizer
    from onnxtools.evaluate.summaries import TEMPLATE, _prompt

    class Words(Tokenizer):
        def encode(self, text: str) -> Any:
            return text.split()

    words: Any = Words(None, Path())
    assert _prompt(words, "one two three four five", TEMPLATE, 4) == ["one", "two", "three", "TL;DR:"]
    assert _prompt(words, "one two", "Say: {article} now", 9) == ["Say:", "one", "two", "now"]


def test_a_threshold_decides_the_exit_code(model: Path) -> None:
    arguments = [
        "summarize",
        model,
        "--dataset",
        ARTICLES,
        "--limit",
        "1",
        "--max-new-tokens",
        "8",
        "--check-accuracy",
        "--rouge1-threshold",
    ]
    assert run(*arguments, "0").code == 0
    failed = run(*arguments, "99")
    assert failed.code == 1 and "is below 99" in failed.out


def test_summarize_refuses_other_fields_and_templates(model: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "x"}\n')
    assert "'text'" in refuse("summarize", model, "--dataset", tmp_path / "d.jsonl")
    assert "{article}" in refuse("summarize", model, "--dataset", ARTICLES, "--template", "Sum up:", code=2)
    assert "2 times" in refuse(
        "summarize", model, "--dataset", ARTICLES, "--template", "{article} and {article}:", code=2
    )
