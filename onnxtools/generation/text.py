"""Text around tokens: the tokenizer beside a model, stop texts, streaming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onnxtools.errors import JobError


class Tokenizer:
    """A tokenizer.json, read by Hugging Face's `tokenizers`."""

    def __init__(self, inner: Any, path: Path) -> None:
        self._inner, self.path = inner, path

    @classmethod
    def open(cls, place: Path) -> Tokenizer:
        """Of a folder with tokenizer.json (or vocab.json and merges.txt), or of the file itself.

        Raises:
            JobError: there is none, or it cannot be read.
        """
        import tokenizers

        path = place / "tokenizer.json" if place.is_dir() else place
        try:
            if path.is_file():
                return cls(tokenizers.Tokenizer.from_file(str(path)), path)
            vocabulary, merges = (path.parent / name for name in ("vocab.json", "merges.txt"))
            if vocabulary.is_file() and merges.is_file():
                return cls(tokenizers.ByteLevelBPETokenizer.from_file(str(vocabulary), str(merges)), vocabulary)
        except Exception as error:  # the library raises Exception itself
            raise JobError(f"{path}: is no readable tokenizer ({' '.join(str(error).split())[:120]}); fetch the model's own") from None
        raise JobError(f"{path}: there is no tokenizer; put the model's tokenizer.json there, or name one with --tokenizer")

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, with the special tokens that this tokenizer puts around a text."""
        return list(self._inner.encode(text).ids)

    def pieces(self, text: str) -> list[int]:
        """Tokens of `text` alone."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`; `special` keeps tokens such as the end of text."""
        return str(self._inner.decode(list(ids), skip_special_tokens=not special))

    def token(self, id: int) -> str:
        """The vocabulary's spelling of one token."""
        return str(self._inner.id_to_token(int(id)))

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """Where the text of each token begins in the text of all, in characters."""
        return [len(self.decode(ids[:end], special=True)) for end in range(len(ids))]


class Streams:
    """New text of each row as its tokens come, and the stop texts in it.

    A token may hold half a character, so text is handed out only when it is whole.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int, stop: Sequence[str], show: Callable[[int, str], None] | None = None) -> None:
        self.tokenizer, self.stop, self.show = tokenizer, stop, show
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._said = [""] * rows

    def __call__(self, row: int, token: int) -> bool:
        """Take a token; True where a stop text is complete."""
        self._ids[row].append(token)
        text = self.tokenizer.decode(self._ids[row])
        if text.endswith("\ufffd"):
            return False
        cut, found = cut_at(text, self.stop)
        if self.show is not None and len(cut) > len(self._said[row]):
            self.show(row, cut[len(self._said[row]) :])
        self._said[row] = cut
        return found


def cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first stop text, and whether there was one."""
    places = [place for place in (text.find(s) for s in stop if s) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
