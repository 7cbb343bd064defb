"""Tiny random checkpoints of transformers, exported once a session in every form of the cache."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from tests.exporter import hf
from tests.support import succeed

FORMS = ("concat", "scatter", "gqa", "none")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def reference(name: str) -> Any:
    """The model in transformers, eager, in a folder of its own."""
    model = hf.make(name, Path(_folder().name, name))
    model.set_attn_implementation("eager")
    model.generation_config.pad_token_id = 0
    return model


@functools.cache
def exported(name: str, form: str, *flags: str) -> Path:
    """The ONNX file; Llama's heads of 16 suit `gqa`."""
    reference(name)
    folder = Path(_folder().name, "-".join((name, form, *(flag.strip("-") for flag in flags))))
    folder.mkdir()
    succeed("export", Path(_folder().name, name), "-o", folder / "m.onnx", "--kv-cache", form, *flags)
    return folder / "m.onnx"


def checkpoint(name: str) -> Path:
    reference(name)
    return Path(_folder().name, name)
