"""YAML of bounded size, regular files alone, values shown short."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.inputs import check_regular, parse_yaml, shown
from onnxtools.base.jsonl import read_jsonl
from onnxtools.cli.recipe import read_recipe
from onnxtools.pipeline.recipe_file import read_yaml


def tower(levels: int, width: int = 8, kind: str = "list") -> str:
    """Each level holds the one below `width` times, through aliases."""
    lines = ["l0: &l0 [x]" if kind == "list" else "l0: &l0 {x: 1}"]
    for level in range(1, levels):
        below = ", ".join([f"*l{level - 1}"] * width)
        lines.append(
            f"l{level}: &l{level} [{below}]"
            if kind == "list"
            else f"l{level}: &l{level} {{<<: [{below}], k{level}: 1}}"
        )
    return "\n".join(lines)


@pytest.mark.parametrize("text", [
    "a: 1\nb: [2, {c: 3.5}]", "base: &b {x: 1, y: 2}\nother:\n  <<: *b\n  y: 3", "a: &a [1, 2]\nb: *a", "", "~",
    "2026-01-31", "on: off",
    "!!set {a, b}", "- 0x1F\n- 1_000\n- 12:30:45", "text: |\n  two\n  lines",
])  # fmt: skip
def test_ordinary_documents_are_what_pyyaml_reads(text: str) -> None:
    assert parse_yaml(text) == yaml.safe_load(text)


BOMBS = {
    "lists": tower(30), "merges": tower(30, kind="merge"), "itself": "a: &a [*a]",
    "a tag that is code": "!!python/object/apply:os.getcwd []",
    "unknown tag": "!x 1", "an empty integer": '!!int ""', "a date that is none": "!!timestamp noon",
    "a boolean that is none": "!!bool perhaps",
    "a huge integer": "9" * 6000, "a huge sexagesimal": "1" + ":1" * 3000, "deep": "[" * 50_000,
        "two documents": "a: 1\n---\nb: 2",
    "large": "a: " + "x" * 300_000, "no text": "\x00", "keys": "? [a, {b: c}]\n: 1",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_other_documents_are_refused_at_once_in_a_short_line(name: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        parse_yaml(BOMBS[name])
    assert time.monotonic() - start < 5 and len(str(error.value)) < 200
    (tmp_path / "r.yaml").write_text(BOMBS[name])
    for read in (read_recipe, lambda path: read_yaml(path, "a recipe")):
        with pytest.raises(UsageError) as usage:
            read(tmp_path / "r.yaml")
        assert len(str(usage.value)) < 400


def test_values_are_shown_in_a_few_words() -> None:
    shared: Any = ["x"]
    for _ in range(200):
        shared = [shared, shared]
    for value in (list(range(10**6)), {"a": [[[["deep"] * 9] * 9] * 9] * 9}, "x" * 10**6, 10**6000, shared):
        assert len(shown(value)) <= 120
    for value in ("a", None, 1.5, ["a", 2], {"opset": [19]}):
        assert shown(value) == repr(value)


def test_what_is_no_file_is_refused_by_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    (tmp_path / "l").symlink_to("/dev/zero")
    (tmp_path / "f").write_text("{}")
    (tmp_path / "to_f").symlink_to("f")
    for name, what in (("p", "a pipe"), ("l", "a device"), (".", "a folder")):
        with pytest.raises(JobError, match=f"is {what}, not a file"):
            check_regular(tmp_path / name, JobError)
        with pytest.raises(JobError, match=f"is {what}"):
            read_jsonl(tmp_path / name)
        with pytest.raises(UsageError, match=f"is {what}"):
            read_recipe(tmp_path / name)
    check_regular(tmp_path / "to_f", JobError)


def test_lines_of_json_are_read_as_far_as_they_are_wanted(tmp_path: Path) -> None:
    """Line separators inside JSON strings are text; lines after the last that is wanted are not looked at."""
    (tmp_path / "d.jsonl").write_text(
        '\ufeff{"a": "x\u2028y\x85z"}\r\n\n{"a": 2}\nno JSON\n', encoding="utf-8", newline=""
    )
    assert read_jsonl(tmp_path / "d.jsonl", 2) == [(1, {"a": "x\u2028y\x85z"}), (3, {"a": 2})]
    with pytest.raises(JobError, match=r"d\.jsonl:4: is not JSON"):
        read_jsonl(tmp_path / "d.jsonl")


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxtools.base.jsonl.MAX_LINE", 1000)
    (tmp_path / "d.jsonl").write_text('{"a": "' + "x" * 5000 + '"}\n')
    with pytest.raises(JobError, match=r"d\.jsonl:1: has more than 1000 characters"):
        read_jsonl(tmp_path / "d.jsonl")
