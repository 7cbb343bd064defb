"""Recipes: a chain of passes, a validation and a build, declared in YAML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxtools.base.errors import UsageError
from onnxtools.base.inputs import shown
from onnxtools.base.options import convert_fields
from onnxtools.pipeline.passbase import Pass, load_pass
from onnxtools.pipeline.recipe_file import read_yaml

if TYPE_CHECKING:
    from onnxtools.engines.build.spec import EngineSpec

_KEYS = {"input", "output", "passes", "validate", "build"}


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says, checked."""

    input: Path
    output: Path
    passes: list[Pass]
    against: Path | None = None
    tolerance: float | None = None
    engine: Path | None = None
    spec: EngineSpec | None = None


def read_recipe(path: Path, input_path: Path | None = None, output_path: Path | None = None) -> Recipe:
    """Parse `path`; relative paths in it are relative to its folder.

    Raises:
        UsageError: not YAML, unknown keys, passes or options, or no input or output.
    """
    data = read_yaml(path, f"a recipe with the keys {', '.join(sorted(_KEYS))}")
    unknown = set(data) - _KEYS
    if unknown:
        raise UsageError(
            f"{path}: unknown key {shown(sorted(map(str, unknown))[0])}; a recipe has {', '.join(sorted(_KEYS))}"
        )
    source = input_path or _path(path, data, "input")
    target = output_path or _path(path, data, "output")
    if source is None or target is None:
        raise UsageError(
            f"{path}: no {'input' if source is None else 'output'}; add the key or use "
            f"--{'input' if source is None else 'output'}"
        )
    passes = [_pass(path, entry) for entry in _list(path, data.get("passes", []))]
    check = _mapping(path, "validate", data.get("validate"), {"against", "tolerance"})
    build = _mapping(path, "build", data.get("build"), None)
    if "build" in data and not build:
        raise UsageError(f"{path}: build is empty; give at least the key 'engine', or remove it")
    engine = _path(path, build, "engine")
    if build and engine is None:
        raise UsageError(f"{path}: build needs the key 'engine', the file to write")
    spec = _spec({key: value for key, value in build.items() if key != "engine"}) if build else None
    tolerance = check.get("tolerance")
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and tolerance >= 0):
        raise UsageError(f"{path}: validate.tolerance is {shown(tolerance)}; it takes a number such as 0.00001")
    return Recipe(source, target, passes, _path(path, check, "against"), tolerance, engine, spec)


def _spec(options: dict[str, Any]) -> EngineSpec:
    from onnxtools.engines.build.spec import EngineSpec

    return EngineSpec(**convert_fields(EngineSpec, "build", options))


def _path(recipe: Path, data: dict[str, Any], key: str) -> Path | None:
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{recipe}: {key} is {shown(value)}; it takes a path")
    return recipe.parent / value if value else None


def _list(recipe: Path, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{recipe}: passes is a list, such as [convert, add-kv-cache]")
    return value


def _mapping(recipe: Path, key: str, value: Any, known: set[str] | None) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{recipe}: {key} is a mapping")
    unknown = set(value) - known if known is not None else set()
    if unknown:
        raise UsageError(
            f"{recipe}: {key} has no key {shown(sorted(map(str, unknown))[0])}; it has {', '.join(sorted(known or ()))}"
        )
    return value


def _pass(recipe: Path, entry: Any) -> Pass:
    """`name`, or `{name: {option: value}}`."""
    if isinstance(entry, str):
        return load_pass(entry).from_options({})
    if isinstance(entry, dict) and len(entry) == 1:
        name, options = next(iter(entry.items()))
        if options is None or isinstance(options, dict):
            return load_pass(str(name)).from_options(options or {})
    raise UsageError(f"{recipe}: {shown(entry)} is no pass; write `name` or `name: {{option: value}}`")
