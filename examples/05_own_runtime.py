"""An own runtime: a model that is no ONNX file behind `Runtime` and `Session`. It counts: the token after n is n + 1.

A package names it in the entry-point group `onnxtools.runtimes`; then `onnxtools run --runtime counter`, the benchmark
and the scores take it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import onnxtools
from onnxtools.checkpoints.model_info import ModelInfo
from onnxtools.generation.runtime import Floats, HostLogits, Ids, Logits, Prompts

VOCABULARY = 100


class Counter:
    """The attributes and methods of `onnxtools.Runtime`."""

    def __init__(self, path: Path, options: onnxtools.RuntimeOptions) -> None:
        self.name, self.device, self.notes = "counter", "cpu", list[str]()
        self.info, self.vocab_size = ModelInfo(path.parent), VOCABULARY
        self.has_cache, self.pads, self.weight_bytes = True, True, 0

    def open(self, slots: int, length: int) -> "CounterSession":
        return CounterSession(slots)

    def score(self, prompts: Prompts) -> list[Floats]:
        return [_logits(np.asarray(prompt)) for prompt in prompts]

    def close(self) -> None:
        pass


class CounterSession:
    """The attributes and methods of `onnxtools.Session`; what a slot remembers is its last token."""

    joins = True

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._last = np.zeros(slots, np.int64)

    def admit(self, slots: Sequence[int], prompts: Prompts) -> Logits:
        self._last[list(slots)] = [prompt[-1] for prompt in prompts]
        return HostLogits(_logits(self._last[list(slots)]))

    def step(self, ids: Ids, slots: Sequence[int] | None = None) -> Logits:
        rows = list(range(self.slots) if slots is None else slots)
        self._last[rows] = ids
        return HostLogits(_logits(self._last[rows]))

    def release(self, slot: int) -> None:
        self._last[slot] = 0

    def reorder(self, rows: Ids) -> None:
        self._last = self._last[rows]

    def close(self) -> None:
        pass


def _logits(last: Ids) -> Floats:
    logits = np.zeros((len(last), VOCABULARY), np.float32)
    logits[np.arange(len(last)), (last + 1) % VOCABULARY] = 9
    return logits


def main(folder: Path) -> None:
    runtime = Counter(folder / "model", onnxtools.RuntimeOptions())
    found = onnxtools.generate(runtime, [[5, 6, 7], [97]], onnxtools.GenerationOptions(max_new_tokens=5))
    print([best[0].token_ids for best in found])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
