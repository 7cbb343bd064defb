"""Calibration data: texts as the graph's inputs, one text at a time and therefore without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.analysis.cache import may_be_past, positions
from onnxtools.analysis.facts import is_ids_like, token_input
from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.jsonl import read_jsonl
from onnxtools.calibration.calibration_options import Calibrated
from onnxtools.check.feeds import Feeds, random_feeds, read_feeds, vocabulary
from onnxtools.check.validate import empty_cache
from onnxtools.checkpoints.tokenizer import Tokenizer
from onnxtools.ir.model import Model


class Samples(Sequence[Feeds]):
    """Feeds of the graph, one for each text. An item is computed when it is read.

    Args:
        model: the graph that the feeds are for.
        texts: token ids of each text.
        feeds: arrays by input name; used if there are no `texts`.

    Attributes:
        digest: SHA-256 of the data in hexadecimal, for the calibration cache.
    """

    def __init__(self, model: Model, texts: Sequence[Sequence[int]], feeds: Sequence[Feeds] = ()) -> None:
        self._model, self._texts, self._feeds = model, texts, feeds
        arrays = [np.asarray(text, np.int64) for text in texts] or [
            feed[name] for feed in feeds for name in sorted(feed)
        ]
        self.digest = hashlib.sha256(
            b"".join(np.ascontiguousarray(array).tobytes() + b"|" for array in arrays)
        ).hexdigest()

    def __len__(self) -> int:
        return len(self._texts) or len(self._feeds)

    def __getitem__(self, index: Any) -> Any:
        return _text_feeds(self._model, self._texts[index]) if self._texts else self._feeds[index]


def read_samples(model: Model, options: Calibrated) -> Samples:
    """Reads the calibration data that `options` name.

    Texts are cut to `calib_length` tokens, and to the number of positions of the model. Texts of one token are left
    out.

    Raises:
        UsageError: `options` name no data or no tokenizer, a line has neither text nor tokens in `calib_field`, or no
            text has two tokens.
        JobError: the file cannot be read, the graph has no input of token ids, a token is outside the vocabulary, or an
            array does not fit the graph's input.
    """
    if options.calib is None:
        raise UsageError(
            f"{options.name}: needs calibration data; name texts with --calib FILE (.jsonl, .txt), or the graph's "
            "inputs (.npz)"
        )
    path = Path(options.calib)
    if path.suffix == ".npz":
        return Samples(model, [], _arrays(path, model))
    tokens = token_input(model)
    if tokens is None:
        raise JobError(
            f"{model.path}: has no input of token ids, so texts are of no use; give its inputs with --calib inputs.npz"
        )
    texts = _texts(path, options, model)
    length = min(options.calib_length, positions(model) or options.calib_length)
    texts = [text[:length] for text in texts if len(text) > 1]
    if not texts:
        raise UsageError(f"{path}: holds no text of two tokens or more; name another file or another --calib-field")
    size = vocabulary(tokens.value)
    if size is None:
        model.notes.append(
            f"warning: no table that {tokens.value.name!r} looks up was found, so the vocabulary is unknown and token "
            "ids are not checked"
        )
    else:
        _check_range(path, texts, size)
    return Samples(model, texts)


def _arrays(path: Path, model: Model) -> list[Feeds]:
    """Returns the feeds in an .npz file; a cache that it leaves out starts empty.

    A graph of a fixed batch takes arrays of several batches, one after the other along axis 0.
    """
    feeds = read_feeds(path)
    named = [value for value in model.graph.inputs if value.name in feeds]
    lonely = next((v.name for v in model.graph.inputs if v.name not in feeds and not may_be_past(v.name)), None)
    if lonely is not None:
        raise JobError(f"{path}: has no {lonely!r}, an input of the graph; write one array for each input")
    parts = {value.name or "": _batches(value, feeds[value.name or ""]) for value in named}
    several = {name: count for name, count in parts.items() if count > 1}
    if len(set(several.values())) > 1:
        told = ", ".join(f"{count} of {name!r}" for name, count in several.items())
        raise JobError(f"{path}: holds several batches, but not the same number for each input: {told}")
    count = max(several.values(), default=1)
    pieces = [
        {name: np.split(array, count)[i] if name in several else array for name, array in feeds.items()}
        for i in range(count)
    ]
    for value in named:
        _check_array(path, value, pieces[0][value.name or ""])
    return [_with_caches(model, piece) for piece in pieces]


def _batches(value: ir.Value, array: np.ndarray[Any, Any]) -> int:
    """Returns how many batches of the graph's fixed size `array` holds along axis 0; 1 if it is not so."""
    fixed = value.shape[0] if value.shape else None
    if not isinstance(fixed, int) or fixed <= 0 or not array.ndim or not len(array) or len(array) % fixed:
        return 1
    return len(array) // fixed


def _with_caches(model: Model, feeds: Feeds) -> Feeds:
    """Returns `feeds` in the graph's order, with empty caches in place of those that are left out."""
    tokens = token_input(model)
    ids = feeds.get(tokens.value.name or "") if tokens is not None else None
    rows = ids.shape[tokens.batch_axis] if ids is not None and tokens is not None else 1
    complete = {**empty_cache(model, rows), **feeds}
    missing = next((value.name for value in model.graph.inputs if value.name not in complete), None)
    if missing is not None:
        raise JobError(f"{model.path}: the calibration data has no {missing!r}; write one array for each input")
    return {value.name or "": complete[value.name or ""] for value in model.graph.inputs}


def _texts(path: Path, options: Calibrated, model: Model) -> list[list[int]]:
    """Returns the token ids of up to `calib_size` texts."""
    if path.suffix == ".jsonl":
        texts = [_field(path, number, row, options.calib_field) for number, row in read_jsonl(path, options.calib_size)]
        tokenizer = _tokenizer(options, model) if any(isinstance(text, str) for text in texts) else None
        return [_encoded(text, tokenizer) for text in texts]
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read as UTF-8 text ({error}); name a .jsonl, .txt or .npz file") from None
    limit = options.calib_size * options.calib_length
    # The average token is hardly ever longer than 16 characters.
    ids = _tokenizer(options, model).encode(content[: 16 * limit])[:limit]
    return [ids[start : start + options.calib_length] for start in range(0, len(ids), options.calib_length)]


def _encoded(text: str | list[int], tokenizer: Tokenizer | None) -> list[int]:
    """Returns the token ids of a text. A list has token ids already, and needs no tokenizer."""
    if isinstance(text, list):
        return text
    return tokenizer.encode(text) if tokenizer is not None else []


def _tokenizer(options: Calibrated, model: Model) -> Tokenizer:
    if options.tokenizer is None and model.path is None:
        raise UsageError(f"{options.name}: name the model's tokenizer with --tokenizer")
    return Tokenizer.open(Path(options.tokenizer) if options.tokenizer is not None else model.path.parent)  # type: ignore[union-attr]


def _field(path: Path, number: int, row: dict[str, Any], name: str) -> str | list[int]:
    value = row.get(name)
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(id) is int for id in value)):
        return value
    if value is not None:
        raise UsageError(
            f"{path}:{number}: {name!r} is neither text nor a list of tokens: {str(value)[:40]}; mend the line"
        )
    fields = ", ".join(map(str, row)) or "no fields"
    raise UsageError(
        f"{path}:{number}: has no text or tokens in {name!r} (it has {fields}); name the field with --calib-field"
    )


def _check_array(path: Path, value: ir.Value, array: np.ndarray[Any, Any]) -> None:
    """Checks that `array` has the type, rank and fixed sizes of the input `value`, is not empty and is finite.

    The input of a cache may be empty.
    """
    dims = value.shape
    expected = f"{value.dtype} [{', '.join(map(str, dims))}]" if dims is not None else str(value.dtype)
    same = value.dtype is None or array.dtype == (
        np.float32 if value.dtype == ir.DataType.BFLOAT16 else value.dtype.numpy()
    )
    if dims is not None:
        same &= array.ndim == len(dims) and all(
            not isinstance(d, int) or d == size for d, size in zip(dims, array.shape, strict=False)
        )
    if not same:
        raise JobError(
            f"{path}: {value.name!r} is {array.dtype} {list(array.shape)}, but the graph's input is {expected}; write "
            "it so"
        )
    if not array.size and not may_be_past(value.name):
        raise JobError(f"{path}: {value.name!r} is empty; write one text or more")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise JobError(f"{path}: {value.name!r} holds infinite or NaN numbers; calibrate with real data")


def _check_range(path: Path, texts: Sequence[Sequence[int]], size: int) -> None:
    """Checks that all token ids are in a vocabulary of `size`."""
    for number, text in enumerate(texts, 1):
        worst = max(text) if max(text) >= size else min(text)
        if not 0 <= worst < size:
            raise JobError(
                f"{path}: text {number} holds token {worst}, but the vocabulary has {size}; calibrate with the model's "
                "own tokenizer"
            )


def _text_feeds(model: Model, ids: Sequence[int]) -> Feeds:
    """Returns the feeds of one row of `ids`: positions from 0, nothing masked, and an empty cache."""
    feeds = random_feeds(model, batch=1, sequence=len(ids))
    tokens = token_input(model)
    assert tokens is not None
    for value in model.graph.inputs:
        name = value.name or ""
        if value is tokens.value:
            feeds[name] = np.asarray(ids, feeds[name].dtype).reshape(feeds[name].shape)
        elif value.dtype is not None and not value.dtype.is_floating_point() and not is_ids_like(value):
            feeds[name] = np.zeros_like(feeds[name])  # the write index of a static cache
    return {**feeds, **empty_cache(model, batch=1)}
