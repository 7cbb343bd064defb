"""Sorts the inputs and outputs of a graph or engine: tokens, mask, positions, cache. The runtimes share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxtools.analysis.cache import CacheKind, is_past, present_of, token_axis
from onnxtools.base.errors import JobError

Dim = int | str | None


@dataclass(frozen=True)
class Port:
    """An input or output. A dimension other than an int is dynamic. `dtype` is ONNX's name in lower case (float16)."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class CachePort:
    """A cache tensor: its input, its output, and the axis of tokens."""

    past: Port
    present: Port
    axis: int

    def shape(self, rows: int, length: int) -> list[int]:
        """Returns the sizes for `rows` sequences of `length` tokens. Fixed dimensions stay."""
        sizes = []
        for axis, dim in enumerate(self.past.shape):
            if axis == self.axis:
                sizes.append(dim if isinstance(dim, int) else length)
            else:
                sizes.append(dim if isinstance(dim, int) else rows)
        return sizes


@dataclass(frozen=True)
class DecoderIO:
    """A decoder's ports by their use.

    Attributes:
        ids: token ids.
        mask: attention mask [batch, length], if any.
        positions: position ids, if any.
        write_indices: slots to write in a static cache, if any.
        caches: the cache tensors.
        logits: logits [batch, sequence, vocabulary].
        kind: how the cache grows.
        logits_all: whether logits of every token are returned, not only of the last one.
    """

    ids: Port
    mask: Port | None
    positions: Port | None
    write_indices: Port | None
    caches: tuple[CachePort, ...]
    logits: Port
    kind: CacheKind
    logits_all: bool

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary; 2^31 if the graph does not fix them."""
        return size if isinstance(size := self.logits.shape[-1], int) else 1 << 31

    @property
    def batch_limit(self) -> int | None:
        """The fixed batch size of the graph, or None."""
        rows = self.ids.shape[0]
        return rows if isinstance(rows, int) and rows > 0 else None

    @property
    def cache_length(self) -> int | None:
        """Slots of a static cache, or None."""
        lengths = {c.past.shape[c.axis] for c in self.caches}
        length = lengths.pop() if len(lengths) == 1 else None
        return length if isinstance(length, int) and length > 0 else None


def decoder_io(path: Path, inputs: Sequence[Port], outputs: Sequence[Port], *, gqa: bool = False) -> DecoderIO:
    """Sort the ports of a decoder.

    Args:
        path: the graph or engine, for errors.
        inputs: all inputs.
        outputs: all outputs.
        gqa: the graph holds com.microsoft.GroupQueryAttention.

    Raises:
        JobError: an input cannot be fed, the cache has an unknown form, or there are no logits.
    """
    remaining = {port.name: port for port in inputs}
    if len(remaining) < len(inputs):
        raise JobError(f"{path}: two of its inputs have one name; export or build the model again")
    pasts = [port for port in inputs if is_past(port.name)]
    tokens = {
        name: remaining.pop(name, None) for name in ("input_ids", "attention_mask", "position_ids", "write_indices")
    }
    for past in pasts:
        del remaining[past.name]
    ids = tokens["input_ids"]
    if ids is None or remaining:
        odd = next(iter(remaining), None)
        raise JobError(
            f"{path}: {f'input {odd!r} cannot be fed' if odd else 'has no input input_ids'}; a model to run takes "
            "input_ids, and attention_mask,"
            " position_ids, write_indices and past_key_values.* at most"
        )
    mask = tokens["attention_mask"]
    if mask is not None and (len(mask.shape) != 2 or "int" not in mask.dtype):
        raise JobError(
            f"{path}: attention_mask is {mask.dtype} of {len(mask.shape)} dimensions; only a mask of tokens, int64 "
            "[batch, length], can be fed"
        )
    by_name = {port.name: port for port in outputs}
    caches = tuple(CachePort(past, _present(path, past, by_name), _axis(path, past)) for past in pasts)
    presents = {c.present.name for c in caches}
    logits = by_name.get("logits") or next((port for port in outputs if port.name not in presents), None)
    if logits is None or len(logits.shape) != 3:
        raise JobError(
            f"{path}: has no output logits [batch, sequence, vocabulary]; name the output so, or export the model again"
        )
    static = any(isinstance(c.past.shape[c.axis], int) and c.past.shape[c.axis] != -1 for c in caches)
    kind: CacheKind = (
        "gqa"
        if gqa and caches
        else "scatter"
        if tokens["write_indices"] is not None or static
        else "concat"
        if caches
        else "none"
    )
    if kind == "scatter" and tokens["write_indices"] is None:
        raise JobError(
            f"{path}: its cache has a fixed length and there is no input write_indices; export with --kv-cache scatter "
            "or concat"
        )
    return DecoderIO(
        ids, mask, tokens["position_ids"], tokens["write_indices"], caches, logits, kind, logits.shape[1] != 1
    )


def _present(path: Path, past: Port, outputs: dict[str, Port]) -> Port:
    match = present_of(past.name, outputs)
    if match is None:
        raise JobError(
            f"{path}: input {past.name!r} has no output that carries it on (present...); add the cache again with "
            "add-kv-cache"
        )
    name, is_new = match
    if is_new:
        raise JobError(
            f"{path}: returns the new keys and values alone (--policy new); run add-kv-cache with --policy concat"
        )
    return outputs[name]


def _axis(path: Path, past: Port) -> int:
    if len(past.shape) != 4:
        raise JobError(
            f"{path}: cache {past.name!r} has {len(past.shape)} dimensions; [batch, heads, tokens, channels] is wanted"
        )
    return token_axis(past.shape)
