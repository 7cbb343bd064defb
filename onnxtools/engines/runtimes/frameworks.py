"""The runtime `frameworks`: the same checkpoint in PyTorch, through transformers.

It is the baseline that the other runtimes are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxtools.base.errors import JobError, one_line
from onnxtools.base.extras import install_line
from onnxtools.checkpoints.model_info import ModelInfo
from onnxtools.engines.runtimes.onnxrt.ort_session import device_name
from onnxtools.generation.runtime import (
    Floats,
    HostLogits,
    Ids,
    Logits,
    PickedLogits,
    Prompts,
    RuntimeOptions,
    check_length,
    check_slots,
    padded,
    positions_of,
)


class TorchLogits:
    """Logits [rows, vocabulary] in a torch tensor."""

    def __init__(self, logits: Any) -> None:
        self._logits = logits

    def numpy(self) -> Floats:
        return self._logits.float().cpu().numpy()  # type: ignore[no-any-return]

    def argmax(self) -> tuple[Ids, Floats]:
        best, ids = self._logits.max(dim=-1)
        return ids.cpu().numpy(), best.float().cpu().numpy()


class FrameworksRuntime:
    """A Hugging Face folder or GGUF file in transformers; the attributes are those of `Runtime`.

    A folder with config.json and no weights gives a model with random weights, for performance studies.

    Raises:
        JobError: PyTorch or transformers is not installed, or transformers cannot load the checkpoint.
    """

    variants = ("cpu", "cuda", "eager", "sdpa", "nocache")

    def __init__(self, path: Path, options: RuntimeOptions) -> None:
        self.path = _checkpoint(path, options)
        try:
            import torch
            import transformers
        except ImportError as error:
            raise JobError(
                f"the runtime frameworks needs PyTorch and transformers ({error}); {install_line('torch')}"
            ) from None
        self.torch = torch
        self.name, self.pads, self.has_cache = "frameworks", True, options.cache
        self.notes: list[str] = []
        if options.threads:
            torch.set_num_threads(options.threads)
        device = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = device_name(device)
        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.model = self._load(transformers, options.attention).to(device).eval()
        config = self.model.config
        eos = (
            config.eos_token_id
            if self.model.generation_config.eos_token_id is None
            else self.model.generation_config.eos_token_id
        )
        ends = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        folder = self.path if self.path.is_dir() else self.path.parent
        pad = config.pad_token_id
        limit = getattr(config, "max_position_embeddings", None)
        self.info = ModelInfo(
            folder, ends, int(pad) if pad is not None else (ends[0] if ends else 0), config.bos_token_id, limit
        )
        self.vocab_size = int(config.vocab_size)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())

    def _load(self, transformers: Any, attention: str) -> Any:
        where = (
            {"pretrained_model_name_or_path": self.path}
            if self.path.is_dir()
            else {
                "pretrained_model_name_or_path": self.path.parent,
                "gguf_file": self.path.name,
            }
        )
        random = self.path.is_dir() and not [*self.path.glob("*.safetensors"), *self.path.glob("*.bin")]
        try:
            if random:
                config = transformers.AutoConfig.from_pretrained(self.path)
                self.notes.append(f"{self.path} has no weights: the weights of frameworks are random")
                with self.torch.device("cuda" if self.torch.cuda.is_available() else "cpu"):
                    return transformers.AutoModelForCausalLM.from_config(
                        config, dtype=config.dtype or self.torch.float32, attn_implementation=attention
                    )
            dtype = "auto" if self.path.is_dir() else self.torch.float32
            return transformers.AutoModelForCausalLM.from_pretrained(
                **where, dtype=dtype, attn_implementation=attention
            )
        except Exception as error:  # transformers passes on any exception of its dependencies
            raise JobError(
                f"{self.path}: transformers cannot load it ({one_line(error, 160)}); name another with --checkpoint"
            ) from None

    def open(self, slots: int, length: int) -> TorchSession:
        return TorchSession(self, slots, length)

    def score(self, prompts: Prompts) -> list[Floats]:
        torch, (ids, mask) = self.torch, padded(prompts, self.info.pad_token_id, "right")
        check_length(self.info, ids.shape[1], ids.shape[1], str(self.path))
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask)}
        with torch.inference_mode():
            logits = self.model(
                **{name: torch.from_numpy(array).to(self.model.device) for name, array in feeds.items()},
                use_cache=False,
            ).logits
        return [
            HostLogits(logits[row, : len(prompt)].float().cpu().numpy()).array for row, prompt in enumerate(prompts)
        ]

    def close(self) -> None:
        self.model = None
        if self.torch.cuda.is_available():
            self.torch.cuda.empty_cache()


class TorchSession:
    """See `Session`. When rows join, all texts are run again together: this is the baseline, not a server."""

    joins = True

    def __init__(self, runtime: FrameworksRuntime, slots: int, length: int) -> None:
        self._runtime, self.slots, self._length = runtime, slots, length
        self._ids: Ids = np.zeros((slots, 0), np.int64)
        self._mask: Ids = self._ids
        self._past: Any = None

    def admit(self, slots: Sequence[int], prompts: Prompts) -> Logits:
        check_slots(self, slots)
        check_length(self._runtime.info, self._length, max(map(len, prompts)), str(self._runtime.path))
        texts = [row[mask == 1].tolist() for row, mask in zip(self._ids, self._mask, strict=True)]
        for slot, prompt in zip(slots, prompts, strict=True):
            texts[slot] = list(prompt)
        pad = self._runtime.info.pad_token_id
        self._ids, self._mask = padded([text or [pad] for text in texts], pad, "left")
        self._mask[[not text for text in texts]] = 0
        self._past = None
        return self._picked(self._forward(self._ids), slots)

    def step(self, ids: Ids, slots: Sequence[int] | None = None) -> Logits:
        """Append one token to `slots`; the other slots get a token that the mask hides."""
        rows = list(range(self.slots) if slots is None else slots)
        if slots is not None:
            check_slots(self, slots)
        tokens, new = (
            np.full((self.slots, 1), self._runtime.info.pad_token_id, np.int64),
            np.zeros((self.slots, 1), np.int64),
        )
        tokens[rows, 0], new[rows] = ids, 1
        self._ids, self._mask = np.concatenate([self._ids, tokens], axis=1), np.concatenate([self._mask, new], axis=1)
        return self._picked(self._forward(tokens if self._runtime.has_cache else self._ids), rows)

    def _picked(self, logits: Logits, slots: Sequence[int]) -> Logits:
        return logits if list(slots) == list(range(self.slots)) else PickedLogits(logits, slots)

    def _forward(self, ids: Ids) -> Logits:
        runtime, torch = self._runtime, self._runtime.torch
        positions = positions_of(self._mask)[:, -ids.shape[1] :]
        tensors = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        with torch.inference_mode():
            feeds = {
                name: torch.from_numpy(np.ascontiguousarray(array)).to(runtime.model.device)
                for name, array in tensors.items()
            }
            try:
                output = runtime.model(
                    **feeds, past_key_values=self._past, use_cache=runtime.has_cache, logits_to_keep=1
                )
            except torch.OutOfMemoryError:
                raise JobError(
                    f"{runtime.path}: out of memory with {len(ids)} rows of {self._length} tokens; use a smaller batch"
                ) from None
        self._past = output.past_key_values if runtime.has_cache else None
        return TorchLogits(output.logits[:, -1])

    def release(self, slot: int) -> None:
        self._mask[slot] = 0

    def reorder(self, rows: Ids) -> None:
        self._mask, self._ids = self._mask[rows], self._ids[rows]
        if self._past is not None:
            self._past.reorder_cache(self._runtime.torch.from_numpy(rows).to(self._runtime.model.device))

    def close(self) -> None:
        self._past = None


def _checkpoint(path: Path, options: RuntimeOptions) -> Path:
    """The checkpoint to load: the option, the model itself, or the checkpoint in the folder of the model.

    Raises:
        JobError: there is none, or its config.json is damaged.
    """
    checkpoint = Path(options.checkpoint) if options.checkpoint else path
    if checkpoint.suffix == ".onnx":
        checkpoint = checkpoint.parent if (checkpoint.parent / "config.json").is_file() else checkpoint
    if checkpoint.is_dir() and (checkpoint / "config.json").is_file():
        try:
            json.loads((checkpoint / "config.json").read_text())
        except ValueError:
            raise JobError(f"{checkpoint}/config.json: is not JSON; fetch the checkpoint again") from None
        return checkpoint
    if checkpoint.suffix == ".gguf" and checkpoint.is_file():
        return checkpoint
    raise JobError(
        f"{checkpoint}: is no Hugging Face folder or GGUF file, which the runtime frameworks loads; name one with "
        "--checkpoint, or the .onnx file in it as MODEL"
    )
