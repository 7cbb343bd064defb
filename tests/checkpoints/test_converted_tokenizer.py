"""Tokenizers without tokenizer.json: against sentencepiece, from models that it trains here."""

from __future__ import annotations

import io
import json
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentencepiece")
pytest.importorskip("transformers")
import sentencepiece as spm

from onnxtools.base.errors import JobError
from onnxtools.checkpoints.tokenizer import Tokenizer
from tests.exporter import hf
from tests.support import refuse, succeed

CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, what a day!", "numbers 12345 and äöü"] * 60
TEXTS = ["hello world", "the fox  jumps", "äöü 99 zz", "日本 fox", "a\nb"]


def trained(folder: Path, kind: str) -> Any:
    """Writes a SentencePiece model into `folder` as the old checkpoints of Llama (bpe) and T5 (unigram) have it."""
    llama = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    t5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    folder.mkdir(exist_ok=True)
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=320, model_type=kind,
        hard_vocab_limit=False, minloglevel=2, **(llama if kind == "bpe" else t5),
    )  # fmt: skip
    (folder / ("tokenizer.model" if kind == "bpe" else "spiece.model")).write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer" if kind == "bpe" else "T5Tokenizer", "add_bos_token": True})
    )
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokens_are_those_of_sentencepiece(kind: str, tmp_path: Path) -> None:
    theirs = trained(tmp_path, kind)
    ours = Tokenizer.open(tmp_path)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ([theirs.bos_id(), *ids] if kind == "bpe" else [*ids, theirs.eos_id()]), text
        if theirs.unk_id() not in ids:  # a special token, which we do not show
            assert ours.decode(ids) == theirs.decode(ids)


def test_an_export_has_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "llama"
    hf.make("llama", source)
    theirs = trained(source, "bpe")
    said = succeed("export", source, "-o", tmp_path / "out" / "m.onnx").out
    assert "made by transformers from tokenizer.model" in " ".join(said.split())
    monkeypatch.setitem(sys.modules, "transformers", None)  # the exported folder needs it no more
    assert Tokenizer.open(tmp_path / "out").pieces(TEXTS[0]) == theirs.encode(TEXTS[0])


def test_without_transformers_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "llama"
    hf.make("llama", source)
    trained(source, "bpe")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(JobError, match="pip install transformers sentencepiece"):
        Tokenizer.open(source)
    said = succeed("export", source, "-o", tmp_path / "out" / "m.onnx")
    assert "no tokenizer.json was written" in " ".join((said.out + said.err).split())
    assert (tmp_path / "out" / "tokenizer.model").is_file()


@pytest.mark.parametrize(
    ("name", "content", "config"),
    [
        ("tokenizer.model", b"not a model", {"tokenizer_class": "LlamaTokenizer"}),
        ("tokenizer.model", b"", {"tokenizer_class": "NoSuchTokenizer"}),
        ("qwen.tiktoken", b64encode(b"a") + b" 0\n", {"auto_map": {"AutoTokenizer": ["own--code.Own", None]}}),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    name: str, content: bytes, config: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    line = refuse("run", tmp_path / "m.onnx", "--tokenizer", tmp_path, "--prompt", "x")
    assert line.startswith("error: ")
    with pytest.raises(JobError, match=name):
        Tokenizer.open(tmp_path)
    assert not (tmp_path / "ran").exists()
