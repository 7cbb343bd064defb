"""`Runtime`: the interface through which generation, benchmarks and scores run a model.

Implementations are in `onnxtools.engines`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from onnxtools.base import registry
from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.options import option
from onnxtools.checkpoints.model_info import ModelInfo

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Prompts = Sequence[Sequence[int]]


class Logits(Protocol):
    """Logits of the next token; they stay on the device that computed them until they are read."""

    def numpy(self) -> Floats:
        """[rows, vocabulary], fp32."""
        ...

    def argmax(self) -> tuple[Ids, Floats]:
        """The best token of each row and its logit, both [rows]; NaN where the row's best is NaN."""
        ...


@dataclass
class HostLogits:
    """Logits in host memory."""

    array: Floats

    def numpy(self) -> Floats:
        return self.array

    def argmax(self) -> tuple[Ids, Floats]:
        best = self.array.argmax(axis=-1)  # a NaN counts as the largest
        return best, self.array[np.arange(len(best)), best]


@dataclass
class PickedLogits:
    """The logits of some slots, picked from the logits of all slots."""

    logits: Logits
    slots: Sequence[int]

    def numpy(self) -> Floats:
        return self.logits.numpy()[list(self.slots)]

    def argmax(self) -> tuple[Ids, Floats]:
        ids, best = self.logits.argmax()
        return ids[list(self.slots)], best[list(self.slots)]


MAX_THREADS = 1024
"""More than any machine has cores; 100,000 fill the memory before anything runs."""


@dataclass(frozen=True)
class RuntimeOptions:
    """How a runtime is opened; these are flags of `run`, `benchmark`, `accuracy` and `summarize`."""

    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Where to run; auto is CUDA where the runtime finds a device."
    )
    threads: int = option(0, "Threads of the CPU; 0 is all cores.")
    cuda_graph: bool = option(
        True,
        "Capture decode steps, and prompts of a length that comes again, as CUDA graphs where shapes are static "
        "(scatter, gqa).",
    )
    kernels: bool = option(
        True,
        "Our own CUDA kernels for decode steps and short prompts in ONNX Runtime, compiled once by nvcc; from compute "
        "capability 9.0.",
    )
    checkpoint: str | None = option(
        None, "Checkpoint of the runtime `frameworks`. [default: the MODEL, where it is a checkpoint]"
    )
    attention: Literal["eager", "sdpa"] = option("sdpa", "Attention of the runtime `frameworks`.")
    cache: bool = option(True, "Let the runtime `frameworks` keep a KV cache.")

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= MAX_THREADS:
            raise UsageError(f"threads is {self.threads}; give 1 to {MAX_THREADS}, or 0 for all cores")


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "cpu": {"device": "cpu"}, "cuda": {"device": "cuda"}, "eager": {"attention": "eager"},
    "sdpa": {"attention": "sdpa"}, "nocache": {"cache": False},
    "nograph": {"cuda_graph": False}, "nokernels": {"kernels": False},
}  # fmt: skip
"""Words after a runtime's name, as in `frameworks:eager:nocache`, and the options that they set."""


class Session(Protocol):
    """Sequences that run together; each is admitted to a slot of its own and is released from it independently.

    Attributes:
        slots: number of slots.
        joins: whether some sequences can be admitted, or stepped, while the others wait.
    """

    slots: int
    joins: bool

    def admit(self, slots: Sequence[int], prompts: Prompts) -> Logits:
        """Run `prompts[i]` in slot `slots[i]`; the sequence that was there is forgotten.

        Returns:
            Logits after the last token of each prompt, [len(slots), vocabulary].

        Raises:
            JobError: a prompt is too long, or the session does not join and `slots` are not all slots.
        """
        ...

    def step(self, ids: Ids, slots: Sequence[int] | None = None) -> Logits:
        """Append one token to the sequence in each of `slots` (all by default).

        Args:
            ids: the tokens, int64 [len(slots)].

        Returns:
            The logits after them, [len(slots), vocabulary], in the order of `slots`.
        """
        ...

    def release(self, slot: int) -> None:
        """Forget the sequence in `slot`."""
        ...

    def reorder(self, rows: Ids) -> None:
        """Slot i takes over the sequence of slot `rows[i]` (beam search); `rows` is int64 [slots]."""
        ...

    def close(self) -> None:
        """End the session: the runtime may reuse its memory, and no other method may be called."""
        ...


class Runtime(Protocol):
    """A causal language model on some runtime.

    The class is called with (path: Path, options: RuntimeOptions). `variants`, a tuple of keys of `VARIANTS`, names the
    words that may follow its name; `cpu` and `cuda` without it.

    Attributes:
        name: the runtime's name with its variant, as the user gave it.
        device: `cpu`, or `cuda` and the card's name.
        info: tokens and limits of the model.
        vocab_size: number of logits of a token.
        has_cache: whether a step runs one token; without a cache the whole text is run again.
        pads: whether the rows of one batch may have different lengths.
        notes: notes for the user, each once.
        weight_bytes: size of the weights that one step reads, in bytes.
    """

    name: str
    device: str
    info: ModelInfo
    vocab_size: int
    has_cache: bool
    pads: bool
    notes: list[str]
    weight_bytes: int

    def open(self, slots: int, length: int) -> Session:
        """An empty session for `slots` sequences of at most `length` tokens. One session is open at a time.

        Raises:
            JobError: the model does not take `slots` rows.
        """
        ...

    def score(self, prompts: Prompts) -> list[Floats]:
        """Logits after every token of each prompt, fp32 [tokens, vocabulary]; no state is kept.

        Raises:
            JobError: the model returns the last logits alone.
        """
        ...

    def close(self) -> None:
        """Free the memory of the model."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """A session that can feed its own greedy tokens back, so that the device does not wait for the host.

    Attributes:
        looks_ahead: whether the session can do this with its model.
    """

    looks_ahead: bool

    def ahead(self, ids: Ids, count: int) -> Ids:
        """Run `count` greedy steps of all slots; `ids` [slots] are the tokens of the first step.

        Returns:
            The generated tokens, int64 [slots, count]; -1 where the logits are NaN.
        """
        ...


def default_runtime(model: Path) -> str:
    """The runtime for a file: onnxrt for .onnx, frameworks for a folder or a GGUF file, trt for any other file."""
    return "onnxrt" if model.suffix == ".onnx" else "frameworks" if model.is_dir() or model.suffix == ".gguf" else "trt"


def open_runtime(spec: str, model: str | os.PathLike[str], options: RuntimeOptions) -> Runtime:
    """Open `model` in the runtime `spec` (name[:variant...]).

    Raises:
        UsageError: no runtime or variant of that name, or a runtime for another kind of file.
        JobError: the runtime cannot run this model here.
    """
    import dataclasses

    model = Path(model)
    name, *words = spec.split(":")
    kind = registry.load(name, registry.RUNTIMES)
    variants = getattr(kind, "variants", ("cpu", "cuda"))
    for word in words:
        if word not in variants:
            raise UsageError(f"runtime {spec!r}: {name} has no variant {word!r}; it has {', '.join(variants)}")
        options = dataclasses.replace(options, **VARIANTS[word])
    if name == "trt" and model.suffix == ".onnx":
        raise UsageError(
            f"{model}: is a graph, and --runtime trt runs engines; `onnxtools build {model} ENGINE`, then name ENGINE"
        )
    if name == "onnxrt" and model.suffix != ".onnx":
        raise UsageError(
            f"{model}: is no .onnx file, which --runtime onnxrt runs; `onnxtools export` makes one of a checkpoint"
        )
    runtime: Runtime = kind(model, options)
    _check_whole(runtime, spec)
    runtime.name = spec
    return runtime


def _check_whole(runtime: Any, spec: str) -> None:
    """Check that a runtime, which may be of another package, has every attribute of `Runtime`.

    Raises:
        JobError: names the missing attributes.
    """
    missing = sorted(
        name
        for name in (*Runtime.__annotations__, *vars(Runtime))
        if not name.startswith("_") and not hasattr(runtime, name)
    )
    if missing:
        place = f"{type(runtime).__module__}.{type(runtime).__name__}"
        raise JobError(
            f"runtime {spec!r} ({place}) has no {', '.join(missing)}, which onnxtools.generation.runtime.Runtime has; "
            "add it, or install a newer package"
        )


def greedy_steps(session: Session, ids: Ids, count: int) -> tuple[Ids, Floats]:
    """Greedy tokens after `ids` [rows]: `count` of them, or one where the session cannot look ahead.

    Returns:
        The tokens, and a number for each that is NaN or infinite where its best logit is; both [rows, tokens].
    """
    if count > 1 and isinstance(session, LooksAhead) and session.looks_ahead:
        tokens = session.ahead(ids, count)
        return tokens, np.where(tokens < 0, np.float32(np.nan), np.float32(0))
    next_ids, best = session.step(ids).argmax()
    return next_ids[:, None], best[:, None]


def check_slots(session: Session, slots: Sequence[int]) -> None:
    """Refuse slots that the session cannot run.

    Raises:
        JobError: `slots` are not all slots, and the session does not join.
        ValueError: a slot does not exist, or is named twice.
    """
    if len(set(slots)) != len(slots) or not all(0 <= slot < session.slots for slot in slots):
        raise ValueError(f"slots {list(slots)} are not different ones of 0 to {session.slots - 1}")
    if len(slots) < session.slots and not session.joins:
        raise JobError(
            "this model runs all rows of a batch in step: it has no attention_mask input, or a fixed batch; run them "
            "together or one by one"
        )


def check_length(info: ModelInfo, length: int, longest_prompt: int, what: str) -> None:
    """Refuse sequences of `length` tokens that exceed the model's positions; `what` begins the message.

    Raises:
        JobError: `length` exceeds the positions.
    """
    if info.max_positions is not None and length > info.max_positions:
        raise JobError(
            f"{what}: a text of {longest_prompt} tokens and {length - longest_prompt} new ones exceed the model's "
            f"{info.max_positions} positions; use shorter texts, or fewer new tokens"
        )


def padded(prompts: Prompts, pad: int, side: Literal["left", "right"]) -> tuple[Ids, Ids]:
    """Ids padded with `pad` on `side`, and their mask, both int64 [rows, longest]; the mask is 1 on real tokens."""
    longest = max(len(prompt) for prompt in prompts)
    ids, mask = np.full((len(prompts), longest), pad, np.int64), np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        columns = slice(0, len(prompt)) if side == "right" else slice(longest - len(prompt), longest)
        ids[row, columns], mask[row, columns] = prompt, 1
    return ids, mask


def positions_of(mask: Ids) -> Ids:
    """Position of each token among the real tokens of its row, int64 [rows, tokens]; 0 before the first."""
    return np.maximum(mask.cumsum(axis=1) - 1, 0)  # type: ignore[no-any-return]
