"""`Runtime`: what generation, benchmarks and scores need of a model, wherever it runs.

Implementations are in `onnxtools.engines`.
"""

from __future__ import annotations

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
    """Scores of the next token, left where they were computed until somebody asks."""

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
    """Those of some slots, out of logits of all."""

    logits: Logits
    slots: Sequence[int]

    def numpy(self) -> Floats:
        return self.logits.numpy()[list(self.slots)]

    def argmax(self) -> tuple[Ids, Floats]:
        ids, best = self.logits.argmax()
        return ids[list(self.slots)], best[list(self.slots)]


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
        if self.threads < 0:
            raise UsageError(f"threads is {self.threads}; give a number of threads, or 0 for all cores")


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "cpu": {"device": "cpu"}, "cuda": {"device": "cuda"}, "eager": {"attention": "eager"},
    "sdpa": {"attention": "sdpa"}, "nocache": {"cache": False},
    "nograph": {"cuda_graph": False}, "nokernels": {"kernels": False},
}  # fmt: skip
"""Words after a runtime's name, as in `frameworks:eager:nocache`, and the options they stand for."""


class Session(Protocol):
    """Sequences that run together; each has a slot, into which it is admitted and which it leaves by itself.

    Attributes:
        slots: how many there are.
        joins: whether a sequence can be admitted, or stepped, while the others stay where they are.
    """

    slots: int
    joins: bool

    def admit(self, slots: Sequence[int], prompts: Prompts) -> Logits:
        """Run `prompts`, each in the slot of the same place; what was there is forgotten.

        Returns:
            Logits that follow the last token of each prompt, [len(slots), vocabulary].
        Raises:
            JobError: too long, or only some of the slots and the session does not join.
        """
        ...

    def step(self, ids: Ids, slots: Sequence[int] | None = None) -> Logits:
        """Append one token to the sequence in each of `slots`, all by default; their next logits, in that order."""
        ...

    def release(self, slot: int) -> None:
        """Forget the sequence in `slot`."""
        ...

    def reorder(self, rows: Ids) -> None:
        """Slot i becomes what slot `rows[i]` was (beam search)."""
        ...

    def close(self) -> None:
        """The runtime may use the memory again; nothing may be called after this."""
        ...


class Runtime(Protocol):
    """A causal language model, wherever it runs.

    Attributes:
        name: what the user calls it, with its variant.
        device: `cpu`, or `cuda` and the card's name.
        has_cache: whether a step costs one token; else the whole text is run again.
        pads: whether rows of one batch may have different lengths at once.
        notes: what the user should know, once each.
        weight_bytes: size of the weights that one step reads.
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
        """Room for `slots` sequences of at most `length` tokens, empty. One session is open at a time.

        Raises:
            JobError: longer than the model's positions or cache, or more rows than it takes.
        """
        ...

    def score(self, prompts: Prompts) -> list[Floats]:
        """Logits after every token of each prompt, [tokens, vocabulary]; nothing is kept.

        Raises:
            JobError: the model returns the last logits alone.
        """
        ...

    def close(self) -> None:
        """Give back memory."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """A session that can feed its own greedy tokens back, so that the device does not wait for the host.

    Attributes:
        looks_ahead: whether it can with this model.
    """

    looks_ahead: bool

    def ahead(self, ids: Ids, count: int) -> Ids:
        """`count` greedy steps of all slots, the first of `ids`; the tokens they find, [slots, count], -1 where the
        logits are NaN.
        """
        ...


def default_runtime(model: Path) -> str:
    """By the file: .onnx runs in ONNX Runtime, a folder or GGUF file in its framework, anything else is an engine."""
    return "onnxrt" if model.suffix == ".onnx" else "frameworks" if model.is_dir() or model.suffix == ".gguf" else "trt"


def open_runtime(spec: str, model: Path, options: RuntimeOptions) -> Runtime:
    """The runtime called `spec` (name[:variant...]) for `model`.

    Raises:
        UsageError: no runtime or variant of that name.
        JobError: it cannot run this model here.
    """
    import dataclasses

    name, *words = spec.split(":")
    for word in words:
        if word not in VARIANTS:
            raise UsageError(f"runtime {spec!r}: no variant is called {word!r}; known: {', '.join(VARIANTS)}")
        options = dataclasses.replace(options, **VARIANTS[word])
    if name == "trt" and model.suffix == ".onnx":
        raise UsageError(
            f"{model}: is a graph, and --runtime trt runs engines; `onnxtools build {model} ENGINE`, then name ENGINE"
        )
    if name == "onnxrt" and model.suffix != ".onnx":
        raise UsageError(
            f"{model}: is no .onnx file, which --runtime onnxrt runs; `onnxtools export` makes one of a checkpoint"
        )
    runtime: Runtime = registry.load(name, registry.RUNTIMES)(model, options)
    _check_whole(runtime, spec)
    runtime.name = spec
    return runtime


def _check_whole(runtime: Any, spec: str) -> None:
    """A runtime of another package has all that a runtime has.

    Raises:
        JobError: names what is missing.
    """
    missing = sorted(
        name
        for name in (*Runtime.__annotations__, *vars(Runtime))
        if not name.startswith("_") and not hasattr(runtime, name)
    )
    if missing:
        raise JobError(
            f"runtime {spec!r} ({type(runtime).__module__}.{type(runtime).__name__}) has no {', '.join(missing)}; its "
            "package is for another onnxtools"
        )


def greedy_steps(session: Session, ids: Ids, count: int) -> tuple[Ids, Floats]:
    """Greedy tokens after `ids`: `count`, or one where the session cannot look ahead.

    Returns:
        The tokens, and the best logit of each, NaN or infinite where logits are; both [rows, tokens].
    """
    if count > 1 and isinstance(session, LooksAhead) and session.looks_ahead:
        tokens = session.ahead(ids, count)
        return tokens, np.where(tokens < 0, np.float32(np.nan), np.float32(0))
    found, best = session.step(ids).argmax()
    return found[:, None], best[:, None]


def check_slots(session: Session, slots: Sequence[int]) -> None:
    """Raises: JobError for some slots alone where the session does not join; ValueError for a slot that is not there,
    or twice.
    """
    if len(set(slots)) != len(slots) or not all(0 <= slot < session.slots for slot in slots):
        raise ValueError(f"slots {list(slots)} are not different ones of 0 to {session.slots - 1}")
    if len(slots) < session.slots and not session.joins:
        raise JobError(
            "this model runs all rows of a batch in step: it has no attention_mask input, or a fixed batch; run them "
            "together or one by one"
        )


def check_length(info: ModelInfo, length: int, longest_prompt: int, what: str) -> None:
    """Raises: JobError where the sequences would not fit the model's positions."""
    if info.max_positions is not None and length > info.max_positions:
        raise JobError(
            f"{what}: a text of {longest_prompt} tokens and {length - longest_prompt} new ones exceed the model's "
            f"{info.max_positions} positions;"
            " use shorter texts, or fewer new tokens"
        )


def padded(prompts: Prompts, pad: int, side: Literal["left", "right"]) -> tuple[Ids, Ids]:
    """Ids and mask, both [rows, longest]; the mask is 1 on real tokens."""
    longest = max(len(prompt) for prompt in prompts)
    ids, mask = np.full((len(prompts), longest), pad, np.int64), np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if side == "right" else slice(longest - len(prompt), longest)
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


def positions_of(mask: Ids) -> Ids:
    """Position of each token among the real ones of its row; 0 before the first."""
    return np.maximum(mask.cumsum(axis=1) - 1, 0)  # type: ignore[no-any-return]
