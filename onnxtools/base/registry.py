"""Passes, engine builders, model families and runtimes are found through Python entry points, so that other packages
can add theirs.

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
def names(group: str = PASSES) -> dict[str, EntryPoint]:
    """Entry points of `group` by name; nothing is imported."""
    return {point.name: point for point in entry_points(group=group)}


def load(name: str, group: str = PASSES) -> Any:
    """Import what `name` stands for.

    Raises:
        UsageError: nobody registered that name; close names are suggested.
        JobError: it needs a library that is not installed.
    """
    known = names(group)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"
        raise UsageError(f"no {_KIND[group]} is named {name!r}; {hint}")
    try:
        return known[name].load()
    except (ImportError, AttributeError) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and not known[name].value.startswith(missing):
            raise JobError(f"{_KIND[group]} {name!r} needs {missing!r}, which is not installed; install it") from error
        distribution = known[name].dist
        package = distribution.name if distribution is not None else known[name].value
        raise UsageError(
            f"{_KIND[group]} {name!r} of package {package!r} cannot be imported ({error}); repair or uninstall the "
            "package"
        ) from error


def load_object(option: str, place: str) -> Any:
    """Import `package.module:name`, which `option` was given as.

    Raises:
        UsageError: it is not written so, or cannot be imported.
    """
    module, _, name = place.partition(":")
    if not module or not name:
        raise UsageError(f"{option} is {place!r}; write package.module:name")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{option} {place!r} cannot be imported ({error}); is its folder on PYTHONPATH?") from None
