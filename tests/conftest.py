"""Fixtures of the whole suite: converted and cached models are made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import SHARED, TE, Case, fixture_path, present, succeed

pytest_plugins = ("tests.signals",)

# Workers share the cores. PyTorch's threads would spin while they wait for each other, 10 times as long as they work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

Make = Callable[..., Path]


def pytest_report_header() -> list[str]:
    absent = [name for name in TE if not fixture_path(name).exists()]
    return [] if SHARED.is_dir() else [f"{SHARED} is absent: tests of {', '.join(absent)} and of its data are skipped"]


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """A fixture by name (parametrize indirectly); skips where the file is not in this clone."""
    found = Case(request.param)
    present(found.path)
    return found


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`converted(name, *flags)`: the fixture through `onnxtools convert`, made once."""
    folder, made = tmp_path_factory.mktemp("converted"), dict[tuple[str, ...], Path]()

    def make(name: str, *flags: str) -> Path:
        key = (name, *flags)
        if key not in made:
            path = folder / f"{len(made)}_{name}.onnx"
            succeed("convert", present(fixture_path(name)), path, *flags)
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def cached(tmp_path_factory: pytest.TempPathFactory, converted: Make) -> Make:
    """`cached(name, *flags)`: the converted fixture through `onnxtools add-kv-cache`, made once."""
    folder, made = tmp_path_factory.mktemp("cached"), dict[tuple[str, ...], Path]()

    def make(name: str, *flags: str) -> Path:
        key = (name, *flags)
        if key not in made:
            path = folder / f"{len(made)}_{name}.onnx"
            succeed("add-kv-cache", converted(name), path, *flags)
            made[key] = path
        return made[key]

    return make
