"""What the files beside a tokenizer add to it: special tokens, and the whole of it where there are only vocab.json and
merges.txt.

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
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json of a folder say.

    Attributes:
        config: the content of tokenizer_config.json.
        roles: text of the tokens that have one.
        tokens: every added token by its text, as tokenizer.json's `added_tokens` has it; `id` may be missing.
    """

    config: dict[str, Any] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)


def named(folder: Path) -> Named:
    """Of `folder`; empty where no such file is there.

    Raises:
        JobError: a file that is no JSON object, or a token that is neither text nor an object.
    """
    found = Named(_optional(folder / "tokenizer_config.json"))
    label = str(folder / "tokenizer_config.json")
    decoder = found.config.get("added_tokens_decoder")
    says = dict(found.config)
    if decoder is None:
        says |= _optional(folder / "special_tokens_map.json")
    for role in ROLES:
        if says.get(f"{role}_token") is not None:
            found.roles[role] = _add(found, says[f"{role}_token"], label, special=True)
    more = says.get("extra_special_tokens") or says.get("additional_special_tokens") or []
    for token in more.values() if isinstance(more, dict) else more if isinstance(more, list) else []:
        _add(found, token, label, special=True)
    listed = (
        decoder if decoder is not None else {id: text for text, id in _optional(folder / "added_tokens.json").items()}
    )
    if not isinstance(listed, dict):
        raise JobError(f"{label}: added_tokens_decoder is {shown(listed)}, not an object; fetch the file again")
    for id, token in listed.items():
        text = _add(found, token, label, special=False)
        found.tokens[text]["id"] = _id(id, label)
    return found


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _add(found: Named, token: Any, label: str, *, special: bool) -> str:
    """Enter a token given as text, or as an object with its flags; the first that names it decides them, but special it
    stays.
    """
    flags = token if isinstance(token, Mapping) else {"content": token}
    text = flags.get("content")
    if not isinstance(text, str) or not text:
        raise JobError(f"{label}: {shown(token)} is no token; it takes a text, or an object with `content`")
    entry = {key: bool(flags.get(key, False)) for key in ("single_word", "lstrip", "rstrip")}
    special = special or bool(flags.get("special"))
    known = found.tokens.setdefault(
        text, {"content": text, **entry, "normalized": bool(flags.get("normalized", not special)), "special": special}
    )
    if "special" in flags:  # `added_tokens_decoder` knows the flags best
        known |= entry
    return text


def _id(value: Any, label: str) -> int:
    text = str(value) if isinstance(value, (int, str)) else ""
    if not text.isdecimal() or len(text) > 9:
        raise JobError(f"{label}: an added token has the id {shown(value)}; it takes a number of 0 or more")
    return int(text)


def ids_by_name(folder: Path, wanted: Sequence[str]) -> dict[str, int]:
    """Those of `wanted` (`eos_token_id` and the like) whose token the files in `folder` name by its text, as far as
    they say its id too.
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
    """The added tokens of a tokenizer.json."""
    listed = content.get("added_tokens")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return {str(entry.get("content")): entry.get("id") for entry in entries}


def add_named(tokenizer: Any, folder: Path) -> None:
    """Make the special tokens that the files in `folder` name special in `tokenizer` too, as far as its vocabulary has
    them.
    """
    import tokenizers

    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for text, entry in named(folder).tokens.items():
        if text not in known and tokenizer.token_to_id(text) is not None and entry["special"]:
            flags = {key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized")}
            tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, **flags)])


def from_merges(vocabulary: Path, merges: Path) -> Any:
    """The byte-level BPE of vocab.json and merges.txt, with the tokens that the files beside them add.

    Raises:
        JobError: the folder's tokenizer class splits text in a way that is not known here, or a file is damaged.
    """
    import tokenizers

    for path in (vocabulary, merges):
        check_regular(path, JobError)
    says = named(vocabulary.parent)
    kind = says.config.get("tokenizer_class")
    name = kind.removesuffix("Fast") if isinstance(kind, str) else kind
    if name not in (*_GPT2, *_QWEN2):
        raise JobError(
            f"{vocabulary.parent}: vocab.json and merges.txt are of a {shown(kind)}, whose rules they do not hold; "
            "write its tokenizer.json: "
            f"transformers.AutoTokenizer.from_pretrained({str(vocabulary.parent)!r}).save_pretrained(...)"
        )
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
    """Give every added token its id: the vocabulary's, its own, or the next free one; `vocab` gets those that it
    lacks.
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
    """The tokens that every text gets, by `add_bos_token` and `add_eos_token`."""
    adds: set[str] = {
        role for role in ("bos", "eos") if says.config.get(f"add_{role}_token") is True and role in says.roles
    }
    return template(adds, says.roles, {role: says.tokens[text]["id"] for role, text in says.roles.items()})
