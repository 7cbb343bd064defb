"""Converts the tokenizer in a GGUF file's metadata to the files that Hugging Face's libraries read.

This module writes the JSON itself, without the `tokenizers` package. The meaning of each name in `tokenizer.ggml.pre`,
and the defaults for absent keys, are llama.cpp's (src/llama-vocab.cpp). The JSON has the structure of the published
tokenizer.json of each family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from onnxtools.base.errors import JobError

# tokenizer.ggml.token_type (gguf-py's TokenType). 1 is a normal token, 5 an unused one, which no merge reaches.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_NAMED = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
# Tokens that end an answer, besides eos: the end of a turn, and the end of a message with a tool call.
_ENDS = ("eot_token_id", "eom_token_id")
_SPACE = "▁"
_LONGEST = 512
"""Most characters of a SentencePiece token."""


def byte_level(use_regex: bool, prefix: bool = False) -> dict[str, Any]:
    """Returns a ByteLevel step. `use_regex` splits by GPT-2's regex first; `prefix` adds a space before the text."""
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def words(digits: str, prefix: bool = False) -> dict[str, Any]:
    """Returns the pre-tokenizer of cl100k and its descendants, which differ in the regex for groups of digits.

    Args:
        digits: the regex for digits.
        prefix: as in `byte_level`.
    """
    regex = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return _sequence(_split(regex), byte_level(False, prefix))


ONE_DIGIT = r"\p{N}"
"""The regex for digits of Qwen 2, which does not group them."""

_GPT2 = byte_level(True)
_DIGITS = _sequence({"type": "Digits", "individual_digits": True}, byte_level(True))
_LLAMA3 = words(r"\p{N}{1,3}")
_QWEN2 = words(ONE_DIGIT)
# llama.cpp's choice if a file names no pre-tokenizer, or "default": no model's own, but the one that users run.
_DEFAULT = _sequence(
    _split(r"[\p{P}\$\+<=>\^~\|]+"),
    _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
    _split(r"\p{N}+"),
    _split(r"[0-9][0-9][0-9]"),
    byte_level(False),
)
_PRE = {
    **{"default": _DEFAULT, "gpt-2": _GPT2, "phi-2": _GPT2},
    **{"smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS},
    **{"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3},
    **{"qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2},
}


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns tokenizer.json, tokenizer_config.json, special_tokens_map.json and generation_config.json: text by name.

    Raises:
        JobError: the metadata holds no tokenizer, or its kind is not supported, or it contradicts itself.
    """
    kind = _get(metadata, "model")
    if kind is None:
        raise JobError("the metadata has no tokenizer.ggml.model; take the tokenizer's files from the original model")
    if kind not in ("gpt2", "llama"):
        raise JobError(
            f"tokenizer.ggml.model {kind!r} is not supported (known: gpt2, llama); take the tokenizer's files from the "
            "original model"
        )
    types = _types(metadata)
    names = _names(metadata, types, kind)
    special = {role: i for role, key in _NAMED.items() if (i := _token_id(metadata, key, names)) is not None}
    if kind == "llama":
        # These are llama.cpp's defaults for SentencePiece. A byte-level vocabulary has no such defaults.
        special = {role: i for i, role in enumerate(("unk", "bos", "eos")) if i < len(names)} | special
    vocab = {name: i for i, name in enumerate(names)}
    ends = _ends(metadata, names, special)
    added = [
        {
            "id": i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[i] != _USER_DEFINED,
        }
        for i, name in enumerate(names)
        if types[i] in (_CONTROL, _USER_DEFINED) or i in special.values() or i in ends
    ]
    parts = (
        _sentencepiece(metadata, names, types, names[special["unk"]])
        if kind == "llama"
        else _byte_level_bpe(metadata, vocab)
    )
    adds = _added_roles(metadata, kind, special)
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}
    tokenizer["post_processor"] = template(adds, {role: names[i] for role, i in special.items()}, special)
    tokenizer["model"]["vocab"] = vocab
    named = {f"{role}_token": names[i] for role, i in special.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **named,
        **_chat_template(metadata),
    }
    config |= {f"add_{role}_token": role in adds for role in ("bos", "eos")}
    generation: dict[str, Any] = {
        f"{role}_token_id": special[role] for role in ("bos", "eos", "pad") if role in special
    }
    if len(ends) > 1:
        generation["eos_token_id"] = ends
    texts = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": config,
        "special_tokens_map.json": named,
        "generation_config.json": generation,
    }
    return {name: json.dumps(text, ensure_ascii=False, indent=2) + "\n" for name, text in texts.items()}


def _get(metadata: Mapping[str, Any], key: str, default: Any = None) -> Any:
    return metadata.get(f"tokenizer.ggml.{key}", default)


def _list(metadata: Mapping[str, Any], key: str, kinds: type | tuple[type, ...]) -> list[Any]:
    values = _get(metadata, key)
    if not isinstance(values, list) or not values:
        raise JobError(f"the metadata has no tokenizer.ggml.{key}; take the tokenizer's files from the original model")
    if not all(isinstance(value, kinds) for value in values):
        raise JobError(f"tokenizer.ggml.{key} holds values of a wrong type; fetch the file again")
    return values


def _types(metadata: Mapping[str, Any]) -> list[int]:
    count = len(_list(metadata, "tokens", str))
    types = _list(metadata, "token_type", int) if _get(metadata, "token_type") else [1] * count
    if len(types) != count:
        raise JobError(f"tokenizer.ggml.token_type has {len(types)} entries for {count} tokens; fetch the file again")
    return types


def _names(metadata: Mapping[str, Any], types: list[int], kind: str) -> list[str]:
    """Returns the tokens' texts.

    SentencePiece matches user-defined tokens in the plain text, so their texts get plain spaces.
    """
    tokens = _list(metadata, "tokens", str)
    names = [
        name.replace(_SPACE, " ") if kind == "llama" and types[i] == _USER_DEFINED else name
        for i, name in enumerate(tokens)
    ]
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise JobError(f"tokenizer.ggml.tokens has {twice!r} twice; a tokenizer.json cannot tell the two apart")
    return names


def _token_id(metadata: Mapping[str, Any], key: str, names: list[str]) -> int | None:
    value = _get(metadata, key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise JobError(f"tokenizer.ggml.{key} is {value!r}, but there are {len(names)} tokens; correct the metadata")
    return value


def _ends(metadata: Mapping[str, Any], names: list[str], special: Mapping[str, int]) -> list[int]:
    ids = [special.get("eos"), *(_token_id(metadata, key, names) for key in _ENDS)]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _byte_level_bpe(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> dict[str, Any]:
    pre = _get(metadata, "pre", "default")
    if pre not in _PRE:
        raise JobError(
            f"tokenizer.ggml.pre {pre!r} is not supported (known: {', '.join(sorted(_PRE))}); take the tokenizer's "
            "files from the original model"
        )
    merges = []
    for merge in _list(metadata, "merges", str):
        # The first part has at least one character, which may itself be a space.
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not {left, right, left + right} <= vocab.keys():
            raise JobError(
                f"tokenizer.ggml.merges has {merge!r}, whose parts or result are no tokens; fetch the file again"
            )
        merges.append([left, right])
    # Without unk_token a byte that is no token is dropped, as in the original tokenizer (SmolLM2 lacks 21 bytes: rare
    # control characters, bytes of unassigned planes).
    return {
        "normalizer": {"type": "NFC"} if _PRE[pre] is _QWEN2 else None,
        "pre_tokenizer": _PRE[pre],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": bpe(merges, ignore_merges=_PRE[pre] is _LLAMA3),
    }


def bpe(merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    """Returns the `model` of a BPE tokenizer.json, without its `vocab`; `settings` replace the defaults."""
    base = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    return {**base, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **settings, "merges": merges}


def _sentencepiece(metadata: Mapping[str, Any], names: list[str], types: list[int], unknown: str) -> dict[str, Any]:
    """Returns SentencePiece's BPE in the form of Llama 2's tokenizer.json.

    Texts are not split into words, spaces are U+2581, and unknown characters become bytes.
    """
    prefix = _get(metadata, "add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, spaces]}
        if prefix
        else spaces,
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [*decoders, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [])],
        },
        "model": bpe(_merges_by_score(metadata, names, types), unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _merges_by_score(metadata: Mapping[str, Any], names: list[str], types: list[int]) -> list[list[str]]:
    """Returns every split of a piece into two others, best score first.

    SentencePiece joins the neighbours whose union has the best score.

    Raises:
        JobError: two pieces have the same score. SentencePiece then joins the leftmost, which a list of merges cannot
            express. In practice such scores are placeholders of a conversion that lost them.
    """
    scores = _list(metadata, "scores", (float, int))
    if len(scores) != len(names):
        raise JobError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(names)} tokens; fetch the file again")
    pieces = {
        name: scores[i] for i, name in enumerate(names) if types[i] not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    }
    splits = {name: pairs for name in pieces if (pairs := _pairs(name, pieces))}
    by_score: dict[float, str] = {}
    for name in splits:
        other = by_score.setdefault(pieces[name], name)
        if other != name:
            raise JobError(
                f"tokenizer.ggml.scores gives {other!r} and {name!r} the same score, so the order of merges is not "
                "known; take the original model's files"
            )
    return [pair for name in sorted(splits, key=lambda name: -pieces[name]) for pair in splits[name]]


def _pairs(name: str, pieces: Mapping[str, float]) -> list[list[str]]:
    """Returns every split of a piece into two pieces.

    Raises:
        JobError: the piece is longer than any real one (SentencePiece stops at 16 characters by default). The splits
            take quadratic time.
    """
    if len(name) > _LONGEST:
        raise JobError(
            f"tokenizer.ggml.tokens has a piece of {len(name)} characters, beginning with {name[:20]!r}; fetch the "
            "file again"
        )
    return [[name[:cut], name[cut:]] for cut in range(1, len(name)) if name[:cut] in pieces and name[cut:] in pieces]


def _added_roles(metadata: Mapping[str, Any], kind: str, special: Mapping[str, int]) -> set[str]:
    """Returns the roles, bos or eos, whose tokens are added to every text."""
    bos = kind == "llama" or _PRE[_get(metadata, "pre", "default")] is _LLAMA3
    settings = {"bos": _get(metadata, "add_bos_token", bos), "eos": _get(metadata, "add_eos_token", False)}
    return {role for role, enabled in settings.items() if enabled and role in special}


def template(adds: set[str], names: Mapping[str, str], ids: Mapping[str, int]) -> dict[str, Any] | None:
    """Returns the TemplateProcessing post-processor of tokenizer.json, or None if it adds no token.

    Args:
        adds: the roles ("bos", "eos") whose tokens are added.
        names: texts of the tokens by role.
        ids: ids of the tokens by role.
    """
    if not adds:
        return None

    def one(sequence: str, type_id: int) -> list[dict[str, Any]]:
        marks = {
            role: [{"SpecialToken": {"id": names[role], "type_id": type_id}}] if role in adds else []
            for role in ("bos", "eos")
        }
        return [*marks["bos"], {"Sequence": {"id": sequence, "type_id": type_id}}, *marks["eos"]]

    tokens = {names[role]: {"id": names[role], "ids": [ids[role]], "tokens": [names[role]]} for role in sorted(adds)}
    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": one("A", 0) + one("B", 1),
        "special_tokens": tokens,
    }


def _chat_template(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `chat_template` entry, or {}. Templates other than the default (e.g. for tools) have own keys."""
    key = "tokenizer.chat_template"
    named = {"default": metadata[key]} if key in metadata else {}
    named |= {name.removeprefix(f"{key}."): text for name, text in metadata.items() if name.startswith(f"{key}.")}
    if not named:
        return {}
    only = list(named) == ["default"]
    return {
        "chat_template": named["default"]
        if only
        else [{"name": name, "template": text} for name, text in named.items()]
    }
