"""A pass's fields are its options: in Python, in recipes and on the command line alike."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any, Literal

import click
import pytest

from onnxtools.base import registry
from onnxtools.base.errors import UsageError
from onnxtools.base.options import option
from onnxtools.cli.passes import pass_command
from onnxtools.pipeline.passbase import Pass, PassResult, load_pass


@dataclass(frozen=True)
class Sample(Pass):
    """One option of each kind."""

    name = "sample"

    flag: bool = option(False, "A switch.")
    count: int = option(3, "A number.")
    ratio: float = option(0.5, "A fraction.")
    kind: Literal["a", "b"] = option("a", "A choice.")
    word: str | None = option(None, "A word.")
    many: tuple[str, ...] = option((), "Words.")


GOOD: list[tuple[dict[str, Any], str, Any]] = [
    ({"flag": True}, "flag", True),
    ({"count": 7}, "count", 7),
    ({"ratio": 2}, "ratio", 2.0),
    ({"ratio": 0.25}, "ratio", 0.25),
    ({"kind": "b"}, "kind", "b"),
    ({"word": None}, "word", None),
    ({"word": "x"}, "word", "x"),
    ({"many": ["x", "y"]}, "many", ("x", "y")),
    ({"many": "x"}, "many", ("x",)),
]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"flag": 1}, "flag"),
    ({"flag": "yes"}, "flag"),
    ({"count": True}, "count"),
    ({"count": 1.5}, "count"),
    ({"count": "3"}, "count"),
    ({"count": None}, "count"),
    ({"ratio": "x"}, "ratio"),
    ({"ratio": True}, "ratio"),
    ({"kind": "c"}, "a, b"),
    ({"many": [1]}, "many"),
    ({"colour": 1}, "colour"),
    ({"word": 5}, "word"),
]


@pytest.mark.parametrize(("given", "name", "expected"), GOOD)
def test_plain_data_becomes_fields(given: dict[str, Any], name: str, expected: Any) -> None:
    made = getattr(Sample.from_options(given), name)
    assert made == expected and type(made) is type(expected)


@pytest.mark.parametrize(("given", "named"), BAD)
def test_a_wrong_option_is_a_usage_error_that_names_it(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Sample.from_options(given)


def test_options_print_and_parse_back() -> None:
    made = Sample(flag=True, count=9, many=("x", "y"))
    assert Sample.from_options(made.options()) == made
    assert made.options()["many"] == ["x", "y"]


def test_dashes_and_underscores_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = load_pass("convert")
    assert convert.from_options({"fold-weights": False}) == convert.from_options({"fold_weights": False})


def test_a_pass_cannot_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Sample().count = 4  # type: ignore[misc]


def test_mutable_defaults_are_refused() -> None:
    with pytest.raises(TypeError, match="immutable"):
        option([], "x")


def test_a_pass_without_apply_says_so() -> None:
    with pytest.raises(NotImplementedError):
        Pass().apply(None)  # type: ignore[arg-type]
    assert Sample().expand() == [Sample()] and PassResult(False, 0).notes == []


@pytest.mark.parametrize("name", sorted(registry.names()))
def test_every_field_is_a_command_line_option_with_help(name: str) -> None:
    command = pass_command(name)
    switches = {
        switch for parameter in command.params if isinstance(parameter, click.Option) for switch in parameter.opts
    }
    for field in fields(load_pass(name)):
        assert f"--{field.name.replace('_', '-')}" in switches
        assert field.metadata["help"].endswith(".")


@pytest.mark.parametrize("name", sorted(registry.names()))
def test_every_pass_has_rules_an_example_and_its_own_name(name: str) -> None:
    found = load_pass(name)
    assert found.name == name and f"onnxtools {name} " in found.example and found.__doc__
