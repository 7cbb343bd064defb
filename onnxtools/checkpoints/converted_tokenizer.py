"""Tokenizers that have no tokenizer.json (SentencePiece, tiktoken, WordPiece): transformers converts them.

Code that lies in a checkpoint's folder is never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxtools.base.errors import JobError
from onnxtools.checkpoints.checkpoint import Checkpoint
from onnxtools.checkpoints.native import native_call
from onnxtools.checkpoints.special_tokens import has_merges

_SOURCES = ("*.model", "*.tiktoken", "vocab.txt", "vocab.json", "tekken.json")


def source_of(folder: Path) -> Path | None:
    """Returns a file in `folder` that transformers may convert, or None."""
    return next((path for pattern in _SOURCES for path in sorted(folder.glob(pattern)) if path.is_file()), None)


def converted(source: Path) -> Any:
    """Returns the tokenizer of a file as transformers converts it, a `tokenizers.Tokenizer`.

    Args:
        source: the tokenizer's file (see `source_of`); tokenizer_config.json or config.json is beside it.

    Raises:
        JobError: transformers or a package that it needs is not installed, or it cannot convert the tokenizer.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise JobError(
            f"{source}: transformers makes a tokenizer.json of it: pip install transformers sentencepiece "
            "tiktoken protobuf"
        ) from None
    with native_call(f"{source}: transformers cannot make a tokenizer.json of it; fetch the model's own"):
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), local_files_only=True, trust_remote_code=False)
        inner = getattr(tokenizer, "backend_tokenizer", None)
        if inner is None:
            raise JobError(
                f"{source}: {type(tokenizer).__name__} of transformers has no form as tokenizer.json; name "
                "another tokenizer with --tokenizer"
            )
        return inner


def add_tokenizer(checkpoint: Checkpoint) -> None:
    """Give a folder's checkpoint without tokenizer.json the one that transformers makes, and a note that says so."""
    folder = checkpoint.path
    source = source_of(folder) if folder.is_dir() and (folder / "config.json").is_file() else None
    if source is None or "tokenizer.json" in checkpoint.files:
        return
    try:
        if has_merges(folder):  # what `Tokenizer.open` reads itself
            return
        checkpoint.files["tokenizer.json"] = converted(source).to_str().encode()
    except JobError as error:
        checkpoint.notes.append(f"warning: no tokenizer.json was written: {error}")
    else:
        checkpoint.notes.append(f"tokenizer.json was made by transformers from {source.name}")
