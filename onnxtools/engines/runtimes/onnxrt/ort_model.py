"""A decoder in an ONNX Runtime session: its ports, and runs of bound values. `OrtSession` is built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from onnxtools.analysis.decoder_io import decoder_io
from onnxtools.base.errors import JobError
from onnxtools.base.onnx_runtime import onnxruntime
from onnxtools.checkpoints.model_info import ModelInfo
from onnxtools.engines.runtimes.onnxrt.device_ops import DeviceOps
from onnxtools.engines.runtimes.onnxrt.next_token import NEXT, PAST_TOKENS
from onnxtools.engines.runtimes.onnxrt.ort_session import choose_device, device_name, open_decoder, ports
from onnxtools.generation.runtime import Floats, HostLogits, Ids, Logits, RuntimeOptions
from onnxtools.ir.model import Model


class DeviceLogits:
    """Logits [rows, 1, vocabulary] on a device, with each row's best token."""

    def __init__(self, logits: Any, best: Any) -> None:
        self._logits, self._best = logits, best

    def numpy(self) -> Floats:
        return self._logits.numpy()[:, -1].astype(np.float32)  # type: ignore[no-any-return]

    def argmax(self) -> tuple[Ids, Floats]:
        best = self._best.numpy()[:, -1]
        return best, np.where(best < 0, np.float32(np.nan), np.float32(0))


class OrtModel:
    """See the module; the other attributes are those of `Runtime`.

    Attributes:
        io: inputs and outputs of the graph.
        session: the ONNX Runtime session.
        captures: whether runs can be captured as CUDA graphs.
        graphs: number of CUDA graphs captured so far.
        takes_tokens: whether the graph appends the token that it generates to the tokens before.
        looks_ahead: whether steps can feed each other on the device.
        results: the outputs that every run returns, the logits first.
        ops: operations on values of the device.

    Raises:
        JobError: a graph that cannot be run as a decoder, or that ONNX Runtime does not take.
    """

    def __init__(self, path: Path, options: RuntimeOptions) -> None:
        ort = onnxruntime()
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
            raise JobError(
                f"{path}: ONNX Runtime has no CUDA kernel for fp32 GroupQueryAttention; export with --dtype fp16 or "
                "bf16, or --kv-cache concat"
            )
        static = self.io.kind in ("scatter", "gqa")
        self.session, self.captures = open_decoder(
            model, options, self._device, self.notes, graph=options.cuda_graph and static
        )
        if not self.has_cache:
            self.notes.append(
                "the model has no KV cache: every token runs the whole text again; use add-kv-cache, or export "
                "--kv-cache concat"
            )
        self.graphs = 0  # captured so far
        self.takes_tokens = any(value.name == PAST_TOKENS for value in self.session.get_inputs())
        self.looks_ahead = self.captures and self.takes_tokens
        self.results = [self.io.logits.name, *([NEXT] if self._device == "cuda" else [])]
        self.ops = DeviceOps(self._device)
        self._plain = ort.RunOptions()
        if self.captures:
            self._plain.add_run_config_entry("gpu_graph_id", "-1")

    def bound(self, values: dict[str, Any]) -> Any:
        """A binding of small inputs (device values), and of the results, which ONNX Runtime allocates."""
        binding = self.session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.results:
            binding.bind_output(name, self._device, 0)
        return binding

    def run(self, binding: Any, options: Any = None) -> None:
        """Run the session on a binding; by default without CUDA graphs."""
        self.session.run_with_iobinding(binding, options or self._plain)

    def feeds(self, ids: Ids, mask: Ids | None, positions: Ids, write: Ids | None = None) -> dict[str, Ids]:
        """The inputs that the graph has, without the caches, by name and in their types.

        Args:
            ids: int64 [rows, tokens].
            mask: int64 [rows, total].
            positions: int64 [rows, tokens].
            write: the first slot to write of each row, int64 [rows].
        """
        io = self.io
        pairs = ((io.ids, ids), (io.mask, mask), (io.positions, positions), (io.write_indices, write))
        arrays = {
            port.name: np.ascontiguousarray(array, port.dtype)
            for port, array in pairs
            if port is not None and array is not None
        }
        if self.takes_tokens:
            arrays[PAST_TOKENS] = np.zeros((len(ids), 1), np.int64)  # the output computed from it is not read
        return arrays

    def last(self, outputs: list[Any], ends: Ids) -> Logits:
        """The logits [rows, vocabulary] at the positions `ends` [rows] of a prefill's outputs.

        If the graph returns the last logits alone, they are the logits at `ends`.
        """
        if self._device == "cuda" and (not self.io.logits_all or outputs[0].shape()[1] == 1):
            return DeviceLogits(*outputs[:2])
        logits = outputs[0].numpy()
        rows = np.arange(len(logits))
        return HostLogits(logits[rows, ends if logits.shape[1] > 1 else 0].astype(np.float32, copy=False))
