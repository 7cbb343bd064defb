"""Options as dataclass fields: their help texts and flags, and the conversion of plain data (YAML, command line)."""

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
    """Returns a dataclass field of a pass, or of a command's options, with its help text.

    Args:
        default: the value if the user gives none.
        help: one sentence, shown by `--help`.
        flags: extra command-line flags and the value that each sets (`{"--opset19": 19}`).
        bare: the value of the option if it is given without a value.
        path: the option names a file or folder. The provenance records only the last part of the path, since the model
            may be published.
        minimum: the least value of a number.
        display: settings of the command line only: `short` ("-o"), `metavar`, `required`, and `switch` (no --no- form).

    Raises:
        TypeError: `default` is a list, dict or set.
    """
    metadata = {"help": help, "flags": dict(flags or {}), "bare": bare, "path": path, "minimum": minimum, **display}
    if isinstance(default, (list, dict, set)):
        raise TypeError("options are immutable: use a tuple")
    return field(default=default, metadata=metadata)


def convert_fields(cls: type[Any], owner: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Converts plain data to values for the fields of the dataclass `cls`.

    Args:
        cls: a dataclass with type annotations.
        owner: the name of the pass or command in errors.
        options: values by option name, with `-` or `_`.

    Raises:
        UsageError: an option is unknown or its value has the wrong type.
    """
    types = typing.get_type_hints(cls)
    field_names = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name not in field_names:
            raise UsageError(f"{owner}: unknown option {key!r}; it has {', '.join(sorted(field_names)) or 'none'}")
        values[name] = convert_option(owner, name, types[name], value)
    return values


def choices(annotation: Any) -> tuple[Any, ...]:
    """Returns the values of a `Literal` annotation, or of an optional one, else ()."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    for inner in get_args(annotation):
        if get_origin(inner) is Literal:
            return get_args(inner)
    return ()


def base_type(annotation: Any) -> Any:
    """Returns the plain type of a field's value: the first of bool, int, float, str, Path in a union, else itself."""
    return next((t for t in get_args(annotation) if t in (bool, int, float, str, Path)), annotation)


def convert_option(owner: str, name: str, annotation: Any, value: Any) -> Any:
    """Converts `value` to the type `annotation` of the field `name`.

    Raises:
        UsageError: the value has another type, or is none of the choices. The message names the expected type.
    """
    allowed = choices(annotation)
    optional = type(None) in get_args(annotation)
    if value is None and optional:
        return None
    if allowed:
        if value not in allowed:
            quoted = "; YAML reads on, off, yes and no as booleans, so quote words" if isinstance(value, bool) else ""
            raise UsageError(f"{owner}: {name} is {shown(value)}; choose one of {', '.join(map(str, allowed))}{quoted}")
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
