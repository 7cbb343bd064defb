"""How ONNX Runtime's caches are kept from step to step, by kind of cache.

concat: the outputs of a step are bound as the inputs of the next; prompts are padded on the left.
scatter, gqa: one buffer per cache is bound once as input and output; prompts are padded on the right. On CUDA the step
is captured as CUDA graphs, two of which feed each other. The run of a prompt is captured if two prompts in a row have
the same length.
none: the whole text is run again for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxtools.analysis.decoder_io import CachePort
from onnxtools.base.errors import JobError
from onnxtools.base.onnx_runtime import onnxruntime
from onnxtools.engines.runtimes.onnxrt.device_ops import DeviceOps
from onnxtools.engines.runtimes.onnxrt.next_token import AHEAD, NEXT, PAST_TOKENS
from onnxtools.engines.runtimes.onnxrt.ort_model import DeviceLogits, OrtModel
from onnxtools.generation.runtime import HostLogits, Ids, Logits, PickedLogits, Prompts, padded, positions_of

MAX_GRAPHS = 256
"""CUDA graphs captured per session.

ONNX Runtime never frees one (about 1 MB of host memory for 24 layers); later runs are not captured.
"""


class _Input:
    """A small input that is rewritten for each step: on the CPU in place, on a device by a copy."""

    def __init__(self, ops: DeviceOps, array: Ids) -> None:
        self.array = array
        self.value = ops.value(array)
        self._copy = ops.device != "cpu"

    def push(self) -> None:
        if self._copy:
            self.value.update_inplace(self.array)


class Growing:
    """The state of a concat cache: present becomes past; prompts are padded on the left."""

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
        """Put rows that have run alone into their slots; the shorter side gets hidden tokens on the left."""
        ops, total = self.r.ops, max(self.mask.shape[1], mask.shape[1])
        order = taking(slots, self.slots)
        padding = [total - self.mask.shape[1], total - mask.shape[1]]
        pads = [
            self._empty(rows, count) if count else None
            for rows, count in zip((self.slots, len(slots)), padding, strict=True)
        ]
        for index, c in enumerate(self.r.io.caches):
            sides = [
                (pad[index], part) if pad else (part,)
                for pad, part in zip(pads, (self.caches[index], caches[index]), strict=True)
            ]
            wide = [ops.joined(side, c.axis) if len(side) > 1 else side[0] for side in sides]
            self.caches[index] = ops.picked(ops.joined(wide, batch_axis(c)), order, batch_axis(c))
        wider = [np.pad(rows, ((0, 0), (count, 0))) for rows, count in zip((self.mask, mask), padding, strict=True)]
        self.mask = np.concatenate(wider)[order]

    def step(self, ids: Ids, slots: Sequence[int] | None) -> Logits:
        """Append one token to `slots`; the other slots get a token that the mask hides."""
        rows = list(range(self.slots) if slots is None else slots)
        tokens, new = np.full(self.slots, self.r.info.pad_token_id, np.int64), np.zeros((self.slots, 1), np.int64)
        tokens[rows], new[rows] = ids, 1
        self.mask = np.concatenate([self.mask, new], axis=1)
        logits, self.caches = self._run(tokens[:, None], self.mask, self.next, self.caches)
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
    """The state of a scatter or gqa cache: buffers that are input and output; all values of a step are bound once."""

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
        """Whether a session of `rows` sequences of at most `length` tokens can use these buffers."""
        return rows == self.rows and (
            length == self.slots or (self.r.io.cache_length is not None and length <= self.slots)
        )

    def _bind(self) -> None:
        """Bind a step's inputs, buffers and logits to fixed memory, which a captured graph needs.

        One binding reads the inputs that the host has written. If steps can run ahead, two bindings ping-pong: each
        writes the inputs that the other reads, so steps can be queued without the host.
        """
        r, io = self.r, self.r.io
        pairs = (
            (io.ids, self.ids),
            (io.mask, self.mask),
            (io.positions, self.positions),
            (io.write_indices, self.write),
        )
        self.inputs = [(port.name, staged) for port, staged in pairs if port is not None]
        count = 2 if r.looks_ahead else 1
        input_sets = [
            {name: staged.value if index == 0 else r.ops.value(staged.array.copy()) for name, staged in self.inputs}
            for index in range(count)
        ]
        self.tokens = [r.ops.value(np.zeros((self.rows, self.slots), np.int64)) for _ in input_sets]
        self._prompt: tuple[int, dict[str, Any], _Side] | None = None
        self.sides = []
        for inputs, next_inputs, past, tokens in zip(
            input_sets, input_sets[::-1], self.tokens, self.tokens[::-1], strict=True
        ):
            outputs = {f"{AHEAD}.{name}": value for name, value in next_inputs.items() if name != io.ids.name} | {
                NEXT: next_inputs[io.ids.name],
                f"{AHEAD}.tokens": tokens,
            }
            self.sides.append(
                _Side(self, inputs | ({PAST_TOKENS: past} if r.takes_tokens else {}), outputs if count > 1 else {})
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
            for side in self.sides:  # a sequence of steps follows, until the rows are reordered
                side.capture()
            return r.last(self._prompt_side(feeds, ids.shape[1]).run(), self.lengths - 1)
        buffers = [r.ops.zeros(c.shape(len(slots), self.slots), c.past.dtype) for c in r.io.caches]
        binding = r.bound(r.ops.values(feeds))
        bind_buffers(r, binding, buffers)
        r.run(binding)
        order = taking(slots, self.rows)
        for index, c in enumerate(r.io.caches):
            joined = r.ops.joined([self.buffers[index], buffers[index]], batch_axis(c))
            self.buffers[index] = r.ops.picked(joined, order, batch_axis(c))
        lengths = mask.sum(axis=1)
        self.lengths[list(slots)], self.mask.array[list(slots)] = lengths, wide
        self._bind()
        return r.last(binding.get_outputs(), lengths - 1)

    def _prompt_side(self, feeds: dict[str, Ids], length: int) -> _Side:
        """The binding of a prompt's run, with `feeds` as its inputs.

        A binding with small logits is kept, and is captured if the next prompts have the same length.
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
        """Append one token to `slots` alone.

        The other rows write a token behind their text and keep their length; their next step overwrites the token.
        """
        rows, lengths = list(slots), self.lengths
        tokens = np.full(self.rows, self.r.info.pad_token_id, np.int64)
        tokens[rows] = ids
        self.lengths = np.minimum(lengths, self.slots - 1)  # a row may be full
        self._push(tokens)
        outputs = self.sides[0].run()
        self.lengths = lengths.copy()
        self.lengths[rows] += 1
        return PickedLogits(self._logits(outputs), rows)

    def ahead(self, ids: Ids, count: int) -> Ids:
        """Run `count` greedy steps without the host, as in `LooksAhead`."""
        self._push(ids)
        for step in range(count):
            self.sides[step % 2].run(wait=step == count - 1)
        columns = self.lengths[:, None] + np.arange(count)
        rows = np.arange(self.rows)[:, None]
        self.mask.array[rows, columns] = 1
        self.lengths = self.lengths + count
        return self.tokens[count % 2].numpy()[rows, columns + 1]  # type: ignore[no-any-return]

    def _push(self, ids: Ids) -> None:
        """Write the inputs of a step with the tokens `ids` [rows]."""
        self.ids.array[:, 0] = ids
        self.positions.array[:, 0] = self.write.array[:] = self.lengths
        self.mask.array[np.arange(self.rows), self.lengths] = 1
        for _, staged in self.inputs:
            staged.push()

    def release(self, slot: int) -> None:
        self.lengths[slot], self.mask.array[slot] = 0, 0

    def reorder(self, rows: Ids) -> None:
        self.buffers = [
            self.r.ops.picked(buffer, rows, batch_axis(c))
            for c, buffer in zip(self.r.io.caches, self.buffers, strict=True)
        ]
        self.lengths, self.mask.array[:] = self.lengths[rows], self.mask.array[rows]
        self._bind()  # not captured: a beam search binds again for each step, and a capture takes two runs


class _Side:
    """A binding of inputs, caches and outputs at fixed addresses, so that its run can be captured as a CUDA graph."""

    def __init__(self, state: Static, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        r = self._runtime = state.r
        self._binding = r.bound(inputs)
        bind_buffers(r, self._binding, state.buffers)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options: list[Any] = [None, None]
        self._results: list[Any] | None = None

    def capture(self) -> None:
        """Capture the next run and replay it from then on, if graphs can be captured."""
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
        if self._results is None:  # later runs write the results where the first run put them
            self._results = self._binding.get_outputs()[: len(r.results)]
            for name, value in zip(r.results, self._results, strict=True):
                self._binding.bind_ortvalue_output(name, value)
        return self._results


class Whole:
    """The state without a cache; texts are also scored with it, with empty caches."""

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
        """All logits of padded `ids` [rows, tokens], [rows, tokens, vocabulary], in the graph's type."""
        r, io = self.r, self.r.io
        slots = io.cache_length or ids.shape[1]
        wide_mask = np.pad(mask, ((0, 0), (0, slots - mask.shape[1]))) if io.kind == "scatter" else mask
        binding = r.session.io_binding()
        feeds = r.feeds(ids, wide_mask, positions_of(mask), np.zeros(len(ids), np.int64))
        for name, value in r.ops.values(feeds).items():
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
    """Run options of CUDA graph number `graph`.

    ONNX Runtime captures the graph at the first run with them (it runs the model twice) and replays it from then on.
    """
    ort = onnxruntime()
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    if not wait:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def batch_axis(cache: CachePort) -> int:
    """The batch axis of a cache: 0, or 1 if the sequence axis is 0."""
    return 0 if cache.axis != 0 else 1


def bind_buffers(model: OrtModel, binding: Any, buffers: list[Any]) -> None:
    """Bind each buffer as the input and the output of its cache."""
    for cache, buffer in zip(model.io.caches, buffers, strict=True):
        binding.bind_ortvalue_input(cache.past.name, buffer)
        binding.bind_ortvalue_output(cache.present.name, buffer)


def taking(slots: Sequence[int], count: int) -> Ids:
    """Indices [count] that put new rows into their slots.

    They pick from `count` old rows followed by one new row for each of `slots`.
    """
    order = np.arange(count)
    order[list(slots)] = count + np.arange(len(slots))
    return order


def is_all(slots: Sequence[int], count: int) -> bool:
    """Whether `slots` are all of `count` slots, in order."""
    return list(slots) == list(range(count))


CacheState = Growing | Static | Whole
