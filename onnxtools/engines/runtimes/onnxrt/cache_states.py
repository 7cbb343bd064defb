"""How ONNX Runtime's caches are kept from step to step, by their form.

concat: the outputs of a step are the inputs of the next, bound as they are; prompts are padded on the left.
scatter, gqa: one buffer a cache is input and output at once, bound once; prompts are padded on the right. On CUDA the step is captured
as a CUDA graph, and two of them feed each other; a prompt's run is captured when its length comes twice in a row.
none: the whole text is run again for each token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from onnxtools.base.errors import JobError
from onnxtools.engines.runtimes.onnxrt.next_token import AHEAD, NEXT, PAST_TOKENS
from onnxtools.engines.runtimes.onnxrt.ort_session import DeviceOps
from onnxtools.generation.runtime import Floats, HostLogits, Ids, Logits, Prompts, padded, positions_of

if TYPE_CHECKING:
    from onnxtools.engines.runtimes.onnxrt.ort_runtime import OrtRuntime


MAX_GRAPHS = 256
"""Of a session, which on CUDA keeps each as long as it lives (1 MB of the host's memory for 24 layers); what comes later runs without."""


class DeviceLogits:
    """Logits [rows, 1, vocabulary] on a device, with each row's best token."""

    def __init__(self, logits: Any, best: Any) -> None:
        self._logits, self._best = logits, best

    def numpy(self) -> Floats:
        return self._logits.numpy()[:, -1].astype(np.float32)  # type: ignore[no-any-return]

    def argmax(self) -> tuple[Ids, Floats]:
        best = self._best.numpy()[:, -1]
        return best, np.where(best < 0, np.float32(np.nan), np.float32(0))


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
    """concat: present becomes past."""

    def __init__(self, runtime: OrtRuntime, rows: int, length: int) -> None:
        self.r, self.rows = runtime, rows

    def prefill(self, prompts: Prompts) -> Logits:
        r = self.r
        ids, self.mask = padded(prompts, r.info.pad_token_id, "left")
        positions = positions_of(self.mask)
        self.next = positions[:, -1:] + 1
        self.caches = [r.ops.zeros(c.shape(self.rows, 0), c.past.dtype) for c in r.io.caches]
        return self._run(ids, positions)

    def step(self, ids: Ids) -> Logits:
        self.mask = np.concatenate([self.mask, np.ones((self.rows, 1), np.int64)], axis=1)
        found = self._run(ids[:, None], self.next)
        self.next = self.next + 1
        return found

    def _run(self, ids: Ids, positions: Ids) -> Logits:
        r = self.r
        binding = r.bound(r.ops.values(r.feeds(ids, self.mask, positions)))
        for cache, value in zip(r.io.caches, self.caches, strict=True):
            binding.bind_ortvalue_input(cache.past.name, value)
            binding.bind_output(cache.present.name, r.ops.device, 0)
        r.run(binding)
        outputs = binding.get_outputs()
        self.caches = outputs[-len(self.caches) :]
        return r.last(outputs, np.full(self.rows, -1))

    def reorder(self, rows: Ids) -> None:
        value = self.r.ops.value(rows)
        self.mask, self.next = self.mask[rows], self.next[rows]
        self.caches = [self.r.ops.picked(cache, value, _batch_axis(c)) for c, cache in zip(self.r.io.caches, self.caches, strict=True)]


class Static:
    """scatter, gqa: buffers that are input and output at once; everything of a step is bound once."""

    def __init__(self, runtime: OrtRuntime, rows: int, length: int) -> None:
        r = self.r = runtime
        self.rows = rows
        self.slots = r.io.cache_length or length
        if length > self.slots:
            raise JobError(f"{r.path}: its cache has {self.slots} slots and {length} tokens are wanted; export with a larger --cache-length")
        self.buffers = [r.ops.zeros(c.shape(rows, self.slots), c.past.dtype) for c in r.io.caches]
        self.ids, self.positions = _Input(r.ops, np.zeros((rows, 1), np.int64)), _Input(r.ops, np.zeros((rows, 1), np.int64))
        self.mask, self.write = _Input(r.ops, np.zeros((rows, self.slots), np.int64)), _Input(r.ops, np.zeros(rows, np.int64))
        self._bind()

    def fits(self, rows: int, length: int) -> bool:
        return rows == self.rows and (length == self.slots or (self.r.io.cache_length is not None and length <= self.slots))

    def _bind(self) -> None:
        """The step's bindings: fixed inputs, buffers and logits, so that a captured graph finds them where they were.

        One reads what the host has written. Where steps can run ahead there are two, each of which writes what the other reads.
        """
        r, io = self.r, self.r.io
        pairs = ((io.ids, self.ids), (io.mask, self.mask), (io.positions, self.positions), (io.write_indices, self.write))
        self.inputs = [(port.name, given) for port, given in pairs if port is not None]
        count = 2 if r.looks_ahead else 1
        places = [{name: given.value if at == 0 else r.ops.value(given.array.copy()) for name, given in self.inputs} for at in range(count)]
        self.tokens = [r.ops.value(np.zeros((self.rows, self.slots), np.int64)) for _ in places]
        self._prompt: tuple[int, dict[str, Any], _Side] | None = None
        self.sides = []
        for place, other, past, tokens in zip(places, places[::-1], self.tokens, self.tokens[::-1], strict=True):
            outputs = {f"{AHEAD}.{name}": value for name, value in other.items() if name != io.ids.name} | {NEXT: other[io.ids.name], f"{AHEAD}.tokens": tokens}
            self.sides.append(_Side(self, place | ({PAST_TOKENS: past} if r.takes_tokens else {}), outputs if count > 1 else {}))

    def bind_buffers(self, binding: Any) -> None:
        for cache, buffer in zip(self.r.io.caches, self.buffers, strict=True):
            binding.bind_ortvalue_input(cache.past.name, buffer)
            binding.bind_ortvalue_output(cache.present.name, buffer)

    def prefill(self, prompts: Prompts) -> Logits:
        r = self.r
        for side in self.sides:  # what comes is a sequence of steps, until the rows are reordered
            side.capture()
        ids, mask = padded(prompts, r.info.pad_token_id, "right")
        self.lengths = mask.sum(axis=1)
        self.mask.array[:] = 0
        self.mask.array[:, : mask.shape[1]] = mask
        # gqa takes a mask as long as the text, scatter one as long as the buffer.
        given = self.mask.array if r.io.kind == "scatter" else mask
        feeds = r.feeds(ids, given, positions_of(mask), np.zeros(self.rows, np.int64))
        return r.last(self._prompt_side(feeds, ids.shape[1]).run(), self.lengths - 1)

    def _prompt_side(self, feeds: dict[str, Ids], length: int) -> _Side:
        """With `feeds` as its inputs. Where its logits are small it is kept, and captured if the next prompts are of that length too."""
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

    def step(self, ids: Ids) -> Logits:
        self._push(ids)
        outputs = self.sides[0].run()
        self.lengths = self.lengths + 1
        if self.r.ops.device == "cuda":
            return DeviceLogits(*outputs[:2])
        return HostLogits(outputs[0].numpy()[:, -1].astype(np.float32, copy=False))

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

    def reorder(self, rows: Ids) -> None:
        r, value = self.r, self.r.ops.value(rows)
        self.buffers = [r.ops.picked(buffer, value, _batch_axis(c)) for c, buffer in zip(r.io.caches, self.buffers, strict=True)]
        self.lengths, self.mask.array[:] = self.lengths[rows], self.mask.array[rows]
        self._bind()  # without a graph: a beam search binds anew for each step, and to capture takes two


class _Side:
    """Inputs, caches and outputs at fixed places, so that a run can be captured as a CUDA graph."""

    def __init__(self, state: Static, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        r = self._runtime = state.r
        self._binding = r.bound(inputs)
        state.bind_buffers(self._binding)
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
        """The logits and what else is asked of every run. Without `wait` they are there once a later run has been waited for."""
        r = self._runtime
        r.run(self._binding, self._options[wait])
        if self._results is None:  # bound from now on where the first run put them
            self._results = self._binding.get_outputs()[: len(r.results)]
            for name, value in zip(r.results, self._results, strict=True):
                self._binding.bind_ortvalue_output(name, value)
        return self._results


class Whole:
    """none: no cache; also how texts are scored, with empty caches."""

    def __init__(self, runtime: OrtRuntime, rows: int, length: int) -> None:
        self.r, self.rows = runtime, rows

    def prefill(self, prompts: Prompts) -> Logits:
        self.texts = [list(prompt) for prompt in prompts]
        ids, mask = padded(self.texts, self.r.info.pad_token_id, "left")
        logits = self.run(ids, mask)
        return HostLogits(logits[:, -1].astype(np.float32, copy=False))

    def step(self, ids: Ids) -> Logits:
        return self.prefill([[*text, int(token)] for text, token in zip(self.texts, ids, strict=True)])

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
    """Run options of the graph with that number, which ONNX Runtime captures at the first run with them (it runs twice) and replays from then on."""
    import onnxruntime as ort

    made = ort.RunOptions()
    made.add_run_config_entry("gpu_graph_id", str(graph))
    if not wait:
        made.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return made


def _batch_axis(cache: Any) -> int:
    return 0 if cache.axis != 0 else 1
