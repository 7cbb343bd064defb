"""Special tokens from the files beside a tokenizer, and tokenizers that have only vocab.json and merges.txt.

The rules are those of transformers 5 (tokenization_utils_base.py, `_from_pretrained`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxtools.base.errors import JobError
from onnxtools.base.inputs import check_regular, shown
from onnxtools.checkpoints.checkpoint import nested, read_json
from onnxtools.checkpoints.gguf_tokenizer import ONE_DIGIT, bpe, byte_level, template, words

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_GPT2 = (
    None,
    "GPT2Tokenizer",
    "GPT2BPETokenizer",
    "CodeGenTokenizer",
    "GPTNeoXTokenizer",
    "PreTrainedTokenizer",
    "TokenizersBackend",
)
_QWEN2 = ("Qwen2Tokenizer",)
_DEFAULT = "<|endoftext|>"


@dataclass
class Named:
    """The content of a folder's tokenizer_config.json, special_tokens_map.json and added_tokens.json.

    Attributes:
        config: the content of tokenizer_config.json.
        roles: the text of the token of each role (`ROLES`).
        tokens: every added token by its text, in the form of tokenizer.json's `added_tokens`; `id` may be missing.
    """

    config: dict[str, Any] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)


def named(folder: Path) -> Named:
    """Reads the special tokens of `folder`. The result is empty if the folder has none of the files.

    Raises:
        JobError: a file is no JSON object, or a token is neither a text nor an object.
    """
    listing = Named(_optional(folder / "tokenizer_config.json"))
    label = str(folder / "tokenizer_config.json")
    decoder = listing.config.get("added_tokens_decoder")
    says = dict(listing.config)
    if decoder is None:
        says |= _optional(folder / "special_tokens_map.json")
    for role in ROLES:
        if says.get(f"{role}_token") is not None:
            listing.roles[role] = _add(listing, says[f"{role}_token"], label, special=True)
    more = says.get("extra_special_tokens") or says.get("additional_special_tokens") or []
    for token in more.values() if isinstance(more, dict) else more if isinstance(more, list) else []:
        _add(listing, token, label, special=True)
    by_id = (
        decoder if decoder is not None else {id: text for text, id in _optional(folder / "added_tokens.json").items()}
    )
    if not isinstance(by_id, dict):
        raise JobError(f"{label}: added_tokens_decoder is {shown(by_id)}, not an object; fetch the file again")
    for id, token in by_id.items():
        text = _add(listing, token, label, special=False)
        listing.tokens[text]["id"] = _id(id, label)
    return listing


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _add(listing: Named, token: Any, label: str, *, special: bool) -> str:
    """Add a token to `listing` and return its text.

    The first entry of a token decides its flags. An object with `special` (from `added_tokens_decoder`) overrides
    `single_word`, `lstrip` and `rstrip`. `special` itself is not changed.

    Args:
        token: a text, or an object with `content` and flags.
        special: the token is special whatever its flags say.
    """
    flags = token if isinstance(token, Mapping) else {"content": token}
    text = flags.get("content")
    if not isinstance(text, str) or not text:
        raise JobError(f"{label}: {shown(token)} is no token; it takes a text, or an object with `content`")
    options = {key: bool(flags.get(key, False)) for key in ("single_word", "lstrip", "rstrip")}
    special = special or bool(flags.get("special"))
    entry = listing.tokens.setdefault(
        text, {"content": text, **options, "normalized": bool(flags.get("normalized", not special)), "special": special}
    )
    if "special" in flags:  # the flags of `added_tokens_decoder` take precedence
        entry |= options
    return text


def _id(value: Any, label: str) -> int:
    text = str(value) if isinstance(value, (int, str)) else ""
    if not text.isdecimal() or len(text) > 9:
        raise JobError(f"{label}: an added token has the id {shown(value)}; it takes a number of 0 or more")
    return int(text)


def ids_by_name(folder: Path, wanted: Sequence[str]) -> dict[str, int]:
    """Returns the ids of tokens that the files in `folder` name by their text.

    Args:
        folder: the folder of the tokenizer.
        wanted: keys such as `eos_token_id`. A key without a token or id is left out of the result.

    Raises:
        JobError: as in `named`.
    """
    says = named(folder)
    roles = {key: says.roles[role] for role in ROLES if (key := f"{role}_token_id") in wanted and role in says.roles}
    ids = {text: entry["id"] for text, entry in says.tokens.items() if "id" in entry}
    for name, keys in (("tokenizer.json", ("model", "vocab")), ("vocab.json", ())):
        if set(roles.values()) - ids.keys():
            content = _optional(folder / name)
            vocab = nested(content, *keys)
            ids = {**(vocab if isinstance(vocab, dict) else {}), **_added_ids(content), **ids}
    return {key: ids[text] for key, text in roles.items() if isinstance(ids.get(text), int)}


def _added_ids(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ids of the added tokens of a tokenizer.json, by text."""
    listed = content.get("added_tokens")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return {str(entry.get("content")): entry.get("id") for entry in entries}


def add_named(tokenizer: Any, folder: Path) -> None:
    """Add the special tokens of `folder` to `tokenizer` (a `tokenizers.Tokenizer`), if they are in its vocabulary.

    Raises:
        JobError: as in `named`.
    """
    import tokenizers

    existing = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for text, entry in named(folder).tokens.items():
        if text not in existing and tokenizer.token_to_id(text) is not None and entry["special"]:
            flags = {key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized")}
            tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, **flags)])


def has_merges(folder: Path) -> bool:
    """Whether `folder` has vocab.json and merges.txt of a class whose other rules `from_merges` knows.

    Raises:
        JobError: as in `named`.
    """
    return all((folder / name).exists() for name in ("vocab.json", "merges.txt")) and _class(named(folder)) in (
        *_GPT2,
        *_QWEN2,
    )


def _class(says: Named) -> str | None:
    """The class of the tokenizer, without the ending that says how it is written; "" is no name of a class."""
    kind = says.config.get("tokenizer_class")
    return kind.removesuffix("Fast") if isinstance(kind, str) else None if kind is None else ""


def from_merges(vocabulary: Path, merges: Path) -> Any:
    """Returns the byte-level BPE of vocab.json and merges.txt, a `tokenizers.Tokenizer`, with its added tokens.

    Args:
        vocabulary: the path of vocab.json; its folder has the files with the added tokens (see `has_merges`).
        merges: the path of merges.txt.

    Raises:
        JobError: a file is damaged.
    """
    import tokenizers

    for path in (vocabulary, merges):
        check_regular(path, JobError)
    says = named(vocabulary.parent)
    name = _class(says)
    vocab, pairs = tokenizers.models.BPE.read_file(str(vocabulary), str(merges))
    for role in ("unk", "bos", "eos"):  # these classes' defaults
        if _DEFAULT in vocab and role not in says.roles:
            says.roles[role] = _add(says, _DEFAULT, str(vocabulary), special=True)
    _number(says, vocab)
    prefix = bool(says.config.get("add_prefix_space", False))
    text = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": sorted(says.tokens.values(), key=lambda entry: entry["id"]),
        "normalizer": {"type": "NFC"} if name in _QWEN2 else None,
        "pre_tokenizer": words(ONE_DIGIT, prefix) if name in _QWEN2 else byte_level(True, prefix),
        "post_processor": _around(says), "decoder": byte_level(True),
        "model": {**bpe([list(pair) for pair in pairs]), "vocab": vocab},
    }  # fmt: skip
    return tokenizers.Tokenizer.from_str(json.dumps(text))


def _number(says: Named, vocab: dict[str, int]) -> None:
    """Give every added token an id, and add missing tokens to `vocab`.

    The id is the one in `vocab`, else the one in the token's entry, else the next free one.
    """
    for text, entry in says.tokens.items():
        if text in vocab:
            entry["id"] = vocab[text]
        elif "id" in entry:
            vocab[text] = entry["id"]
    free = max(vocab.values(), default=-1) + 1
    for text, entry in says.tokens.items():
        if "id" not in entry:
            entry["id"] = vocab[text] = free
            free += 1


def _around(says: Named) -> dict[str, Any] | None:
    """Returns the post-processor for the tokens around every text, by `add_bos_token` and `add_eos_token`."""
    adds: set[str] = {
        role for role in ("bos", "eos") if says.config.get(f"add_{role}_token") is True and role in says.roles
    }
    return template(adds, says.roles, {role: says.tokens[text]["id"] for role, text in says.roles.items()})
