"""Converts text to tokens and back: the tokenizer beside a model, stop texts, streaming."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.inputs import absent, check_regular
from onnxtools.checkpoints.native import native_call


class Tokenizer:
    """A tokenizer of Hugging Face's `tokenizers`.

    Attributes:
        path: its tokenizer.json, or the file that it was made from.
    """

    def __init__(self, inner: Any, path: Path) -> None:
        self._inner, self.path = inner, path

    @classmethod
    def open(cls, place: Path) -> Tokenizer:
        """Opens the tokenizer of a folder.

        Truncation and padding that a training script left in tokenizer.json are switched off, as in transformers.

        Args:
            place: a folder with tokenizer.json, with vocab.json and merges.txt, or with what transformers converts; or
                the tokenizer.json itself.

        Raises:
            JobError: there is no tokenizer, it cannot be read, or its patterns take unreasonable time.
        """
        import tokenizers

        from onnxtools.checkpoints.converted_tokenizer import converted, source_of
        from onnxtools.checkpoints.special_tokens import add_named, from_merges, has_merges

        path = place / "tokenizer.json" if place.is_dir() else place
        with native_call(f"{path}: is no readable tokenizer, fetch the model's own"):
            if path.exists():
                check_regular(path, JobError)
                inner = tokenizers.Tokenizer.from_file(str(path))
                add_named(inner, path.parent)
            elif has_merges(path.parent):
                path = path.with_name("vocab.json")
                inner = from_merges(path, path.with_name("merges.txt"))
            elif place.is_dir() and (source := source_of(place)) is not None:
                path, inner = source, converted(source)
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
        """Returns the token ids of `text`, with the special tokens that this tokenizer adds to a text.

        Raises:
            UsageError: `text` is no valid Unicode.
            JobError: the tokenizer failed.
        """
        return self._encode(text, True)

    def pieces(self, text: str) -> list[int]:
        """Returns the token ids of `text` without special tokens. Raises the errors of `encode`."""
        return self._encode(text, False)

    def _encode(self, text: str, special: bool) -> list[int]:
        with native_call(f"{self.path}: cannot encode {text[:40]!r}, check the tokenizer"):
            return list(self._inner.encode(_valid(text), add_special_tokens=special).ids)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the token ids of a context and of its continuation.

        Both are encoded as one text, which is cut after as many tokens as the context alone has. White space at the end
        of the context belongs to the continuation. This is lm-eval's rule (api/model.py, `TemplateLM._encode_pair`):
        encoded alone, a continuation would get the word mark that SentencePiece puts in front of every text.

        Args:
            context: a text that is not empty.
            continuation: the text after it.

        Raises:
            UsageError, JobError: as in `encode`.
        """
        bare = context.rstrip()
        before = self.encode(bare)
        return before, self.encode(context + continuation)[len(before) :]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Returns the text of `ids`.

        Args:
            ids: token ids.
            special: keep special tokens such as the end of text.

        Raises:
            JobError: the tokenizer failed.
        """
        with native_call(f"{self.path}: cannot decode tokens, check the tokenizer"):
            return str(self._inner.decode(list(ids), skip_special_tokens=not special))

    def continuation(self, before: Sequence[int], new: Sequence[int]) -> str:
        """Returns the text of the tokens `new` after the tokens `before`.

        `new` is not decoded alone, since a tokenizer may drop the space in front of a text's first word.
        """
        tail = self.decode(before[-_TAIL:])
        both = self.decode([*before[-_TAIL:], *new])
        return both[len(tail) :] if both.startswith(tail) else self.decode(new)

    def token(self, id: int) -> str:
        """Returns the vocabulary's spelling of one token.

        Raises:
            JobError: the tokenizer failed.
        """
        with native_call(f"{self.path}: has no token {id}, use the model's own tokenizer"):
            return str(self._inner.id_to_token(int(id)))

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """Returns the start of each token's text in the text of all tokens, in characters."""
        return [len(self.decode(ids[:end], special=True)) for end in range(len(ids))]


_TAIL = 16
"""Last tokens of a prompt that can change the text of its continuation."""


_RUNS, _PATIENCE = (50, 100, 200, 400, 800, 1600), 0.5
"""Lengths of the probes' runs of one character, and seconds of CPU time for all probes; real tokenizers take 0.01."""


def _probe(inner: Any, path: Path) -> None:
    """Encode and decode runs of one character, each twice as long as the previous one.

    A bad pattern takes cubic or exponential time on such runs, and nothing could interrupt it later.

    Raises:
        JobError: the tokenizer panics, or takes more than `_PATIENCE` seconds.
    """
    start = time.thread_time()
    for length in _RUNS:
        for character in "a1 !é\n":
            with native_call(f"{path}: is no usable tokenizer, fetch the model's own"):
                try:
                    ids = inner.encode(f"{character * length}{'!' if character != '!' else 'a'}").ids
                except Exception:  # this vocabulary cannot spell the text; a panic is no Exception
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
    """Streams the new text of each row token by token, and finds stop texts in it.

    A token may be part of a character, and the end of a text may be the beginning of a stop text. Such an end is held
    back until later tokens decide it, or until `flush`.

    Args:
        tokenizer: decodes the tokens.
        prompts: token ids before each row's new tokens.
        stop: stop texts.
        show: called with the row and its new text; None shows nothing.
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
        self._shown = [""] * len(prompts)

    def __call__(self, row: int, token: int) -> bool:
        """Add a token to `row`. Returns True if the row's text now has a complete stop text."""
        self._ids[row].append(token)
        text, stopped = self._text(row)
        self._say(row, text if stopped else text[: _undecided(text.rstrip("\ufffd"), self.stop)])
        return stopped

    def flush(self) -> None:
        """Show the text that was held back."""
        for row in range(len(self._ids)):
            self._say(row, self._text(row)[0])

    def _text(self, row: int) -> tuple[str, bool]:
        return cut_at(self.tokenizer.continuation(self._prompts[row], self._ids[row]), self.stop)

    def _say(self, row: int, text: str) -> None:
        if len(text) > len(self._shown[row]):
            if self.show is not None:
                self.show(row, text[len(self._shown[row]) :])
            self._shown[row] = text


def _undecided(text: str, stop: Sequence[str]) -> int:
    """Returns the start of the longest end of `text` that may become a stop text; len(text) if there is none."""
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
    """Returns `text` up to its first stop text, and whether it has one. Empty stop texts are ignored."""
    places = [place for place in (text.find(s) for s in stop if s) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
