"""Commands and programs of README.md and of the tutorials, word for word and in their order, in a folder with the files
that `make demo` lays out.
"""

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

PAGES = ("README.md", "docs/tutorials/tensorrt.md", "docs/tutorials/accuracy.md", "docs/tutorials/ci.md")
PROGRAMS = ("README.md", "docs/tutorials/library.md")
LAMBADA = "lambada_openai.jsonl"
ROWS = 6
"""How many rows of LAMBADA: the commands are tried, not the model."""
FIRST_ON_SMALL = "onnxtools quantize  model.onnx fp8.onnx  --fp8 --gptq --calib texts.jsonl"
SMALL = "onnxtools export --random --family llama --n-layer 2 --n-embd 128 --n-head 4 --vocab-size 49152 -o model.onnx"
"""From FIRST_ON_SMALL on model.onnx is a small model beside SmolLM2's tokenizer: GPTQ, AWQ and SparseGPT of SmolLM2
itself take ten minutes on two cores. ONNXTOOLS_README_WHOLE=1 takes SmolLM2 to the end.
"""


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a page that are shell (no language), yaml or python."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [block for name, block in fenced if name == language]


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks that are typed; the others show what is printed."""
    lines = [line.removeprefix("$ ") for block in blocks(page, "") for line in block.splitlines()]
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("onnxtools ")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A folder for each page: what one command writes the next ones read; gigabytes, so that nothing is kept."""
    made = {page: tmp_path_factory.mktemp(Path(page).stem) for page in {*PAGES, *PROGRAMS}}
    for page, folder in made.items():
        runpy.run_path(str(ROOT / "fixtures/demo.py"))["lay_out"](folder)
        for recipe in blocks(page, "yaml"):
            (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    yield made
    for folder in made.values():
        shutil.rmtree(folder)


@pytest.mark.parametrize("page", PAGES)
def test_all_commands_are_read(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert 0 < len(commands(page)) == len(re.findall(r"^(?:\$ )?onnxtools ", text, re.M))


def test_the_small_model_comes_in() -> None:
    assert FIRST_ON_SMALL in commands("docs/tutorials/accuracy.md")


@pytest.mark.parametrize(("page", "command"), [(page, command) for page in PAGES for command in commands(page)])
def test_a_command_runs_word_for_word(page: str, command: str, folders: dict[str, Path]) -> None:
    folder = folders[page]
    if LAMBADA in command:
        with present(SHARED / "data" / LAMBADA).open(encoding="utf-8") as rows:
            (folder / LAMBADA).write_text("".join(islice(rows, ROWS)), encoding="utf-8")
    if command == FIRST_ON_SMALL and not os.environ.get("ONNXTOOLS_README_WHOLE"):
        typed(SMALL, folder)
    typed(command, folder)


@pytest.mark.parametrize("page", PROGRAMS)
def test_the_programs_of_a_page_run(page: str, folders: dict[str, Path]) -> None:
    program = "\n".join(blocks(page, "python"))
    assert program
    done = subprocess.run([sys.executable, "-c", program], cwd=folders[page], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
