"""Feeding an exported model: prefill, then one token at a time, for every cache lowering.

Written without the product's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

Array = np.ndarray[Any, Any]
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Driver:
    """One session and its cache.

    `mask` [batch, total] says which of all tokens are real, `step(ids)` takes the next ones and returns their logits.
    """

    def __init__(self, path: Path, kind: str, mask: Array) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        # Otherwise ONNX Runtime rounds the activations of INT4 products to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.kind, self.mask, self.done = kind, mask, 0
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.past = {name: self._empty(value) for name, value in self.inputs.items() if name.startswith("past")}

    def _empty(self, value: Any) -> Array:
        batch, (_, heads, length, channels) = len(self.mask), value.shape
        return np.zeros((batch, heads, length if self.kind == "scatter" else 0, channels), _TYPES[value.type])

    def step(self, ids: Array) -> Array:
        end = self.done + ids.shape[1]
        mask = self.mask[:, :end].astype(np.int64)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, self.done :]
        if self.kind == "scatter":
            mask = np.pad(mask, ((0, 0), (0, self.inputs["attention_mask"].shape[1] - end)))
        feeds = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "write_indices": np.full(len(ids), self.done),
            **self.past,
        }
        found = dict(
            zip(self.outputs, self.session.run(None, {name: feeds[name] for name in self.inputs}), strict=True)
        )
        self.past = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        self.done = end
        return found["logits"]


def decode(path: Path, kind: str, ids: Array, mask: Array, splits: Sequence[int]) -> Array:
    """Logits of all tokens, computed in steps of these lengths; without a cache in one run."""
    driver = Driver(path, kind, mask)
    steps, at = [], 0
    for length in [ids.shape[1]] if kind == "none" else splits:
        steps.append(driver.step(ids[:, at : at + length]))
        at += length
    return np.concatenate(steps, axis=1)
