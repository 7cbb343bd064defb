"""The runtime `onnxrt`: ONNX Runtime on the CPU or CUDA. The cache stays on the device.

How a cache is kept from step to step is in `cache_states`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from onnxtools.base.dtypes import itemsize
from onnxtools.base.errors import JobError, one_line
from onnxtools.base.memory import available_bytes
from onnxtools.engines.runtimes.onnxrt.cache_states import CacheState, Growing, Static, Whole
from onnxtools.engines.runtimes.onnxrt.ort_model import OrtModel
from onnxtools.engines.runtimes.onnxrt.ort_session import device_memory, is_out_of_memory
from onnxtools.generation.runtime import Floats, Ids, Logits, Prompts, check_length, check_slots, padded


class OrtRuntime(OrtModel):
    """See the module; the attributes are those of `Runtime`."""

    variants = ("cpu", "cuda", "nograph", "nokernels")

    _idle: Static | None = None

    def open(self, slots: int, length: int) -> OrtSession:
        """See `Runtime.open`; the buffers of the last closed session are used again if they fit."""
        self._check_rows(slots)
        idle, self._idle = self._idle, None
        if idle is not None and idle.fits(slots, length):
            idle.reset()
            return OrtSession(self, idle, slots, length)  # the buffers and their captured graph are used again
        del idle  # free the old buffers first
        kind = Whole if self.io.kind == "none" else Growing if self.io.kind == "concat" else Static
        with self.guarded(slots, length):
            return OrtSession(self, kind(self, slots, length), slots, length)

    def keep(self, state: CacheState) -> None:
        """Keep the state of a closed session for the next one, if its buffers are static."""
        self._idle = state if isinstance(state, Static) else None

    def score(self, prompts: Prompts) -> list[Floats]:
        if not self.io.logits_all:
            raise JobError(
                f"{self.path}: returns the logits of the last token alone; export with --logits all to score texts"
            )
        longest = max(map(len, prompts))
        check_length(self.info, longest, longest, str(self.path))
        if not self.pads and min(map(len, prompts)) != longest:
            return [self.score([prompt])[0] for prompt in prompts]
        self._check_rows(len(prompts))
        side = "left" if self.io.kind in ("concat", "none") else "right"
        whole = Whole(self, len(prompts), longest)
        with self.guarded(len(prompts), longest):
            logits = whole.run(*padded(prompts, self.info.pad_token_id, side))  # type: ignore[arg-type]
        ends = [longest if side == "left" else len(prompt) for prompt in prompts]
        return [
            logits[row, end - len(prompt) : end].astype(np.float32, copy=False)
            for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True))
        ]

    def _check_rows(self, rows: int) -> None:
        limit = self.io.batch_limit
        if limit is not None and rows != limit:
            raise JobError(
                f"{self.path}: its batch is fixed to {limit} and {rows} rows are wanted; use --batch-size {limit}, or "
                "export with a dynamic batch"
            )

    def close(self) -> None:
        self._idle = None
        self.session = None

    @contextlib.contextmanager
    def guarded(self, rows: int, length: int) -> Iterator[None]:
        """Turn exceptions of ONNX Runtime into a JobError of one line."""
        try:
            yield
        except JobError:
            raise
        except Exception as error:
            raise self._failure(error, rows, length) from None

    def _failure(self, error: Exception, rows: int, length: int) -> JobError:
        if not is_out_of_memory(error):
            return JobError(f"{self.path}: ONNX Runtime failed: {one_line(error)}")
        cache = length * sum(int(np.prod(c.shape(1, 1))) * itemsize(c.past.dtype) for c in self.io.caches)
        # Logits, their fp32 copy, and the same size again for the activations between layers.
        row = 2 * cache + 3 * 4 * self.vocab_size * (length if self.io.logits_all else 1)
        memory = device_memory() if self._device == "cuda" else None
        room = int(0.9 * memory[1]) - self.weight_bytes if memory else available_bytes()
        fits = f"; a batch of about {max(room // row, 0)} would fit" if room is not None else ""
        advice = (
            "; --logits last at export saves most of it"
            if self.io.logits_all and length > 1 and row > 4 * cache
            else ""
        )
        return JobError(f"{self.path}: out of memory with {rows} rows of {length} tokens{fits}{advice}")


class OrtSession:
    """See `Session`."""

    def __init__(self, runtime: OrtRuntime, state: CacheState, slots: int, length: int) -> None:
        self._runtime, self.state, self.slots, self.length = runtime, state, slots, length
        self.joins = runtime.pads and runtime.io.batch_limit is None
        self.looks_ahead = runtime.looks_ahead

    def admit(self, slots: Sequence[int], prompts: Prompts) -> Logits:
        check_slots(self, slots)
        check_length(self._runtime.info, self.length, max(map(len, prompts)), str(self._runtime.path))
        with self._runtime.guarded(self.slots, self.length):
            return self.state.admit(slots, prompts)

    def step(self, ids: Ids, slots: Sequence[int] | None = None) -> Logits:
        if slots is not None:
            check_slots(self, slots)
        with self._runtime.guarded(self.slots, self.length):
            return self.state.step(ids, slots)

    def ahead(self, ids: Ids, count: int) -> Ids:
        with self._runtime.guarded(self.slots, self.length):
            assert isinstance(self.state, Static)
            return self.state.ahead(ids, count)

    def release(self, slot: int) -> None:
        self.state.release(slot)

    def reorder(self, rows: Ids) -> None:
        with self._runtime.guarded(self.slots, self.length):
            self.state.reorder(rows)

    def close(self) -> None:
        self._runtime.keep(self.state)
