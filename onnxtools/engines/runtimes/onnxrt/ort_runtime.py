"""The runtime `onnxrt`: ONNX Runtime on the CPU or CUDA. The cache stays on the device.

How a cache is kept from step to step is in `ort_states`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from onnxtools.analysis.decoder_io import decoder_io
from onnxtools.base.errors import JobError, one_line
from onnxtools.base.memory import available_bytes
from onnxtools.engines.runtimes.onnxrt.cache_states import DeviceLogits, Growing, Static, Whole
from onnxtools.engines.runtimes.onnxrt.next_token import NEXT, PAST_TOKENS
from onnxtools.engines.runtimes.onnxrt.ort_session import DeviceOps, choose_device, device_memory, device_name, is_out_of_memory, open_session, ports
from onnxtools.generation.runtime import Floats, HostLogits, Ids, Logits, ModelInfo, Prompts, RuntimeOptions, check_length, padded
from onnxtools.ir.model import Model


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
        self.graphs = 0  # captured so far
        self.takes_tokens = any(value.name == PAST_TOKENS for value in self.session.get_inputs())
        self.looks_ahead = self.captures and self.takes_tokens
        self.results = [self.io.logits.name, *([NEXT] if self._device == "cuda" else [])]
        self.ops = DeviceOps(self._device)
        self._plain = ort.RunOptions()
        if self.captures:
            self._plain.add_run_config_entry("gpu_graph_id", "-1")
        self._state: Growing | Static | Whole | None = None

    # --- the protocol ------------------------------------------------------------------------------------------------

    def start(self, rows: int, length: int) -> None:
        self._check_rows(rows)
        self._rows, self._length = rows, length
        if isinstance(self._state, Static) and self._state.fits(rows, length):
            return  # its buffers, and the graph captured with them, serve again
        self._state = None  # give the old buffers back first
        kind = Whole if self.io.kind == "none" else Growing if self.io.kind == "concat" else Static
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
            assert isinstance(state, Static)
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
        whole = Whole(self, len(prompts), longest)
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
    def _guarded(self) -> Iterator[Growing | Static | Whole]:
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
