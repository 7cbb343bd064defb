"""Text around tokens: the tokenizer beside a model, stop texts, streaming."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.inputs import absent, check_regular
from onnxtools.checkpoints.native import native_call


class Tokenizer:
    """A tokenizer.json, read by Hugging Face's `tokenizers`."""

    def __init__(self, inner: Any, path: Path) -> None:
        self._inner, self.path = inner, path

    @classmethod
    def open(cls, place: Path) -> Tokenizer:
        """Of a folder with tokenizer.json (or vocab.json and merges.txt), or of the file itself.

        Truncation and padding that a training script left in tokenizer.json are switched off, as by transformers.

        Raises:
            JobError: there is none, it cannot be read, or its patterns take unreasonable time.
        """
        import tokenizers

        from onnxtools.checkpoints.special_tokens import add_named, from_merges

        path = place / "tokenizer.json" if place.is_dir() else place
        vocabulary, merges = (path.parent / name for name in ("vocab.json", "merges.txt"))
        with native_call(f"{path}: is no readable tokenizer, fetch the model's own"):
            if path.exists():
                check_regular(path, JobError)
                inner = tokenizers.Tokenizer.from_file(str(path))
                add_named(inner, path.parent)
            elif vocabulary.exists() and merges.exists():
                path = vocabulary
                inner = from_merges(vocabulary, merges)
            else:
                raise JobError(
                    f"{absent(path)}: there is no tokenizer; put the model's tokenizer.json there, or name one with "
                    "--tokenizer"
                )
            inner.no_truncation()
            inner.no_padding()
        _probe(inner, path)
        return cls(inner, path)

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, with the special tokens that this tokenizer puts around a text.

        Raises:
            UsageError: `text` is no valid Unicode.
        """
        return self._encode(text, True)

    def pieces(self, text: str) -> list[int]:
        """Tokens of `text` alone."""
        return self._encode(text, False)

    def _encode(self, text: str, special: bool) -> list[int]:
        with native_call(f"{self.path}: cannot encode {text[:40]!r}, check the tokenizer"):
            return list(self._inner.encode(_valid(text), add_special_tokens=special).ids)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context that is not empty and of what continues it: both are encoded as one text and cut where
        the context's own tokens end; white space at the context's end belongs to the continuation.

        lm-eval's rule (api/model.py, `TemplateLM._encode_pair`). Encoded alone, a continuation gets the word mark that
        SentencePiece puts in front of every text.
        """
        bare = context.rstrip()
        before = self.encode(bare)
        return before, self.encode(context + continuation)[len(before) :]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`; `special` keeps tokens such as the end of text."""
        with native_call(f"{self.path}: cannot decode tokens, check the tokenizer"):
            return str(self._inner.decode(list(ids), skip_special_tokens=not special))

    def continuation(self, before: Sequence[int], new: Sequence[int]) -> str:
        """Text of `new` where it follows `before`: a tokenizer may drop the space in front of a text's first word."""
        tail = self.decode(before[-_TAIL:])
        both = self.decode([*before[-_TAIL:], *new])
        return both[len(tail) :] if both.startswith(tail) else self.decode(new)

    def token(self, id: int) -> str:
        """The vocabulary's spelling of one token."""
        with native_call(f"{self.path}: has no token {id}, use the model's own tokenizer"):
            return str(self._inner.id_to_token(int(id)))

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """Where the text of each token begins in the text of all, in characters."""
        return [len(self.decode(ids[:end], special=True)) for end in range(len(ids))]


_TAIL = 16
"""Tokens of a prompt that decide how its continuation is spelt."""


_RUNS, _PATIENCE = (50, 100, 200, 400, 800, 1600), 0.5
"""Characters of one kind that follow one another in the probes, and seconds of the processor that all may take; real
tokenizers take 0.01.
"""


def _probe(inner: Any, path: Path) -> None:
    """Encode and decode runs of one character, each twice as long as the one before: there a bad pattern takes cubic or
    exponential time, which nothing could interrupt later.

    Raises:
        JobError: it panics, or takes more than `_PATIENCE` seconds.
    """
    start = time.thread_time()
    for length in _RUNS:
        for character in "a1 !é\n":
            with native_call(f"{path}: is no usable tokenizer, fetch the model's own"):
                try:
                    ids = inner.encode(f"{character * length}{'!' if character != '!' else 'a'}").ids
                except Exception:  # a text that this vocabulary cannot spell; panics are no Exception
                    continue
                inner.decode(ids)
            if time.thread_time() - start > _PATIENCE:
                raise JobError(
                    f"{path}: its patterns take too long for {length} times {character!r}; it is damaged or hostile, "
                    "fetch the model's own"
                )


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the text {text[:40]!r} is no valid Unicode ({error.reason}); give it in UTF-8") from None
    return text


class Streams:
    """New text of each row as its tokens come, and the stop texts in it.

    A token may hold half a character, and a text may turn out to be the beginning of a stop text: such an end is held
    back until it is decided, or `flush`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        stop: Sequence[str],
        show: Callable[[int, str], None] | None = None,
    ) -> None:
        self.tokenizer, self.stop, self.show = tokenizer, stop, show
        self._prompts = prompts
        self._ids: list[list[int]] = [[] for _ in prompts]
        self._said = [""] * len(prompts)

    def __call__(self, row: int, token: int) -> bool:
        """Take a token; True where a stop text is complete."""
        self._ids[row].append(token)
        text, found = self._text(row)
        self._say(row, text if found else text[: _undecided(text.rstrip("\ufffd"), self.stop)])
        return found

    def flush(self) -> None:
        """Show what was held back."""
        for row in range(len(self._ids)):
            self._say(row, self._text(row)[0])

    def _text(self, row: int) -> tuple[str, bool]:
        return cut_at(self.tokenizer.continuation(self._prompts[row], self._ids[row]), self.stop)

    def _say(self, row: int, text: str) -> None:
        if len(text) > len(self._said[row]):
            if self.show is not None:
                self.show(row, text[len(self._said[row]) :])
            self._said[row] = text


def _undecided(text: str, stop: Sequence[str]) -> int:
    """Where the longest end of `text` begins that may still become a stop text."""
    return min(
        (
            start
            for s in stop
            for start in range(max(0, len(text) - len(s) + 1), len(text))
            if s.startswith(text[start:])
        ),
        default=len(text),
    )


def cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first stop text, and whether there was one."""
    places = [place for place in (text.find(s) for s in stop if s) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
