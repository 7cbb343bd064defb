"""The two packages of ONNX Runtime: none, both, and what is left when one of both was uninstalled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import linear

IMPORT = "from onnxtools.base.onnx_runtime import onnxruntime; print(onnxruntime().__version__)"


def package(folder: Path, name: str, version: str) -> None:
    """What pip leaves of an installed package."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_both_packages_are_warned_of_with_what_runs(tmp_path: Path) -> None:
    import onnxruntime

    package(tmp_path, "onnxruntime-gpu", "1.31.1")
    code = f"import logging; logging.basicConfig(format='%(message)s'); {IMPORT}"
    done = python(code, tmp_path)
    assert done.stdout.strip() == onnxruntime.__version__
    assert f"onnxruntime {onnxruntime.__version__} and onnxruntime-gpu 1.31.1 are both installed" in done.stderr
    assert "without CUDA is what runs" in done.stderr


def test_the_command_line_shows_the_warning_once(tmp_path: Path) -> None:
    graph = str(linear(tmp_path / "a.onnx"))
    package(tmp_path, "onnxruntime-gpu", "1.31.1")
    done = python(f"from onnxtools.cli.main import main; main(['validate', '-v', {graph!r}, {graph!r}])", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("both installed") == 1
    assert "warning: onnxruntime" in done.stderr


@pytest.mark.parametrize("packages", [("onnxruntime",), ("onnxruntime", "onnxruntime-gpu")])
def test_files_that_an_uninstall_left_are_named(tmp_path: Path, packages: tuple[str, ...]) -> None:
    """pip removes the files of a package and leaves folders with others' files: an import finds an empty package."""
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    for name in packages:
        package(tmp_path, name, "1.31.1")
    done = python(IMPORT, tmp_path)
    line = done.stderr.strip().splitlines()[-1]
    assert "ONNX Runtime is broken" in line and packages[-1] in line
    assert "uninstall" in line and "onnxruntime-gpu>=" in line, "the next step is named"


def test_no_package_at_all(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['onnxruntime'] = None; import importlib.metadata as m\n"
    hidden += "def absent(name): raise m.PackageNotFoundError(name)\nm.version = absent\n"
    done = python(hidden + IMPORT, tmp_path)
    line = done.stderr.strip().splitlines()[-1]
    assert "ONNX Runtime is not installed; pip install 'onnxruntime>=" in line
