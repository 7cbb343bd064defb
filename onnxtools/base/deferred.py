"""Third-party modules that are imported at their first use.

`importlib.util.LazyLoader` does not help with a module that others import at their top: `import x` itself reads the
module's `__spec__` and so loads it (Python 3.11).
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Deferred(ModuleType):
    """Stands for a module until one of its attributes is read."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        real = importlib.import_module(self.__name__)
        self.__dict__.update(real.__dict__)
        return getattr(real, name)


def defer(name: str, package: str | None = None) -> None:
    """Let `import name` cost nothing until the module is used.

    A module that is already imported or not installed stays as it is.

    Args:
        name: the module's name, without `package`.
        package: the package that holds the module. It is not imported either.
    """
    full_name = f"{package}.{name}" if package else name
    parent = find_spec(package) if package else None
    spec = PathFinder.find_spec(full_name, parent.submodule_search_locations if parent else None)
    if spec is None or full_name in sys.modules or package in sys.modules:
        return
    module = _Deferred(full_name)
    module.__spec__ = spec
    sys.modules[full_name] = module
