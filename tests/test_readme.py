"""README.md's commands, word for word and in its order, in a folder with the files that `make demo` lays out."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.support import ROOT, SHARED, present

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_HERE = {"make demo": "CI runs it before; what it lays out is laid out here", "make test": "it runs this test"}
"""Commands that are in the README and cannot run in the test, and why."""
LAMBADA = "lambada_openai.jsonl"
ROWS = 6
"""How many rows of LAMBADA: the commands are tried, not the model."""
FIRST_ON_SMALL = "onnxtools precision model.onnx fp16.onnx --to fp16"
SMALL = "onnxtools export --random --family llama --n-layer 2 --n-embd 128 --n-head 4 --vocab-size 49152 -o model.onnx"
"""From FIRST_ON_SMALL on model.onnx is a small model beside SmolLM2's tokenizer: GPTQ, AWQ and SparseGPT of SmolLM2
itself take ten minutes on two cores. ONNXTOOLS_README_WHOLE=1 takes SmolLM2 to the end.
"""


def commands() -> list[str]:
    """The lines of the README's shell blocks that are typed; the others show what is printed."""
    lines = [
        line.removeprefix("$ ")
        for block in re.findall(r"^```\n(.*?)^```$", README, re.M | re.S)
        for line in block.splitlines()
    ]
    return [line.partition("  #")[0].strip() for line in lines if line.startswith(("onnxtools ", "make "))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What one command writes the next ones read; gigabytes, so that nothing is kept."""
    made = tmp_path_factory.mktemp("readme")
    runpy.run_path(str(ROOT / "fixtures/demo.py"))["lay_out"](made)
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", README, re.M | re.S)
    (made / "recipe.yaml").write_text(recipe, encoding="utf-8")
    yield made
    shutil.rmtree(made)


def test_the_demo_lays_out_what_it_starts_from(folder: Path) -> None:
    """The names that the README's commands start from."""
    assert {"SmolLM2.gguf", "te.onnx", "te.npz", "texts.jsonl", "articles.jsonl"} <= {
        path.name for path in folder.iterdir()
    }


def test_all_blocks_are_read() -> None:
    """Each command is found, and those that the test treats in another way are in the README still."""
    assert len(commands()) == len(re.findall(r"^(?:\$ )?(?:onnxtools|make) ", README, re.M)) and {
        *NOT_HERE,
        FIRST_ON_SMALL,
    } <= {*commands()}


@pytest.mark.parametrize("command", commands())
def test_a_command_runs_word_for_word(command: str, folder: Path) -> None:
    if command in NOT_HERE:
        pytest.skip(NOT_HERE[command])
    if LAMBADA in command:
        with present(SHARED / "data" / LAMBADA).open(encoding="utf-8") as rows:
            (folder / LAMBADA).write_text("".join(islice(rows, ROWS)), encoding="utf-8")
    if command == FIRST_ON_SMALL and not os.environ.get("ONNXTOOLS_README_WHOLE"):
        typed(SMALL, folder)
    typed(command, folder)


def typed(command: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
