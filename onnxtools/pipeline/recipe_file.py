"""Recipe files: YAML that is read with limits, and the recipe that repeats a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.inputs import MAX_YAML_BYTES, check_regular, parse_yaml
from onnxtools.pipeline.passbase import Pass
from onnxtools.storage.files import replacing


def write_recipe(path: Path, source: Path, output: Path, passes: Sequence[Pass], comment: str) -> None:
    """A recipe that runs `passes` on `source`; options that are as they are by default are left out."""
    steps = [
        {p.name: {key: value for key, value in p.options().items() if value != type(p).default(key)}} for p in passes
    ]
    recipe = {"input": str(source.resolve()), "output": str(output), "passes": steps}
    with replacing(path) as tmp:
        tmp.write_text(f"# {comment}\n" + yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; `what` says what it should be.

    Raises:
        UsageError: unreadable, not YAML, or no mapping.
    """
    try:
        check_regular(path, UsageError)
        with open(path, "rb") as file:
            data = parse_yaml(file.read(MAX_YAML_BYTES + 1))
    except OSError as error:
        raise JobError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise UsageError(f"{path}: not YAML that is read ({error}); correct the file") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: not a mapping; it should be {what}")
    return data
