"""Options as dataclass fields: their help texts and switches, and plain data (YAML, the command line) as their
values.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from onnxtools.base.errors import UsageError
from onnxtools.base.inputs import shown


def option(
    default: Any,
    help: str,
    *,
    flags: Mapping[str, Any] | None = None,
    bare: str | None = None,
    path: bool = False,
    minimum: float | None = None,
    **display: Any,
) -> Any:
    """A field of a pass, or of a command's options, with its help text.

    Args:
        default: the value when the user says nothing.
        help: one sentence, shown by `--help`.
        flags: extra command-line switches, each standing for a value (`{"--opset19": 19}`).
        bare: the value that the option has when it is given without one.
        path: it names a file or folder; the provenance keeps the last part alone, since a model may be given away.
        minimum: the least value of a number.
        display: of the command line alone: `short` ("-o"), `metavar`, `required`, and `switch` (no --no- form).
    """
    metadata = {"help": help, "flags": dict(flags or {}), "bare": bare, "path": path, "minimum": minimum, **display}
    if isinstance(default, (list, dict, set)):
        raise TypeError("options are immutable: use a tuple")
    return field(default=default, metadata=metadata)


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
    """The plain type that a person writes for a field: the first of bool, int, float, str, Path in a union, else
    itself.
    """
    return next((t for t in get_args(annotation) if t in (bool, int, float, str, Path)), annotation)


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
        quoted = (
            f": quote it, as '{shown(value)}'"
            if base is str and isinstance(value, (int, float)) and not isinstance(value, bool)
            else ""
        )
        raise UsageError(f"{owner}: {name} is {shown(value)}; it takes {base.__name__}{quoted}")
    return value
