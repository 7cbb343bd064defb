"""`Family`: how one kind of checkpoint is read. Each family is a small file in `onnxtools.exporter.families`.

Other packages add families through the entry-point group `onnxtools.families`.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from onnxtools.base import registry
from onnxtools.base.errors import ModelError, OnnxtoolsError
from onnxtools.exporter.config import DecoderConfig
from onnxtools.storage.lazy import Tensor, equal, shape_of

_SHOWN = 8
_LOG = logging.getLogger("onnxtools")


@dataclass(frozen=True)
class Family:
    """How a checkpoint becomes a decoder.

    Attributes:
        name: its name in `--family` and onnxtools.json.
        architectures: the values of `Checkpoint.architecture` that it reads.
        config: makes a DecoderConfig of the checkpoint's configuration.
        weights: (config, source) -> canonical name to weight, for every name of `weight_shapes`.
        ignored: patterns of checkpoint tensors that carry no weights (buffers).
        scales: (config, source) -> FP8 scales of the checkpoint, by canonical name of the layer; none by default.
        example: a configuration in the checkpoint's own spelling, for `--random`.
    """

    name: str
    architectures: tuple[str, ...]
    config: Callable[[Mapping[str, Any]], DecoderConfig]
    weights: Callable[[DecoderConfig, Source], dict[str, Tensor]]
    ignored: tuple[str, ...] = ()
    scales: Callable[[DecoderConfig, Source], dict[str, FP8Scales]] = lambda config, source: {}
    example: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FP8Scales:
    """Per-tensor scales of a linear layer in ONNX's sense: real value = stored FP8 value x scale."""

    activation: float
    weight: float


@dataclass(frozen=True)
class Weights:
    """The weights that a graph is built from.

    Attributes:
        tensors: every weight of `weight_shapes` by canonical name.
        scales: FP8 scales of the linear layers that run in FP8, by canonical name without `.weight`.
    """

    tensors: Mapping[str, Tensor]
    scales: Mapping[str, FP8Scales] = field(default_factory=dict)


class Source:
    """A checkpoint's tensors, taken by name and expected shape; `check` reports all that do not fit at once."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.tensors, self.config = tensors, config
        self._taken: set[str] = set()
        self._missing: list[str] = []
        self._heads: list[str] = []
        self._misshaped: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`, which must have this shape.

        A missing or mis-shaped tensor is replaced by a lazy stand-in, which must not be read; `check` reports it.
        """
        self._taken.add(name)
        tensor = self.tensors.get(name)
        if tensor is None:
            self._missing.append(name)
        elif shape_of(tensor) != shape:
            self._misshaped.append(f"{name} is {list(shape_of(tensor))} and should be {list(shape)}")
        else:
            return tensor
        return ir.LazyTensor(_never, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)

    def head(self, c: DecoderConfig, name: str, table: Tensor) -> dict[str, Tensor]:
        """`lm_head.weight`, or nothing where the head is the embedding.

        The head is the embedding if the model ties them and the checkpoint stores no head, or an equal one.
        transformers (5.x) does not tie two weights that a checkpoint stores with different elements.

        Args:
            name: name of the head in the checkpoint.
            table: the embedding [vocabulary, hidden].
        """
        if c.tie_word_embeddings and name not in self:
            return {}
        self._heads = [name]
        stored = self.take(name, c.vocab_size, c.hidden_size)
        same = c.tie_word_embeddings and (
            isinstance(stored, ir.LazyTensor) or isinstance(table, ir.LazyTensor) or equal(stored, table)
        )
        return {} if same else {"lm_head.weight": stored}

    def skip(self, name: str) -> None:
        """Mark a tensor as known but not needed."""
        self._taken.add(name)

    def check(self, label: str, ignored: Sequence[str]) -> None:
        """Refuse a checkpoint whose tensors do not fit; `ignored` are patterns of tensors that may be left over.

        Raises:
            ModelError: lists every missing, mis-shaped and unknown tensor.
        """
        extra = [
            n
            for n in self.tensors
            if n not in self._taken and not any(fnmatch.fnmatchcase(n, pattern) for pattern in ignored)
        ]
        lists = (("missing", self._missing), ("of the wrong shape", self._misshaped), ("unknown", sorted(extra)))
        problems = [f"{len(names)} weights {defect}: {_few(names)}" for defect, names in lists if names]
        if len(self._missing) == 1 and self._missing == self._heads and not self._misshaped and not extra:
            raise ModelError(
                f"{label}: has no {self._missing[0]}: the model was saved without its head; export the checkpoint of "
                "the causal language model"
            )
        if problems:
            raise ModelError(
                f"{label}: {'; '.join(problems)}; check that the checkpoint is whole and that its configuration "
                "belongs to it"
            )


def _never() -> ir.TensorProtocol:
    raise AssertionError("a stand-in for a missing weight was read")


def _few(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def family_for(architecture: str, label: str) -> Family:
    """The family that reads `architecture`.

    Raises:
        ModelError: no family does.
    """
    families: list[Family] = []
    for name in registry.names(registry.FAMILIES):
        try:
            families.append(registry.load(name, registry.FAMILIES))
        except OnnxtoolsError as error:  # of another package; the other families work
            _LOG.warning("%s", error)
    for family in families:
        if architecture in family.architectures:
            return family
    architectures = sorted({name for family in families for name in family.architectures})
    raise ModelError(f"{label}: the architecture {architecture!r} is not supported; {', '.join(architectures)} are")
