"""The runtime `onnxrt`: ONNX Runtime on the CPU or CUDA. The cache stays on the device.

concat: the outputs of a step are the inputs of the next, bound as they are; prompts are padded on the left.
scatter, gqa: one buffer a cache is input and output at once, bound once; prompts are padded on the right. On CUDA the step is captured
as a CUDA graph. none: the whole text is run again for each token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onnxtools.engines.decoder_io import decoder_io
from onnxtools.engines.next_token import AHEAD, NEXT, PAST_TOKENS
from onnxtools.engines.ort_session import DeviceOps, choose_device, device_memory, device_name, is_out_of_memory, one_line, open_session, ports
from onnxtools.errors import JobError
from onnxtools.generation.runtime import Floats, HostLogits, Ids, Logits, ModelInfo, Prompts, RuntimeOptions, check_length, padded, positions_of
from onnxtools.memory import available_bytes
from onnxtools.model import Model


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


class OrtRuntime:
    """See the module; the attributes are those of `Runtime`.

    Raises:
        JobError: a graph that cannot be run as a decoder, or that ONNX Runtime does not take.
    """

    def __init__(self, path: Path, options: RuntimeOptions) -> None:
        import onnxruntime as ort

        self.name = "onnxrt"
        self.notes: list[str] = []
        model = Model.load(path)
        self.io = decoder_io(path, *ports(model), gqa=any(n.op_type == "GroupQueryAttention" for n in model.graph))
        self.info = ModelInfo.read(path, {**model.ir.metadata_props, **model.graph.metadata_props})
        self.vocab_size = self.io.vocab_size
        self.has_cache, self.pads = bool(self.io.caches), self.io.mask is not None
        self.weight_bytes = model.weight_bytes()
        self.path, self._device = path, choose_device(options.device, self.notes)
        self.device = device_name(self._device)
        if self.io.kind == "gqa" and self._device == "cuda" and self.io.caches[0].past.dtype == "float":
            raise JobError(f"{path}: ONNX Runtime has no CUDA kernel for fp32 GroupQueryAttention; export with --dtype fp16 or bf16, or --kv-cache concat")
        static = self.io.kind in ("scatter", "gqa")
        self.session, self.captures = open_session(model, options, self._device, self.notes, graph=options.cuda_graph and static)
        if not self.has_cache:
            self.notes.append("the model has no KV cache: every token runs the whole text again; use add-kv-cache, or export --kv-cache concat")
        self.takes_tokens = any(value.name == PAST_TOKENS for value in self.session.get_inputs())
        self.looks_ahead = self.captures and self.takes_tokens
        self.results = [self.io.logits.name, *([NEXT] if self._device == "cuda" else [])]
        self.ops = DeviceOps(self._device)
        self._plain = ort.RunOptions()
        if self.captures:
            self._plain.add_run_config_entry("gpu_graph_id", "-1")
        self._state: _Growing | _Static | _Whole | None = None

    # --- the protocol ------------------------------------------------------------------------------------------------

    def start(self, rows: int, length: int) -> None:
        self._check_rows(rows)
        self._rows, self._length = rows, length
        if isinstance(self._state, _Static) and self._state.fits(rows, length):
            return  # its buffers, and the graph captured with them, serve again
        self._state = None  # give the old buffers back first
        kind = _Whole if self.io.kind == "none" else _Growing if self.io.kind == "concat" else _Static
        try:
            self._state = kind(self, rows, length)
        except JobError:
            raise
        except Exception as error:
            raise self._failure(error) from None

    def prefill(self, prompts: Prompts) -> Logits:
        longest = max(map(len, prompts))
        check_length(self.info, self._length, longest, str(self.path))
        with self._guarded() as state:
            return state.prefill(prompts)

    def step(self, ids: Ids) -> Logits:
        with self._guarded() as state:
            return state.step(ids)

    def ahead(self, ids: Ids, count: int) -> Ids:
        with self._guarded() as state:
            assert isinstance(state, _Static)
            return state.ahead(ids, count)

    def reorder(self, rows: Ids) -> None:
        with self._guarded() as state:
            state.reorder(rows)

    def score(self, prompts: Prompts) -> list[Floats]:
        if not self.io.logits_all:
            raise JobError(f"{self.path}: returns the logits of the last token alone; export with --logits all to score texts")
        longest = max(map(len, prompts))
        check_length(self.info, longest, longest, str(self.path))
        if not self.pads and min(map(len, prompts)) != longest:
            return [self.score([prompt])[0] for prompt in prompts]
        self._check_rows(len(prompts))
        side = "left" if self.io.kind in ("concat", "none") else "right"
        whole = _Whole(self, len(prompts), longest)
        try:
            logits = whole.run(*padded(prompts, self.info.pad_token_id, side))  # type: ignore[arg-type]
        except Exception as error:
            raise self._failure(error) from None
        ends = [longest if side == "left" else len(prompt) for prompt in prompts]
        return [logits[row, end - len(prompt) : end].astype(np.float32, copy=False) for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True))]

    def _check_rows(self, rows: int) -> None:
        limit = self.io.batch_limit
        if limit is not None and rows != limit:
            raise JobError(f"{self.path}: its batch is fixed to {limit} and {rows} rows are wanted; use --batch-size {limit}, or export with a dynamic batch")

    def close(self) -> None:
        self._state = None
        self.session = None

    # --- for the states ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[_Growing | _Static | _Whole]:
        """The state; what ONNX Runtime raises becomes one line."""
        assert self._state is not None, "start comes first"
        try:
            yield self._state
        except JobError:
            raise
        except Exception as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> JobError:
        if not is_out_of_memory(error):
            return JobError(f"{self.path}: ONNX Runtime failed: {one_line(error)}")
        cache = self._length * sum(int(np.prod(c.shape(1, 1))) * _size(c.past.dtype) for c in self.io.caches)
        # Logits, their fp32 copy, and as much again for what the layers hand on.
        row = 2 * cache + 3 * 4 * self.vocab_size * (self._length if self.io.logits_all else 1)
        memory = device_memory() if self._device == "cuda" else None
        room = int(0.9 * memory[1]) - self.weight_bytes if memory else available_bytes()
        fits = f"; a batch of about {max(room // row, 0)} would fit" if room is not None else ""
        advice = "; --logits last at export saves most of it" if self.io.logits_all and self._length > 1 and row > 4 * cache else ""
        return JobError(f"{self.path}: out of memory with {self._rows} rows of {self._length} tokens{fits}{advice}")

    def bound(self, values: dict[str, Any]) -> Any:
        """A binding of small inputs (device values), and of the logits, for which ONNX Runtime makes room."""
        binding = self.session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.results:
            binding.bind_output(name, self._device, 0)
        return binding

    def run(self, binding: Any, options: Any = None) -> None:
        self.session.run_with_iobinding(binding, options or self._plain)

    def feeds(self, ids: Ids, mask: Ids | None, positions: Ids, write: Ids | None = None) -> dict[str, Ids]:
        """Of those inputs that the graph has, beside the caches."""
        io = self.io
        pairs = ((io.ids, ids), (io.mask, mask), (io.positions, positions), (io.write_indices, write))
        found = {port.name: np.ascontiguousarray(array, port.dtype) for port, array in pairs if port is not None and array is not None}
        if self.takes_tokens:
            found[PAST_TOKENS] = np.zeros((len(ids), 1), np.int64)  # nobody reads what is made of it
        return found

    def last(self, outputs: list[Any], ends: Ids) -> Logits:
        """The logits at `ends` of a prefill's outputs; the same as the last ones where the graph returns those alone."""
        if self._device == "cuda" and (not self.io.logits_all or outputs[0].shape()[1] == 1):
            return DeviceLogits(*outputs[:2])
        logits = outputs[0].numpy()
        rows = np.arange(len(logits))
        return HostLogits(logits[rows, ends if logits.shape[1] > 1 else 0].astype(np.float32, copy=False))


def _size(dtype: str) -> int:
    return 1 if "8" in dtype else 2 if "16" in dtype else 4


class _Growing:
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
            binding.bind_output(cache.present.name, r._device, 0)
        r.run(binding)
        outputs = binding.get_outputs()
        self.caches = outputs[-len(self.caches) :]
        return r.last(outputs, np.full(self.rows, -1))

    def reorder(self, rows: Ids) -> None:
        value = self.r.ops.value(rows)
        self.mask, self.next = self.mask[rows], self.next[rows]
        self.caches = [self.r.ops.picked(cache, value, _batch_axis(c)) for c, cache in zip(self.r.io.caches, self.caches, strict=True)]


class _Static:
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
        self._prompts: dict[int, tuple[dict[str, Any], _Side]] = {}
        self.sides = []
        for place, other, past, tokens in zip(places, places[::-1], self.tokens, self.tokens[::-1], strict=True):
            outputs = {f"{AHEAD}.{name}": value for name, value in other.items() if name != io.ids.name} | {NEXT: other[io.ids.name], f"{AHEAD}.tokens": tokens}
            self.sides.append(_Side(self, place | ({PAST_TOKENS: past} if r.takes_tokens else {}), outputs if count > 1 else {}, captured=r.captures))

    def bind_buffers(self, binding: Any) -> None:
        for cache, buffer in zip(self.r.io.caches, self.buffers, strict=True):
            binding.bind_ortvalue_input(cache.past.name, buffer)
            binding.bind_ortvalue_output(cache.present.name, buffer)

    def prefill(self, prompts: Prompts) -> Logits:
        r = self.r
        ids, mask = padded(prompts, r.info.pad_token_id, "right")
        self.lengths = mask.sum(axis=1)
        self.mask.array[:] = 0
        self.mask.array[:, : mask.shape[1]] = mask
        # gqa takes a mask as long as the text, scatter one as long as the buffer.
        given = self.mask.array if r.io.kind == "scatter" else mask
        feeds = r.feeds(ids, given, positions_of(mask), np.zeros(self.rows, np.int64))
        return r.last(self._prompt_side(feeds, ids.shape[1]).run(), self.lengths - 1)

    def _prompt_side(self, feeds: dict[str, Ids], length: int) -> _Side:
        """With `feeds` as its inputs. It is kept for the next prompts of that length, where its logits are small."""
        if length in self._prompts:
            values, side = self._prompts[length]
            for name, value in values.items():
                value.update_inplace(feeds[name])
            return side
        values = self.r.ops.values(feeds)
        side = _Side(self, values, {}, captured=False)
        self._prompts = {} if self.r.io.logits_all else {length: (values, side)}
        return side

    def step(self, ids: Ids) -> Logits:
        self._push(ids)
        outputs = self.sides[0].run()
        self.lengths = self.lengths + 1
        if self.r._device == "cuda":
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
        self._bind()


class _Side:
    """Inputs, caches and outputs at fixed places. Of a step: captured as a CUDA graph where that is possible."""

    def __init__(self, state: _Static, inputs: dict[str, Any], outputs: dict[str, Any], *, captured: bool) -> None:
        r = self._runtime = state.r
        self._binding = r.bound(inputs)
        state.bind_buffers(self._binding)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        graph = next(_GRAPHS)
        self._options = [_graph_options(graph, wait) if captured else None for wait in (False, True)]
        self._results: list[Any] | None = None

    def run(self, *, wait: bool = True) -> list[Any]:
        """The logits and what else is asked of every run. Without `wait` they are there once a later run has been waited for."""
        r = self._runtime
        r.run(self._binding, self._options[wait])
        if self._results is None:  # bound from now on where the first run put them
            self._results = self._binding.get_outputs()[: len(r.results)]
            for name, value in zip(r.results, self._results, strict=True):
                self._binding.bind_ortvalue_output(name, value)
        return self._results


class _Whole:
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
            binding.bind_output(cache.present.name, r._device, 0)
        for name in r.results:
            binding.bind_output(name, "cpu", 0)
        r.run(binding)
        return binding.get_outputs()[len(io.caches)].numpy()  # type: ignore[no-any-return]


_GRAPHS = iter(range(1, 1 << 31))


def _graph_options(graph: int, wait: bool) -> Any:
    """Run options of the graph with that number: captured at its second run, replayed from then on."""
    import onnxruntime as ort

    made = ort.RunOptions()
    made.add_run_config_entry("gpu_graph_id", str(graph))
    if not wait:
        made.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return made


def _batch_axis(cache: Any) -> int:
    return 0 if cache.axis != 0 else 1
