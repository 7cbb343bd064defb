"""`Pass`: one graph transform. Its dataclass fields are its options, everywhere.

The command line, YAML recipes and the provenance record all read `dataclasses.fields(pass_type)`; nothing else lists
a pass's options.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

from onnxtools.errors import UsageError
from onnxtools.inputs import shown
from onnxtools.model import Model

Numerics = Literal["exact", "rounding", "lossy"]
"""What a pass may do to the outputs: nothing but reordering, rounding of stored values, or real change."""


def option(default: Any, help: str, *, flags: Mapping[str, Any] | None = None, bare: str | None = None, path: bool = False) -> Any:
    """A field of a pass, with its help text.

    Args:
        default: the value when the user says nothing.
        help: one sentence, shown by `--help`.
        flags: extra command-line switches, each standing for a value (`{"--opset19": 19}`).
        bare: the value that the option has when it is given without one.
        path: it names a file or folder; the provenance keeps the last part alone, since a model may be given away.
    """
    metadata = {"help": help, "flags": dict(flags or {}), "bare": bare, "path": path}
    if isinstance(default, (list, dict, set)):
        raise TypeError("options are immutable: use a tuple")
    return field(default=default, metadata=metadata)


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
class Pass:
    """Base of all passes. Subclasses are frozen dataclasses named in the entry-point group `onnxtools.passes`.

    Class attributes:
        name: the command and recipe name, kebab-case.
        numerics: how the outputs may change; decides how the numeric check judges.
        example: a command line for `--help`.
        runs_code: it runs code that a recipe names, which must be allowed.
    """

    name: ClassVar[str]
    numerics: ClassVar[Numerics] = "exact"
    example: ClassVar[str] = ""
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

    def options(self) -> dict[str, Any]:
        """Option names and values as plain data (tuples become lists), for recipes and provenance."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    def public_options(self) -> dict[str, Any]:
        """`options`, of paths the last part alone: a model that is given away does not say where its author keeps things."""
        paths = {f.name for f in dataclasses.fields(self) if f.metadata.get("path")}
        return {key: Path(value).name if key in paths and value is not None else value for key, value in self.options().items()}

    @classmethod
    def default(cls, name: str) -> Any:
        """Of the option `name`, as plain data."""
        value = next(f.default for f in dataclasses.fields(cls) if f.name == name)
        return list(value) if isinstance(value, tuple) else value

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Pass:
        """Build a pass from plain data, checking names, types and choices.

        Raises:
            UsageError: an unknown option or a value of the wrong type.
        """
        return cls(**convert_fields(cls, cls.name, options))


def convert_fields(cls: type[Any], owner: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data as values for the fields of the dataclass `cls`; `owner` names it in errors.

    Raises:
        UsageError: an unknown option or a value of the wrong type.
    """
    types = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(f"{owner}: unknown option {key!r}; it has {', '.join(sorted(known)) or 'none'}")
        values[name] = convert_option(owner, name, types[name], value)
    return values


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a `Literal` annotation (or of an optional one), else ()."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    for inner in get_args(annotation):
        if get_origin(inner) is Literal:
            return get_args(inner)
    return ()


def base_type(annotation: Any) -> Any:
    """The plain type that a person writes for a field: the first of bool, int, float, str in a union, else itself."""
    return next((t for t in get_args(annotation) if t in (bool, int, float, str)), annotation)


def convert_option(owner: str, name: str, annotation: Any, value: Any) -> Any:
    """`value` as the type of the field `name`, or a UsageError that says what it should have been."""
    wanted = choices(annotation)
    optional = type(None) in get_args(annotation)
    if value is None and optional:
        return None
    if wanted:
        if value not in wanted:
            quoted = "; YAML reads on, off, yes and no as booleans, so quote words" if isinstance(value, bool) else ""
            raise UsageError(f"{owner}: {name} is {shown(value)}; choose one of {', '.join(map(str, wanted))}{quoted}")
        return value
    if get_origin(annotation) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(convert_option(owner, name, get_args(annotation)[0], item) for item in items)
    base = base_type(annotation)
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, base) or (base is int and isinstance(value, bool)):
        quoted = f": quote it, as '{shown(value)}'" if base is str and isinstance(value, (int, float)) and not isinstance(value, bool) else ""
        raise UsageError(f"{owner}: {name} is {shown(value)}; it takes {base.__name__}{quoted}")
    return value
