"""Small tokenizers of three kinds, written by `tokenizers` itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

MARK = "\u2581"
WORDS = ("in", "which", "the", "old", "ship", "sails", "round", "a", "small", "island", "before", "night")


def prefixes(start: str) -> list[tuple[str, str]]:
    """Merges that build every word of WORDS, and `start` in front of it, letter by letter."""
    pairs: dict[tuple[str, str], None] = {}
    for word in WORDS:
        built = start
        for letter in word:
            pairs[(built, letter)] = None
            built += letter
    return list(pairs)


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a word mark in front of every text, bytes for what is unknown, <s> before a text."""
    merges = prefixes(MARK)
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        MARK,
        *sorted({c for w in WORDS for c in w}),
        *(a + b for a, b in merges),
    ]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def byte_level() -> Tokenizer:
    """As GPT-2's: the space belongs to the word after it."""
    vocab, merges = byte_level_parts()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def byte_level_parts(*special: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    merges = [
        *prefixes("Ġ"),
        ("i", "n"),
        ("o", "l"),
        ("ol", "d"),
        ("1", "2"),
        ("3", "4"),
        ("\u010a", "\u010a"),
        ("l", "l"),
        ("'", "s"),
    ]
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges), *special]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}, merges


def write_parts(folder: Path, *special: str, **files: Any) -> dict[str, int]:
    """vocab.json, merges.txt and the other `files` (by name without .json); the vocabulary."""
    vocab, merges = byte_level_parts(*special)
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content(len(vocab)) if callable(content) else content))
    return vocab
