"""Command-line options made from the fields of a dataclass, and values of those fields made from the command line."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import click

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.options import base_type, choices, convert_fields
from onnxtools.storage.files import refuse_special


class _Path(click.Path):
    """A path; the empty text, which Path would take for the current folder, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty; name a file or folder", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)


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


class AtLeast(click.ParamType[float]):
    """A float of `minimum` or more; click.FloatRange lets NaN pass."""

    name = "float"

    def __init__(self, minimum: float) -> None:
        self.minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not number >= self.minimum:
            self.fail(f"{value!r} is no number of {self.minimum:g} or more", param, ctx)
        return number


def make_command(
    name: str,
    help_text: str,
    callback: Callable[..., Any],
    arguments: Sequence[click.Parameter] = (),
    options: Sequence[type[Any]] = (),
) -> click.Command:
    """The one way in which a command is made: arguments, a flag for each field of the dataclasses, --json and --debug.

    Args:
        name: the word after `onnxtools`.
        help_text: a summary, rules, and a paragraph of examples.
        callback: called with each argument by its name, `as_json`, and the flags; `from_parameters` makes the
            dataclasses of those.
        arguments: what stands without a flag, and flags that no dataclass can have.
        options: dataclasses whose fields are the flags, in the order of `--help`.
    """
    params = [
        *arguments,
        *(parameter for cls in options for parameter in dataclass_options(cls)),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON on stdout."),
        click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error."),
    ]
    return click.Command(name, params=params, callback=callback, help=help_text)


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
    m = field.metadata
    name, help_text = f"--{field.name.replace('_', '-')}", m.get("help", "")
    if field.default not in (None, (), "") and not isinstance(field.default, bool):
        default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        help_text = f"{help_text} [default: {default}]"
    names = [*([m["short"]] if "short" in m else ()), name, field.name]
    common: dict[str, Any] = {"help": help_text, "default": None, "show_default": False}
    common.update({key: m[key] for key in ("metavar", "required") if key in m})
    if m.get("required"):
        del common["default"]  # click takes any default for a value that was given
    inner = hint if get_origin(hint) is tuple else base_type(hint)
    if inner is bool:
        if hint is bool and field.default is False and m.get("switch"):
            return click.Option(names, is_flag=True, **common)
        text = help_text if field.default is None else f"{help_text} [default: {'on' if field.default else 'off'}]"
        return click.Option([f"{name}/--no-{name[2:]}", field.name], **{**common, "help": text})
    if choices(hint):
        bare = {"is_flag": False, "flag_value": m["bare"]} if m.get("bare") else {}
        return click.Option(names, type=click.Choice([str(c) for c in choices(hint)]), **common, **bare)
    if get_origin(inner) is tuple:
        common["help"] = f"{help_text} May be given several times."
        return click.Option(names, type=_number_or_path(get_args(inner)[0], None), multiple=True, **common)
    return click.Option(names, type=_number_or_path(inner, m.get("minimum")), **common)


def _number_or_path(kind: Any, minimum: float | None) -> Any:
    if kind is Path:
        return PATH
    if minimum is None:
        return kind
    return click.IntRange(int(minimum)) if kind is int else AtLeast(minimum)


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
