"""`Pass`: one graph transform. Its dataclass fields are its options, everywhere.

The command line, YAML recipes and the provenance record all read `dataclasses.fields(pass_type)`; nothing else lists
a pass's options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from onnxtools.base import registry
from onnxtools.base.errors import UsageError
from onnxtools.base.options import convert_fields
from onnxtools.ir.model import Model

Numerics = Literal["exact", "rounding", "lossy"]
"""What a pass may do to the outputs: nothing but reordering, rounding of stored values, or real change."""


@dataclass
class PassResult:
    """What one `apply` did.

    Attributes:
        changed: whether the graph differs afterwards.
        matches: how many places the pass worked on; 0 is reported, never silent.
        notes: lines for people, most important first.
        table: optional rows for `--json` (one mapping each, all with the same keys).
        summary: optional rows for people, of the same kind and fewer.
    """

    changed: bool
    matches: int
    notes: list[str] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    summary: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Configured:
    """What passes and partitions share: a name, and dataclass fields that are options everywhere."""

    name: ClassVar[str]
    example: ClassVar[str] = ""

    def options(self) -> dict[str, Any]:
        """Option names and values as plain data (tuples become lists), for recipes and provenance."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    def public_options(self) -> dict[str, Any]:
        """`options`, of paths the last part alone: a model that is given away does not say where its author keeps
        things.
        """
        paths = {f.name for f in dataclasses.fields(self) if f.metadata.get("path")}
        return {
            key: Path(value).name if key in paths and value is not None else value
            for key, value in self.options().items()
        }

    @classmethod
    def default(cls, name: str) -> Any:
        """Of the option `name`, as plain data."""
        value = next(f.default for f in dataclasses.fields(cls) if f.name == name)
        return list(value) if isinstance(value, tuple) else value

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build one from plain data, checking names, types and choices.

        Raises:
            UsageError: an unknown option or a value of the wrong type.
        """
        return cls(**convert_fields(cls, cls.name, options))


@dataclass(frozen=True)
class Pass(Configured):
    """Base of all passes. Subclasses are frozen dataclasses named in the entry-point group `onnxtools.passes`.

    Class attributes:
        name: the command and recipe name, kebab-case; the entry point has the same one. The first line of the help is
            that of the module's docstring, the rules are those of the class's.
        numerics: how the outputs may change; decides how the numeric check judges.
        adds_cache: whether the result decodes in steps; the numeric check then does so too.
        example: a command line for `--help`.
        runs_code: it runs code that a recipe names, which must be allowed.
    """

    numerics: ClassVar[Numerics] = "exact"
    adds_cache: ClassVar[bool] = False
    runs_code: ClassVar[bool] = False

    @property
    def rewrites_weights(self) -> bool:
        """Whether most weights are new, so that the output should not need the input's data file."""
        return False

    def expand(self) -> list[Pass]:
        """The passes that stand behind this one; itself unless it is a composite."""
        return [self]

    def requires(self, model: Model) -> None:
        """Raise a `JobError` when `model` is not what this pass can work on."""

    def apply(self, model: Model) -> PassResult:
        """Change `model.ir` in place."""
        raise NotImplementedError

    def ensures(self, model: Model) -> None:
        """Raise a `JobError` when the result is not what this pass promises."""


def load_pass(name: str) -> type[Pass]:
    """The pass that the entry point `name` stands for.

    Raises:
        UsageError: nobody registered that name, or it is no pass.
    """
    found = registry.load(name)
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise UsageError(f"entry point {name!r} is not a Pass; fix the package that registers it")
    return found
