"""How ONNX Runtime's caches are kept from step to step, by their form.

concat: the outputs of a step are the inputs of the next, bound as they are; prompts are padded on the left.
scatter, gqa: one buffer a cache is input and output at once, bound once; prompts are padded on the right. On CUDA the
step is captured as a CUDA graph, and two of them feed each other; a prompt's run is captured when its length comes
twice in a row.
none: the whole text is run again for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxtools.analysis.decoder_io import CachePort
from onnxtools.base.errors import JobError
from onnxtools.engines.runtimes.onnxrt.device_ops import DeviceOps
from onnxtools.engines.runtimes.onnxrt.next_token import AHEAD, NEXT, PAST_TOKENS
from onnxtools.engines.runtimes.onnxrt.ort_model import DeviceLogits, OrtModel
from onnxtools.generation.runtime import HostLogits, Ids, Logits, PickedLogits, Prompts, padded, positions_of

MAX_GRAPHS = 256
"""CUDA graphs captured per session.

ONNX Runtime never frees one (about 1 MB of host memory for 24 layers); later runs are not captured.
"""


class _Input:
    """A small input that is written anew for each step: on the CPU in place, on a device by a copy."""

    def __init__(self, ops: DeviceOps, array: Ids) -> None:
        self.array = array
        self.value = ops.value(array)
        self._copy = ops.device != "cpu"

    def push(self) -> None:
        if self._copy:
            self.value.update_inplace(self.array)


class Growing:
    """concat: present becomes past; prompts are padded on the left."""

    def __init__(self, model: OrtModel, slots: int, length: int) -> None:
        self.r, self.slots = model, slots
        self.mask: Ids = np.zeros((slots, 0), np.int64)
        self.next: Ids = np.zeros((slots, 1), np.int64)
        self.caches = self._empty(slots, 0)

    def _empty(self, rows: int, length: int) -> list[Any]:
        return [self.r.ops.zeros(c.shape(rows, length), c.past.dtype) for c in self.r.io.caches]

    def admit(self, slots: Sequence[int], prompts: Prompts) -> Logits:
        ids, mask = padded(prompts, self.r.info.pad_token_id, "left")
        positions = positions_of(mask)
        logits, caches = self._run(ids, mask, positions, self._empty(len(slots), 0))
        if is_all(slots, self.slots):
            self.mask, self.next, self.caches = mask, positions[:, -1:] + 1, caches
        else:
            self._join(slots, mask, caches)
            self.next[list(slots)] = positions[:, -1:] + 1
        return logits

    def _join(self, slots: Sequence[int], mask: Ids, caches: list[Any]) -> None:
        """Rows that have run alone take their slots; the shorter side gets hidden tokens on the left."""
        ops, total = self.r.ops, max(self.mask.shape[1], mask.shape[1])
        order = taking(slots, self.slots)
        missing = [total - self.mask.shape[1], total - mask.shape[1]]
        pads = [
            self._empty(rows, count) if count else None
            for rows, count in zip((self.slots, len(slots)), missing, strict=True)
        ]
        for index, c in enumerate(self.r.io.caches):
            sides = [
                (pad[index], part) if pad else (part,)
                for pad, part in zip(pads, (self.caches[index], caches[index]), strict=True)
            ]
            wide = [ops.joined(side, c.axis) if len(side) > 1 else side[0] for side in sides]
            self.caches[index] = ops.picked(ops.joined(wide, batch_axis(c)), order, batch_axis(c))
        wider = [np.pad(rows, ((0, 0), (count, 0))) for rows, count in zip((self.mask, mask), missing, strict=True)]
        self.mask = np.concatenate(wider)[order]

    def step(self, ids: Ids, slots: Sequence[int] | None) -> Logits:
        """Slots that take no step get a token that stays hidden."""
        rows = list(range(self.slots) if slots is None else slots)
        given, new = np.full(self.slots, self.r.info.pad_token_id, np.int64), np.zeros((self.slots, 1), np.int64)
        given[rows], new[rows] = ids, 1
        self.mask = np.concatenate([self.mask, new], axis=1)
        logits, self.caches = self._run(given[:, None], self.mask, self.next, self.caches)
        self.next = self.next + new
        return logits if slots is None else PickedLogits(logits, rows)

    def _run(self, ids: Ids, mask: Ids, positions: Ids, caches: list[Any]) -> tuple[Logits, list[Any]]:
        r = self.r
        binding = r.bound(r.ops.values(r.feeds(ids, mask, positions)))
        for cache, value in zip(r.io.caches, caches, strict=True):
            binding.bind_ortvalue_input(cache.past.name, value)
            binding.bind_output(cache.present.name, r.ops.device, 0)
        r.run(binding)
        outputs = binding.get_outputs()
        return r.last(outputs, np.full(len(ids), -1)), outputs[-len(caches) :]

    def release(self, slot: int) -> None:
        self.mask[slot] = 0

    def reorder(self, rows: Ids) -> None:
        self.mask, self.next = self.mask[rows], self.next[rows]
        self.caches = [
            self.r.ops.picked(cache, rows, batch_axis(c))
            for c, cache in zip(self.r.io.caches, self.caches, strict=True)
        ]


class Static:
    """scatter, gqa: buffers that are input and output at once; everything of a step is bound once."""

    def __init__(self, model: OrtModel, rows: int, length: int) -> None:
        r = self.r = model
        self.rows = rows
        self.slots = r.io.cache_length or length
        if length > self.slots:
            raise JobError(
                f"{r.path}: its cache has {self.slots} slots and {length} tokens are wanted; export with a larger "
                "--cache-length"
            )
        self.buffers = [r.ops.zeros(c.shape(rows, self.slots), c.past.dtype) for c in r.io.caches]
        self.ids, self.positions = (
            _Input(r.ops, np.zeros((rows, 1), np.int64)),
            _Input(r.ops, np.zeros((rows, 1), np.int64)),
        )
        self.mask, self.write = (
            _Input(r.ops, np.zeros((rows, self.slots), np.int64)),
            _Input(r.ops, np.zeros(rows, np.int64)),
        )
        self.reset()
        self._bind()

    def reset(self) -> None:
        """Forget every sequence; the buffers, and the graphs captured with them, stay."""
        self.lengths = np.zeros(self.rows, np.int64)
        self.mask.array[:] = 0

    def fits(self, rows: int, length: int) -> bool:
        return rows == self.rows and (
            length == self.slots or (self.r.io.cache_length is not None and length <= self.slots)
        )

    def _bind(self) -> None:
        """The step's bindings: fixed inputs, buffers and logits, so that a captured graph finds them where they were.

        One binding reads what the host has written. Where steps can run ahead, two bindings ping-pong: each writes the
        inputs that the other reads, so steps can be queued without the host.
        """
        r, io = self.r, self.r.io
        pairs = (
            (io.ids, self.ids),
            (io.mask, self.mask),
            (io.positions, self.positions),
            (io.write_indices, self.write),
        )
        self.inputs = [(port.name, given) for port, given in pairs if port is not None]
        count = 2 if r.looks_ahead else 1
        places = [
            {name: given.value if at == 0 else r.ops.value(given.array.copy()) for name, given in self.inputs}
            for at in range(count)
        ]
        self.tokens = [r.ops.value(np.zeros((self.rows, self.slots), np.int64)) for _ in places]
        self._prompt: tuple[int, dict[str, Any], _Side] | None = None
        self.sides = []
        for place, other, past, tokens in zip(places, places[::-1], self.tokens, self.tokens[::-1], strict=True):
            outputs = {f"{AHEAD}.{name}": value for name, value in other.items() if name != io.ids.name} | {
                NEXT: other[io.ids.name],
                f"{AHEAD}.tokens": tokens,
            }
            self.sides.append(
                _Side(self, place | ({PAST_TOKENS: past} if r.takes_tokens else {}), outputs if count > 1 else {})
            )

    def admit(self, slots: Sequence[int], prompts: Prompts) -> Logits:
        r = self.r
        ids, mask = padded(prompts, r.info.pad_token_id, "right")
        wide = np.zeros((len(slots), self.slots), np.int64)
        wide[:, : mask.shape[1]] = mask
        # gqa takes a mask as long as the text, scatter one as long as the buffer.
        feeds = r.feeds(
            ids, wide if r.io.kind == "scatter" else mask, positions_of(mask), np.zeros(len(slots), np.int64)
        )
        if is_all(slots, self.rows):
            self.lengths, self.mask.array[:] = mask.sum(axis=1), wide
            for side in self.sides:  # what comes is a sequence of steps, until the rows are reordered
                side.capture()
            return r.last(self._prompt_side(feeds, ids.shape[1]).run(), self.lengths - 1)
        buffers = [r.ops.zeros(c.shape(len(slots), self.slots), c.past.dtype) for c in r.io.caches]
        binding = r.bound(r.ops.values(feeds))
        bind_buffers(r, binding, buffers)
        r.run(binding)
        order = taking(slots, self.rows)
        for index, c in enumerate(r.io.caches):
            both = r.ops.joined([self.buffers[index], buffers[index]], batch_axis(c))
            self.buffers[index] = r.ops.picked(both, order, batch_axis(c))
        lengths = mask.sum(axis=1)
        self.lengths[list(slots)], self.mask.array[list(slots)] = lengths, wide
        self._bind()
        return r.last(binding.get_outputs(), lengths - 1)

    def _prompt_side(self, feeds: dict[str, Ids], length: int) -> _Side:
        """With `feeds` as its inputs.

        Where its logits are small it is kept, and captured if the next prompts are of that length too.
        """
        if self._prompt is not None and self._prompt[0] == length:
            _, values, side = self._prompt
            for name, value in values.items():
                value.update_inplace(feeds[name])
            side.capture()
            return side
        values = self.r.ops.values(feeds)
        side = _Side(self, values, {})
        self._prompt = None if self.r.io.logits_all else (length, values, side)
        return side

    def step(self, ids: Ids, slots: Sequence[int] | None) -> Logits:
        if slots is not None:
            return self._step_some(ids, slots)
        self._push(ids)
        outputs = self.sides[0].run()
        self.lengths = self.lengths + 1
        return self._logits(outputs)

    def _logits(self, outputs: list[Any]) -> Logits:
        if self.r.ops.device == "cuda":
            return DeviceLogits(*outputs[:2])
        return HostLogits(outputs[0].numpy()[:, -1].astype(np.float32, copy=False))

    def _step_some(self, ids: Ids, slots: Sequence[int]) -> Logits:
        """The others write a token behind their text, which their next step overwrites, and stay as long as they
        were.
        """
        rows, lengths = list(slots), self.lengths
        given = np.full(self.rows, self.r.info.pad_token_id, np.int64)
        given[rows] = ids
        self.lengths = np.minimum(lengths, self.slots - 1)  # a row may be full
        self._push(given)
        outputs = self.sides[0].run()
        self.lengths = lengths.copy()
        self.lengths[rows] += 1
        return PickedLogits(self._logits(outputs), rows)

    def ahead(self, ids: Ids, count: int) -> Ids:
        self._push(ids)
        for step in range(count):
            self.sides[step % 2].run(wait=step == count - 1)
        places = self.lengths[:, None] + np.arange(count)
        every = np.arange(self.rows)[:, None]
        self.mask.array[every, places] = 1
        self.lengths = self.lengths + count
        return self.tokens[count % 2].numpy()[every, places + 1]  # type: ignore[no-any-return]

    def _push(self, ids: Ids) -> None:
        """The inputs of a step."""
        self.ids.array[:, 0] = ids
        self.positions.array[:, 0] = self.write.array[:] = self.lengths
        self.mask.array[np.arange(self.rows), self.lengths] = 1
        for _, given in self.inputs:
            given.push()

    def release(self, slot: int) -> None:
        self.lengths[slot], self.mask.array[slot] = 0, 0

    def reorder(self, rows: Ids) -> None:
        self.buffers = [
            self.r.ops.picked(buffer, rows, batch_axis(c))
            for c, buffer in zip(self.r.io.caches, self.buffers, strict=True)
        ]
        self.lengths, self.mask.array[:] = self.lengths[rows], self.mask.array[rows]
        self._bind()  # without a graph: a beam search binds anew for each step, and to capture takes two


class _Side:
    """Inputs, caches and outputs at fixed places, so that a run can be captured as a CUDA graph."""

    def __init__(self, state: Static, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        r = self._runtime = state.r
        self._binding = r.bound(inputs)
        bind_buffers(r, self._binding, state.buffers)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options: list[Any] = [None, None]
        self._results: list[Any] | None = None

    def capture(self) -> None:
        """From its next run on, where graphs can be captured."""
        r = self._runtime
        if r.captures and self._options[0] is None and r.graphs < MAX_GRAPHS:
            r.graphs += 1
            self._options = [_graph_options(r.graphs, wait) for wait in (False, True)]

    def run(self, *, wait: bool = True) -> list[Any]:
        """The logits, and the next token on CUDA.

        With wait=False they are valid only after a later run with wait=True.
        """
        r = self._runtime
        r.run(self._binding, self._options[wait])
        if self._results is None:  # bound from now on where the first run put them
            self._results = self._binding.get_outputs()[: len(r.results)]
            for name, value in zip(r.results, self._results, strict=True):
                self._binding.bind_ortvalue_output(name, value)
        return self._results


class Whole:
    """none: no cache; also how texts are scored, with empty caches."""

    def __init__(self, model: OrtModel, rows: int, length: int) -> None:
        self.r, self.rows = model, rows
        self.texts: list[list[int]] = [[] for _ in range(rows)]

    def admit(self, slots: Sequence[int], prompts: Prompts) -> Logits:
        for slot, prompt in zip(slots, prompts, strict=True):
            self.texts[slot] = list(prompt)
        ids, mask = padded([self.texts[slot] for slot in slots], self.r.info.pad_token_id, "left")
        logits = self.run(ids, mask)
        return HostLogits(logits[:, -1].astype(np.float32, copy=False))

    def step(self, ids: Ids, slots: Sequence[int] | None) -> Logits:
        rows = range(self.rows) if slots is None else slots
        return self.admit(rows, [[*self.texts[row], int(token)] for row, token in zip(rows, ids, strict=True)])

    def release(self, slot: int) -> None:
        self.texts[slot] = []

    def reorder(self, rows: Ids) -> None:
        self.texts = [self.texts[row] for row in rows]

    def run(self, ids: Ids, mask: Ids) -> np.ndarray:
        """All logits, [rows, tokens, vocabulary]."""
        r, io = self.r, self.r.io
        slots = io.cache_length or ids.shape[1]
        given = np.pad(mask, ((0, 0), (0, slots - mask.shape[1]))) if io.kind == "scatter" else mask
        binding = r.session.io_binding()
        for name, value in r.ops.values(r.feeds(ids, given, positions_of(mask), np.zeros(len(ids), np.int64))).items():
            binding.bind_ortvalue_input(name, value)
        for cache in io.caches:
            empty = r.ops.zeros(cache.shape(len(ids), slots if io.kind in ("scatter", "gqa") else 0), cache.past.dtype)
            binding.bind_ortvalue_input(cache.past.name, empty)
            binding.bind_output(cache.present.name, r.ops.device, 0)
        for name in r.results:
            binding.bind_output(name, "cpu", 0)
        r.run(binding)
        return binding.get_outputs()[len(io.caches)].numpy()  # type: ignore[no-any-return]


def _graph_options(graph: int, wait: bool) -> Any:
    """Run options of the graph with that number, which ONNX Runtime captures at the first run with them (it runs twice)
    and replays from then on.
    """
    import onnxruntime as ort

    made = ort.RunOptions()
    made.add_run_config_entry("gpu_graph_id", str(graph))
    if not wait:
        made.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return made


def batch_axis(cache: CachePort) -> int:
    return 0 if cache.axis != 0 else 1


def bind_buffers(model: OrtModel, binding: Any, buffers: list[Any]) -> None:
    """Each buffer is a cache's input and output at once."""
    for cache, buffer in zip(model.io.caches, buffers, strict=True):
        binding.bind_ortvalue_input(cache.past.name, buffer)
        binding.bind_ortvalue_output(cache.present.name, buffer)


def taking(slots: Sequence[int], count: int) -> Ids:
    """Out of `count` old rows and, behind them, a new one for each of `slots`: the rows where the new ones have taken
    their slots.
    """
    order = np.arange(count)
    order[list(slots)] = count + np.arange(len(slots))
    return order


def is_all(slots: Sequence[int], count: int) -> bool:
    return list(slots) == list(range(count))


CacheState = Growing | Static | Whole
