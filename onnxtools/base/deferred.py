"""Modules of others that are imported when something of them is used, and not before.

`importlib.util.LazyLoader` does not help with a module that others import at their top: `import x` itself asks the
module for its `__spec__` and so loads it (Python 3.11).
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Deferred(ModuleType):
    """Stands for a module until an attribute is asked for."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        real = importlib.import_module(self.__name__)
        self.__dict__.update(real.__dict__)
        return getattr(real, name)


def defer(name: str, package: str | None = None) -> None:
    """Let `import name` be free until the module is used; one that is imported already, or not there, is left alone.

    Args:
        package: what holds the module; it is not imported either.
    """
    whole = f"{package}.{name}" if package else name
    parent = find_spec(package) if package else None
    spec = PathFinder.find_spec(whole, parent.submodule_search_locations if parent else None)
    if spec is None or whole in sys.modules or package in sys.modules:
        return
    made = _Deferred(whole)
    made.__spec__ = spec
    sys.modules[whole] = made
