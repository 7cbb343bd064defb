"""Other packages add passes through entry points; nothing is imported before it is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onnxtools.base.errors import UsageError
from onnxtools.pipeline.passbase import load_pass
from tests.support import ROOT, Session, linear, normal, ops, refuse

MODULE = '''
"""Negate the output, from another package."""

from dataclasses import dataclass
import onnx_ir as ir
from onnxtools.pipeline.passbase import Pass, PassResult
from onnxtools.base.options import option

@dataclass(frozen=True)
class Negate(Pass):
    """Adds Neg before the first output."""
    name = "negate"
    example = "onnxtools negate model.onnx out.onnx"
    numerics = "lossy"
    times: int = option(1, "How often.")

    def apply(self, model):
        for turn in range(self.times):
            old = model.graph.outputs[0]
            node = ir.node("Neg", [old], num_outputs=1)
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "", old.type, old.shape
            old.name, node.outputs[0].name = f"before_{turn}", old.name
            model.graph.append(node)
            model.graph.outputs[0] = node.outputs[0]
        return PassResult(True, self.times)

class NoPass:
    pass
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An installed distribution: a module and its .dist-info, as pip lays them out."""
    site = tmp_path / "site"
    (site / "third_party-1.0.dist-info").mkdir(parents=True)
    (site / "third_party.py").write_text(MODULE)
    (site / "third_party-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n"
    )
    points = (
        "[onnxtools.passes]\nnegate = third_party:Negate\nnot-a-pass = third_party:NoPass\nbroken = "
        "third_party_absent:Pass\n"
    )
    (site / "third_party-1.0.dist-info" / "entry_points.txt").write_text(points)
    return site


def onnxtools(package: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(package)}
    return subprocess.run(
        [sys.executable, "-m", "onnxtools", *map(str, args)],
        env=environment,
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )


def test_a_third_party_pass_is_a_command(package: Path, tmp_path: Path) -> None:
    path = linear(tmp_path / "in.onnx")
    done = onnxtools(package, "negate", path, tmp_path / "out.onnx", "--times", "3", "--no-check")
    assert done.returncode == 0, done.stderr
    assert ops(tmp_path / "out.onnx") == ["MatMul", "Neg", "Neg", "Neg"]
    x = normal(4, 64, seed=1)
    assert abs(Session(tmp_path / "out.onnx")({"x": x})["y"] + x @ normal(64, 128)).max() < 1e-4


def test_a_third_party_pass_is_in_recipes_and_in_help(package: Path, tmp_path: Path) -> None:
    linear(tmp_path / "in.onnx")
    (tmp_path / "r.yaml").write_text("input: in.onnx\noutput: out.onnx\npasses: [cleanup, {negate: {times: 2}}]\n")
    done = onnxtools(package, "pipeline", tmp_path / "r.yaml")
    assert done.returncode == 0 and ops(tmp_path / "out.onnx") == ["MatMul", "Neg", "Neg"], done.stderr
    shown = onnxtools(package, "--help").stdout
    assert "negate" in shown and "Negate the output, from another package." in shown


def test_a_broken_package_does_not_break_the_rest(package: Path, tmp_path: Path) -> None:
    assert onnxtools(package, "--help").returncode == 0
    assert onnxtools(package, "convert", linear(tmp_path / "in.onnx"), tmp_path / "o.onnx").returncode == 0


@pytest.mark.parametrize("name", ["not-a-pass", "broken"])
def test_an_entry_point_that_is_no_pass_is_one_line(name: str, package: Path, tmp_path: Path) -> None:
    done = onnxtools(package, name, linear(tmp_path / "in.onnx"), tmp_path / "o.onnx")
    assert (
        done.returncode != 0
        and done.stderr.count("\n") == 1
        and done.stderr.startswith("error: ")
        and name in done.stderr
    )


def test_an_unknown_pass_suggests_close_ones() -> None:
    with pytest.raises(UsageError, match="did you mean add-kv-cache"):
        load_pass("add-kvcache")
    assert "convert" in refuse("convrt", "a.onnx", "b.onnx", code=2)


def test_the_registry_imports_nothing() -> None:
    heavy = "any(m.startswith('onnxtools.passes') or m in ('onnx', 'numpy') for m in sys.modules)"
    code = f"import sys; from onnxtools.base import registry; registry.names(); sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_name_of_two_packages_is_refused_with_both_named(package: Path, tmp_path: Path) -> None:
    """Which of two is found depends on the order of the path, so neither runs."""
    other = package / "rival-2.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 2.0\n")
    (other / "entry_points.txt").write_text("[onnxtools.passes]\nnegate = rival:Negate\n")
    done = onnxtools(package, "negate", linear(tmp_path / "in.onnx"), tmp_path / "o.onnx")
    assert done.returncode == 2
    assert "'negate' is registered by rival and by third-party" in done.stderr


def test_a_family_that_cannot_be_imported_stops_no_other(package: Path, tmp_path: Path) -> None:
    points = package / "third_party-1.0.dist-info" / "entry_points.txt"
    points.write_text("[onnxtools.families]\nbroken = third_party_absent:FAMILY\n")
    code = "from onnxtools.exporter.family import family_for; print(family_for('llama', 'x').name)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(package)}, capture_output=True, text=True,
        check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == "llama\n", done.stderr
    assert "family 'broken'" in done.stderr, "it is said"
