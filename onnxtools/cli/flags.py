"""Command-line options made from the fields of a dataclass, and values of those fields made from the command line."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import click

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.options import base_type, choices, convert_fields
from onnxtools.storage.files import refuse_special

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

PATH = click.Path(path_type=Path)


OUTPUT_OPTION = click.Option(
    ["-o", "--output", "output_option"], type=PATH, help="The file to write; the same as OUTPUT."
)


def one_output(positional: Path | None, option: Path | None, usage: str) -> Path:
    """The output, whichever way it was named.

    Raises:
        UsageError: not at all, or twice.
    """
    if positional is not None and option is not None:
        raise UsageError(f"OUTPUT is {positional} and -o is {option}; name one")
    found = positional or option
    if found is None:
        raise UsageError(f"no output; write `onnxtools {usage}`, or say -o")
    return found


def check_output(path: Path, source: Path | None = None, *, force: bool = True) -> None:
    """Refuse, before any work, a model output that is not called so, cannot be written, or is the input.

    Raises:
        UsageError: it does not end in .onnx, or it is `source`, and not `force`.
        JobError: it is a device, a pipe or a folder.
    """
    if path.suffix != ".onnx":
        raise UsageError(f"the output {str(path)!r} does not end in .onnx; name an ONNX file")
    refuse_special(path)
    if path.is_dir():
        raise JobError(f"{path}: is a folder; name a file")
    if source is not None and not force and path.exists() and source.exists() and path.samefile(source):
        raise UsageError(
            f"the output {str(path)!r} is the input, which would be lost; name another file, or say --force"
        )


class _Tolerance(click.ParamType[float]):
    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not number >= 0:  # NaN too
            self.fail(f"{value!r} is no number of 0 or more", param, ctx)
        return number


TOLERANCE = _Tolerance()
"""A relative L2: 0 or more, not NaN."""


def dataclass_options(cls: type[Any]) -> list[click.Parameter]:
    """One click option for each field: booleans get `--x/--no-x`, Literals a choice, tuples may be given several
    times.
    """
    hints = typing.get_type_hints(cls)
    parameters: list[click.Parameter] = []
    for field in dataclasses.fields(cls):
        parameters.append(_option(field, hints[field.name]))
        for flag, value in field.metadata.get("flags", {}).items():
            help_text = f"Same as --{field.name.replace('_', '-')} {value}."
            parameters.append(click.Option([flag, _flag_name(field.name, value)], is_flag=True, help=help_text))
    return parameters


def _flag_name(name: str, value: Any) -> str:
    return f"{name}__is__{value}".replace("-", "_")


def _option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    name = field.name.replace("_", "-")
    help_text = field.metadata.get("help", "")
    if field.default not in (None, (), "") and not isinstance(field.default, bool):
        default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        help_text = f"{help_text} [default: {default}]"
    common: dict[str, Any] = {"help": help_text, "default": None, "show_default": False}
    inner = hint if get_origin(hint) is tuple else base_type(hint)
    if inner is bool:
        text = help_text if field.default is None else f"{help_text} [default: {'on' if field.default else 'off'}]"
        return click.Option([f"--{name}/--no-{name}", field.name], help=text, default=None)
    if choices(hint):
        bare = {"is_flag": False, "flag_value": field.metadata["bare"]} if field.metadata.get("bare") else {}
        return click.Option(
            [f"--{name}", field.name], type=click.Choice([str(c) for c in choices(hint)]), **common, **bare
        )
    if get_origin(inner) is tuple:
        return click.Option(
            [f"--{name}", field.name],
            type=get_args(inner)[0],
            multiple=True,
            help=f"{help_text} May be given several times.",
        )
    return click.Option([f"--{name}", field.name], type=inner, **common)


def from_parameters(cls: type[Any], values: dict[str, Any], settings: Mapping[str, Any] | None = None) -> Any:
    """Build `cls` from click's values (removed from `values`), else from `settings`; what the user did not say keeps
    its default.
    """
    given: dict[str, Any] = convert_fields(cls, "settings", settings or {})
    for field in dataclasses.fields(cls):
        value = values.pop(field.name)
        if value is not None and value != ():
            given[field.name] = value
        for flag_value in field.metadata.get("flags", {}).values():
            if values.pop(_flag_name(field.name, flag_value)):
                if given.get(field.name, flag_value) != flag_value:
                    raise UsageError(
                        f"--{field.name.replace('_', '-')} is said to be {given[field.name]} and {flag_value}; leave "
                        "one out"
                    )
                given[field.name] = flag_value
    hints = typing.get_type_hints(cls)
    for name, value in given.items():
        wanted = choices(hints[name])
        if wanted:
            given[name] = next(c for c in wanted if str(c) == str(value))
    return cls(**given)


def common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--json` and `--debug`, which every command has."""
    function = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(function)
    return click.option("--debug", is_flag=True, help="Show the traceback of an error.")(function)
