"""Finds passes, engine builders, model families and runtimes through Python entry points.

Other packages can add theirs:

[project.entry-points."onnxtools.passes"]
my-pass = "my_package.module:MyPass"
"""

from __future__ import annotations

import difflib
import functools
import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from onnxtools.base.errors import JobError, UsageError

PASSES = "onnxtools.passes"
BUILDERS = "onnxtools.builders"
FAMILIES = "onnxtools.families"
RUNTIMES = "onnxtools.runtimes"
_KIND = {PASSES: "pass", BUILDERS: "builder", FAMILIES: "family", RUNTIMES: "runtime"}


@functools.cache
def _registered(group: str) -> tuple[EntryPoint, ...]:
    """Returns all entry points of `group`. Finding them reads the metadata of every installed package."""
    return tuple(entry_points(group=group))


@functools.cache
def names(group: str = PASSES) -> dict[str, EntryPoint]:
    """Returns the entry points of `group` by name; nothing is imported."""
    return {point.name: point for point in _registered(group)}


def _check_unique(name: str, group: str) -> None:
    """Raise UsageError if two packages register `name`: which of them is found would be chance."""
    places = {
        point.value: point.dist.name if point.dist is not None else point.value
        for point in _registered(group)
        if point.name == name
    }
    if len(places) > 1:
        packages = " and by ".join(sorted(places.values()))
        raise UsageError(
            f"the {_KIND[group]} {name!r} is registered by {packages}; uninstall one, or rename its entry point"
        )


def load(name: str, group: str = PASSES) -> Any:
    """Imports the object that is registered as `name` in `group`.

    Raises:
        UsageError: the name is not registered (the message suggests close names), or its module cannot be imported.
        JobError: its module needs a library that is not installed.
    """
    points = names(group)
    if name not in points:
        close = difflib.get_close_matches(name, points, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(sorted(points))}"
        raise UsageError(f"no {_KIND[group]} is named {name!r}; {hint}")
    _check_unique(name, group)
    try:
        return points[name].load()
    except (ImportError, AttributeError) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and not points[name].value.startswith(missing):
            raise JobError(f"{_KIND[group]} {name!r} needs {missing!r}, which is not installed; install it") from error
        distribution = points[name].dist
        package = distribution.name if distribution is not None else points[name].value
        raise UsageError(
            f"{_KIND[group]} {name!r} of package {package!r} cannot be imported ({error}); repair or uninstall the "
            "package"
        ) from error


def load_object(option: str, place: str) -> Any:
    """Imports the object `place`, written `package.module:name`.

    Args:
        option: the command-line option that names the object, for errors.
        place: the object's module and name.

    Raises:
        UsageError: `place` has another form, or cannot be imported.
    """
    module, _, name = place.partition(":")
    if not module or not name:
        raise UsageError(f"{option} is {place!r}; write package.module:name")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{option} {place!r} cannot be imported ({error}); is its folder on PYTHONPATH?") from None
