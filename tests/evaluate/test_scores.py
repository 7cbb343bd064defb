"""Log-probabilities, LAMBADA's figures and perplexities against torch and against the definitions written out
plainly.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the models are written by transformers (make setup installs it)")
import torch

from onnxtools.base.errors import JobError
from onnxtools.checkpoints.tokenizer import Tokenizer
from onnxtools.engines.runtimes.onnxrt.ort_runtime import OrtRuntime
from onnxtools.evaluate import lambada
from onnxtools.evaluate.lambada import (
    Journal,
    Passage,
    PassageResult,
    compare_lambada,
    read_lambada,
    score_lambada,
    summarize_lambada,
)
from onnxtools.evaluate.scores import mean_interval, score_texts, share_interval
from onnxtools.evaluate.wikitext import Windows, score_wikitext
from onnxtools.generation.runtime import RuntimeOptions
from tests.generation import vocabularies
from tests.generation.models import exported, reference

CPU = RuntimeOptions(device="cpu", threads=2)
GENERATOR = np.random.default_rng(5)
TEXTS = [GENERATOR.integers(0, 97, size).tolist() for size in (5, 17, 9, 9, 30, 2)]


def logprobs(text: list[int]) -> np.ndarray:
    """[tokens - 1, vocabulary] of transformers, float64."""
    with torch.no_grad():
        return torch.log_softmax(reference("llama")(torch.tensor([text])).logits[0, :-1].double(), -1).numpy()


@pytest.mark.parametrize("form", ["concat", "gqa"])
@pytest.mark.parametrize("batch", [1, 4])
def test_log_probabilities_and_ranks(form: str, batch: int) -> None:
    found = score_texts(OrtRuntime(exported("llama", form), CPU), TEXTS, [1, 3, 0, 2, 5, 1], batch_size=batch)
    for text, target, scored in zip(TEXTS, [1, 3, 0, 2, 5, 1], found, strict=True):
        expected = logprobs(text)
        np.testing.assert_allclose(scored.logprobs, expected[np.arange(len(text) - 1), text[1:]], atol=1e-4)
        assert len(scored.top) == len(scored.ranks) == target
        for place in range(target):
            row = expected[len(text) - 1 - target + place]
            np.testing.assert_allclose(row[scored.top[place]], np.sort(row)[::-1][:5], atol=1e-4)
            assert scored.ranks[place] == (row > row[text[len(text) - target + place]]).sum()


class Counting(OrtRuntime):
    inputs: list[list[int]]

    def score(self, prompts):  # type: ignore[no-untyped-def]
        self.inputs = [*getattr(self, "inputs", []), *map(list, prompts)]
        return super().score(prompts)


def test_one_token_continuations_of_one_context_are_read_off_one_run() -> None:
    runtime = Counting(exported("llama", "concat"), CPU)
    texts = [[1, 2, 3, token] for token in (4, 5, 6)]
    found = score_texts(runtime, texts, [1, 1, 1], batch_size=2)
    assert runtime.inputs == [[1, 2, 3]]
    np.testing.assert_allclose([s.logprobs[-1] for s in found], logprobs([1, 2, 3, 0])[-1][[4, 5, 6]], atol=1e-4)


def test_a_text_of_one_token_cannot_be_scored() -> None:
    with pytest.raises(JobError, match="text 1 has 1 tokens"):
        score_texts(OrtRuntime(exported("llama", "concat"), CPU), [[1, 2], [3]], [1, 1], batch_size=1)


# --- LAMBADA
# --------------------------------------------------------------------------------------------------------------

PASSAGES = [
    Passage(GENERATOR.integers(0, 97, int(c)).tolist(), GENERATOR.integers(0, 97, int(w)).tolist())
    for c, w in GENERATOR.integers(1, 6, (40, 2))
]


def definition() -> dict[str, float]:
    """FACTS-te-nemo 3.4, written out."""
    words, sequences, top, exact, pieces, everything, count = [], [], {1: 0, 3: 0, 5: 0}, 0, 0, 0.0, 0
    for passage in PASSAGES:
        text = passage.context + passage.word
        table = logprobs(text)
        own = table[np.arange(len(text) - 1), text[1:]]
        target = table[-len(passage.word) :]
        words.append(own[-len(passage.word) :].sum())
        sequences.append(own.mean())
        for n in top:
            matrix = np.argsort(-target, axis=-1)[:, :n]
            top[n] += passage.word[0] in matrix
        exact += (target.argmax(-1) == passage.word).all()
        pieces += len(passage.word)
        everything += own.sum()
        count += len(own)
    n = len(PASSAGES)
    return {
        "acc": exact / n, "acc_top1": top[1] / n, "acc_top3": top[3] / n, "acc_top5": top[5] / n,
        "ppl_last_token": math.exp(-np.mean(words)),
        "ppl_sequence": math.exp(-np.mean(sequences)), "ppl_token": math.exp(-sum(words) / pieces),
        "ppl_token_all": math.exp(-everything / count),
    }  # fmt: skip


def test_lambadas_figures_are_the_definitions() -> None:
    # Words of the model's own choice, so that some are hit.
    for passage in PASSAGES[::3]:
        passage.word[0] = int(logprobs([*passage.context, 0])[-1].argmax())
    found = score_lambada(
        OrtRuntime(exported("llama", "concat"), CPU), PASSAGES, batch_size=7, known={}, done=lambda *_: None
    )
    figures, expected = summarize_lambada(found), definition()
    assert expected["acc_top5"] > expected["acc_top1"] > 0
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-4), name
    assert figures["n"] == 40


def result(exact: bool, word: float) -> PassageResult:
    return PassageResult(word, 1, word, 1, exact, exact, exact, exact)


def test_the_paired_difference() -> None:
    a = [result(i % 2 == 0, -1.0) for i in range(100)]
    b = [result(i % 4 == 0, -1.5) for i in range(100)]
    found = compare_lambada(a, b)
    assert (
        found["acc_difference"] == pytest.approx(-0.25)
        and found["only_first_right"] == 25
        and found["only_second_right"] == 0
    )
    assert found["acc_difference_half_ci95"] == pytest.approx(1.96 * np.std([-1.0] * 25 + [0.0] * 75, ddof=1) / 10)
    assert found["ppl_last_token_factor"] == pytest.approx(math.exp(0.5))


def test_intervals() -> None:
    # Wilson's interval of 8 of 10, as in Brown, Cai and DasGupta (2001) and any calculator: 0.4902 to 0.9433.
    assert share_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert mean_interval([1, 2, 3, 4]) == pytest.approx((2.5, 1.96 * math.sqrt(5 / 3) / 2))


def test_an_interrupted_journal_goes_on(tmp_path: Path) -> None:
    runtime = Counting(exported("llama", "concat"), CPU)
    of = {"model": "m"}
    whole = score_lambada(runtime, PASSAGES[:9], batch_size=2, known={}, done=lambda *_: None)
    journal = Journal(tmp_path / "j.jsonl", of)
    for index in range(5):
        journal.add(index, whole[index])
    journal.close()
    with open(tmp_path / "j.jsonl", "a") as file:
        file.write('{"index": 5, "word": -1')  # the power went out
    again = Journal(tmp_path / "j.jsonl", of)
    assert sorted(again.known) == [0, 1, 2, 3, 4]
    runtime.inputs = []
    assert score_lambada(runtime, PASSAGES[:9], batch_size=2, known=again.known, done=again.add) == whole
    assert len(runtime.inputs) == 4
    again.close()
    assert sorted(Journal(tmp_path / "j.jsonl", of).known) == list(range(9))
    with pytest.raises(JobError, match="results of another model"):
        Journal(tmp_path / "j.jsonl", {"model": "other"})


@pytest.mark.parametrize(("text", "names"), [
    ('{"question": "x"}', "'question'"), ("[1]", "not an object"), ("{", "not JSON"), ("", "no rows"),
        ('{"text": "one"}', "context is empty"),
    ('{"context": null, "continuation": ["x"]}', "must be text"), ('{"text": 5}', "must be text"),
    ("[" * 100000, "not JSON"),
    ('{"context": "", "continuation": "x"}', "context is empty"),
])  # fmt: skip
def test_unknown_fields_and_damaged_rows_are_errors(text: str, names: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(JobError, match=names):
        read_lambada(tmp_path / "d.jsonl")


def test_a_line_separator_inside_a_string_ends_no_row(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"context": "one\u2028two", "continuation": "x"}, ensure_ascii=False) + "\n", encoding="utf-8-sig"
    )
    assert read_lambada(tmp_path / "d.jsonl") == [("one\u2028two", "x")]


@pytest.mark.parametrize("content",
    [b"\nmy data\n", b"\xff\xfe\n", b'{"model": "m"}\n{"index": 0, "word": "x", "pieces": 1}\n', b"[]\n",
    b'{"model": "m"}\n{"index": 0, "word": -1, "pieces": 0, "total": -1, "tokens": 1, "exact": true, "top1": true, '
    b'"top3": true, "top5": true}\n',
])  # fmt: skip
def test_other_files_and_damaged_journals_are_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "j.jsonl").write_bytes(content)
    with pytest.raises(JobError, match="no journal"):
        Journal(tmp_path / "j.jsonl", {"model": "m"})
    assert (tmp_path / "j.jsonl").read_bytes() == content


def test_both_spellings_of_the_dataset(tmp_path: Path) -> None:
    rows = [{"context": "He said", "continuation": "yes"}, {"text": "She said no"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_lambada(tmp_path / "d.jsonl") == [("He said", "yes"), ("She said", " no")]
    assert read_lambada(tmp_path / "d.jsonl", 1) == [("He said", "yes")]


ROWS = (
    ({"text": "the old ship sails"}, "the old ship", " sails"), ({"text": "the old  ship \n"}, "the old ", " ship"),
    ({"context": "the old", "continuation": "ship"}, "the old", " ship"),
    ({"context": "the old ", "continuation": "ship"}, "the old ", "ship"),
    ({"context": "the old", "continuation": " ship"}, "the old", " ship"),
    ({"context": "the old\n", "continuation": "ship "}, "the old\n", "ship"),
    ({"context": "the old", "continuation": "\n\nship"}, "the old", " ship"),
)  # fmt: skip


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
def test_words_are_cut_from_their_contexts_as_lm_eval_cuts_them(kind: str, tmp_path: Path) -> None:
    """lm-eval's rule written out: both as one text, cut where the context, less the white space at its end, has its
    tokens.
    """
    native = getattr(vocabularies, kind)()
    native.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row, _, _ in ROWS))
    found = lambada.tokenized(read_lambada(tmp_path / "d.jsonl"), Tokenizer.open(tmp_path), None)
    for passage, (row, context, word) in zip(found, ROWS, strict=True):
        before = native.encode(context.rstrip()).ids
        assert passage == Passage(before, native.encode(context + word).ids[len(before) :]), row
        assert native.decode([*passage.context, *passage.word]) == context + word


def test_a_word_without_a_token_of_its_own_is_named() -> None:
    """A tokenizer that joins a context's last word and the next one."""

    class Letters(Tokenizer):
        def encode(self, text: str) -> list[int]:
            return [len(text)]

    with pytest.raises(JobError, match="passage 0: its last word 'old' has no token of its own"):
        lambada.tokenized([("the", " old")], Letters(None, Path()), None)


def test_one_run_writes_a_journal(tmp_path: Path) -> None:
    """The second is refused by name and changes nothing; the lock goes with the process, however it ends."""
    path, code = (
        tmp_path / "j.jsonl",
        "import sys, time; from pathlib import Path; from onnxtools.evaluate.lambada import Journal",
    )
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{code}; j = Journal(Path(sys.argv[1]), {{'model': 'm'}}); print(1, flush=True); time.sleep(60)",
            path,
        ],
        stdout=subprocess.PIPE,
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == b"1\n"
        content = path.read_bytes()
        with pytest.raises(JobError, match=r"j\.jsonl: another run of `accuracy` writes it now"):
            Journal(path, {"model": "m"})
        assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["j.jsonl"]
        run.kill()
    Journal(path, {"model": "m"}).close()
    assert [p.name for p in tmp_path.iterdir()] == ["j.jsonl"]


def test_contexts_are_cut_at_their_beginning_where_the_positions_end() -> None:
    class Words(Tokenizer):
        def encode(self, text: str) -> list[int]:
            return [int(word) for word in text.split()]

    [passage] = lambada.tokenized([("1 2 3 4 5 6", "7 8")], Words(None, Path()), 4)
    # The last token is only predicted, so 5 tokens fit 4 positions.
    assert passage == Passage([4, 5, 6], [7, 8])


# --- perplexity
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 5), (16, 1), (64, 64), (40, 7)])
def test_perplexity_is_that_of_transformers_guide(length: int, stride: int) -> None:
    """https://huggingface.co/docs/transformers/perplexity, its loop with each window's mean weighted by its tokens."""
    tokens = np.random.default_rng(8).integers(0, 97, 61).tolist()
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + length, len(tokens))
        ids = torch.tensor([tokens[begin:end]])
        labels = ids.clone()
        labels[:, : -(end - previous)] = -100
        with torch.no_grad():
            loss = reference("llama")(ids, labels=labels).loss.double().item()
        valid = (labels != -100).sum().item() - int(labels[0, 0] != -100)
        if valid:
            total, count = total + loss * valid, count + valid
        previous = end
        if end == len(tokens):
            break
    found = score_wikitext(
        OrtRuntime(exported("llama", "concat"), CPU),
        tokens,
        10,
        Windows(length, stride),
        batch_size=3,
        done=lambda: None,
    ).figures
    assert found["n"] == count
    assert found["ppl_token"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["ppl_word"] == pytest.approx(math.exp(total / 10), rel=1e-4)
