"""Optimization profiles.

They are read from trtexec's shapes text or from a file, or derived from the names of the graph's dimensions.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxtools.analysis.cache import positions, settle_sizes
from onnxtools.analysis.facts import is_past_length
from onnxtools.base.errors import JobError, UsageError
from onnxtools.base.inputs import check_regular, parse_yaml, shown
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.ir.model import Model

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """The shapes that an input may have in a profile, from `min` to `max`; the engine is tuned for `opt`."""

    min: Shape
    opt: Shape
    max: Shape


@dataclass(frozen=True)
class Profile:
    """One optimization profile: a range for every dynamic input, by input name."""

    name: str
    shapes: Mapping[str, Range]

    def as_json(self) -> dict[str, Any]:
        """The entry of the manifest: `name`, and min, opt and max of each of the `inputs`."""
        ranges = {name: {"min": list(r.min), "opt": list(r.opt), "max": list(r.max)} for name, r in self.shapes.items()}
        return {"name": self.name, "inputs": ranges}


def profiles_for(model: Model, spec: EngineSpec) -> list[Profile]:
    """The profiles to build with, checked against the graph's inputs; none for a graph whose inputs are all static.

    Raises:
        UsageError: the given shapes do not fit the graph.
        JobError: no shapes were given and the names of the dimensions do not tell their roles, or the file of profiles
            cannot be read.
    """
    settle_sizes(model)
    if spec.min_shapes:
        return _written_profiles(model, spec)
    if spec.profiles is not None:
        return _read_profiles(model, Path(spec.profiles))
    return derive_profiles(model, spec)


def parse_shapes(text: str, option: str) -> dict[str, Shape]:
    """`name:1x8,other:4` as a mapping; names may hold `*`.

    Raises:
        UsageError: names the option and the character (counted from 1) where the text goes wrong.
    """
    shapes: dict[str, Shape] = {}
    start = 0
    for entry in text.split(","):
        colon = entry.rfind(":")
        if colon <= 0:
            expected = "a name before ':'" if colon == 0 else "'name:shape'"
            raise _syntax_error(option, text, start, expected)
        name, position, dims = entry[:colon], start + colon + 1, []
        for part in entry[colon + 1 :].split("x"):
            if not re.fullmatch(r"[0-9]+", part):
                bad = len(part) - len(part.lstrip("0123456789"))
                raise _syntax_error(option, text, position + bad, "'x' or ','" if bad else "a number")
            dims.append(int(part))
            position += len(part) + 1
        if len(name) > 2 and name[0] == name[-1] == "'":  # trtexec's help quotes names that hold ':'
            name = name[1:-1]
        if name in shapes:
            raise _syntax_error(option, text, start, f"{shown(name)} only once")
        shapes[name] = tuple(dims)
        start += len(entry) + 1
    return shapes


def _syntax_error(option: str, text: str, index: int, expected: str) -> UsageError:
    place = f"before {shown(text[index:])}" if index < len(text) else "at the end"
    return UsageError(f"{option}: {shown(text)}: expected {expected} at character {index + 1}, {place}")


def _inputs(model: Model) -> dict[str, ir.Value]:
    return {value.name or "": value for value in model.graph.inputs if not value.is_initializer()}


def is_dynamic(value: ir.Value) -> bool:
    """Whether a dimension is known only at run time; an input of unknown rank counts."""
    return value.shape is None or not all(isinstance(dim, int) for dim in value.shape)


_OPTIONS = ("--min-shapes", "--opt-shapes", "--max-shapes")


def _written_profiles(model: Model, spec: EngineSpec) -> list[Profile]:
    inputs, profiles = _inputs(model), []
    for index, texts in enumerate(zip(spec.min_shapes, spec.opt_shapes, spec.max_shapes, strict=True)):
        shapes = [parse_shapes(text, option) for text, option in zip(texts, _OPTIONS, strict=True)]
        profiles.append(_checked_profile(f"profile{index}", f"profile {index}", shapes, _OPTIONS, inputs))
    return profiles


def _read_profiles(model: Model, path: Path) -> list[Profile]:
    """The profiles of a YAML or JSON file; names of inputs may hold `*`.

    The file holds `[{name: context, inputs: {input_ids: {min: [1, 1], opt: [8, 64], max: [8, 128]}, ...}}, ...]`.
    """
    try:
        check_regular(path, JobError)
        entries = parse_yaml(path.read_bytes())
    except OSError as error:
        raise JobError(f"--profiles {path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise UsageError(f"--profiles {path}: not YAML that is read ({error}); correct the file") from None
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"--profiles {path}: is no list of profiles; write it as the manifest of an engine has them")
    inputs, profiles = _inputs(model), []
    for index, entry in enumerate(entries):
        where = f"--profiles {path}: profile {index}"
        spans = entry.get("inputs") if isinstance(entry, dict) else None
        if not isinstance(spans, dict) or not all(
            isinstance(span, dict) and set(span) == {"min", "opt", "max"} for span in spans.values()
        ):
            raise UsageError(f"{where}: needs `inputs` with min, opt and max of each")
        shapes = [
            {str(name): _dims(where, name, span[bound]) for name, span in spans.items()}
            for bound in ("min", "opt", "max")
        ]
        name = str(entry.get("name", f"profile{index}"))
        profiles.append(_checked_profile(name, where, shapes, (where,) * 3, inputs))
    return profiles


def _dims(where: str, name: Any, dims: Any) -> Shape:
    if not isinstance(dims, list) or not all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in dims
    ):
        raise UsageError(f"{where}: a shape of {shown(name)} is {shown(dims)}; write a list of numbers, as [8, 64]")
    return tuple(dims)


def _checked_profile(
    name: str, where: str, shapes: Sequence[dict[str, Shape]], options: Sequence[str], inputs: Mapping[str, ir.Value]
) -> Profile:
    """The checked profile of the min, opt and max shapes in `shapes`; `options` name them in errors."""
    resolved = [_resolve(by_name, option, inputs) for by_name, option in zip(shapes, options, strict=True)]
    for key in {key: None for by_name in resolved for key in by_name}:
        for option, by_name in zip(options, resolved, strict=True):
            if key not in by_name:
                raise UsageError(f"{where}: {option} does not give input {key!r}, which the other shapes give; add it")
    low, opt, high = resolved
    ranges = {key: Range(low[key], opt[key], high[key]) for key in low}
    check_profile(where, ranges, inputs)
    _check_symbols(where, ranges, inputs)
    return Profile(name, ranges)


def _resolve(shapes: dict[str, Shape], option: str, inputs: Mapping[str, ir.Value]) -> dict[str, Shape]:
    """Shapes by input name: exact names first, then `*` patterns for inputs not named exactly."""
    resolved = {name: shape for name, shape in shapes.items() if name in inputs}
    for pattern, shape in shapes.items():
        if pattern in inputs:
            continue
        expression = ".*".join(map(re.escape, pattern.split("*")))
        matches = [name for name in inputs if "*" in pattern and re.fullmatch(expression, name)]
        if not matches:
            close = difflib.get_close_matches(pattern, inputs, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"the inputs are {', '.join(inputs) or 'none'}"
            raise UsageError(f"{option}: no input is named {pattern!r}; {hint}")
        for name in matches:
            if name not in shapes and resolved.setdefault(name, shape) != shape:
                raise UsageError(f"{option}: {pattern!r} gives input {name!r} a second shape; name the input itself")
    return resolved


def check_profile(where: str, ranges: Mapping[str, Range], inputs: Mapping[str, ir.Value]) -> None:
    """Refuse a profile that does not fit the inputs.

    Raises:
        UsageError: names the input, the axis and the values.
    """
    for name, value in inputs.items():
        if name not in ranges and is_dynamic(value):
            raise UsageError(f"{where}: dynamic input {name!r} {_text(value)} has no shapes; add its min, opt and max")
    for name, span in ranges.items():
        dims = inputs[name].shape
        for label, shape in (("min", span.min), ("opt", span.opt), ("max", span.max)):
            if dims is not None and len(shape) != len(dims):
                text = f"{label} shape {'x'.join(map(str, shape))}"
                raise UsageError(f"{where}: {text} has rank {len(shape)}, but input {name!r} is {_text(inputs[name])}")
        if len({len(span.min), len(span.opt), len(span.max)}) > 1:
            raise UsageError(
                f"{where}: min, opt and max shape of input {name!r} differ in rank; give all three the same rank"
            )
        for axis, (low, opt, high) in enumerate(zip(span.min, span.opt, span.max, strict=True)):
            if high > _LARGEST:
                raise UsageError(f"{where}: axis {axis} of input {name!r}: {high} is beyond TensorRT's {_LARGEST}")
            if not low <= opt <= high:
                raise UsageError(
                    f"{where}: axis {axis} of input {name!r}: min {low}, opt {opt}, max {high} must not decrease"
                )
            fixed = dims[axis] if dims is not None else None
            if isinstance(fixed, int) and not low == high == fixed:
                raise UsageError(f"{where}: axis {axis} of input {name!r} is {fixed} in the graph, not {low} to {high}")


def _check_symbols(where: str, ranges: Mapping[str, Range], inputs: Mapping[str, ir.Value]) -> None:
    """Refuse different ranges for dimensions of one name.

    They have the same size in every run: TensorRT demands the same opt, and a size that all ranges hold.
    """
    first: dict[str, tuple[str, int, Span]] = {}
    for name, span in ranges.items():
        for axis, dim in enumerate(inputs[name].shape or ()):
            if isinstance(dim, int) or not dim.value:
                continue
            sizes = (span.min[axis], span.opt[axis], span.max[axis])
            first_name, first_axis, first_sizes = first.setdefault(dim.value, (name, axis, sizes))
            if sizes[1] != first_sizes[1] or max(sizes[0], first_sizes[0]) > min(sizes[2], first_sizes[2]):
                raise UsageError(
                    f"{where}: {dim.value!r} is one dimension, but min, opt and max are "
                    f"{', '.join(map(str, first_sizes))} on axis {first_axis} of input {first_name!r}"
                    f" and {', '.join(map(str, sizes))} on axis {axis} of {name!r}; give both the same"
                )


_LARGEST = 2**31 - 1
"""A dimension is a 32-bit number in TensorRT's parser and builder."""


def _text(value: ir.Value) -> str:
    if value.shape is None:
        return "of unknown rank"
    return "[" + ", ".join(str(d) if isinstance(d, int) else d.value or "?" for d in value.shape) + "]"


def _longest(model: Model, spec: EngineSpec) -> int:
    """The longest sequence in tokens: `spec.longest`, or else the model's positions, at most 1024.

    Raises:
        UsageError: more than the model's positions.
    """
    limit = positions(model)
    if spec.longest is None:
        return min(limit or _USUAL, _USUAL)
    if limit is not None and spec.longest > limit:
        raise UsageError(
            f"{model.path}: has {limit} positions, and sequences of {spec.longest} are asked for; lower --max-seq-len"
        )
    if spec.longest > _LARGEST:
        raise UsageError(f"sequences of {spec.longest} are beyond TensorRT's {_LARGEST}; lower --max-seq-len")
    return spec.longest


_USUAL = 1024
"""Longest sequence, in tokens, of derived profiles if none is given."""

Span = tuple[int, int, int]
"""(min, opt, max) of one dimension."""


def derive_profiles(model: Model, spec: EngineSpec) -> list[Profile]:
    """Profiles that are derived from the names of the input dimensions.

    A static graph needs none. Without a cache there is one, sequence 1..max. With a cache that grows by Concat (an
    input with a `past` dimension) there are two: `context` (past 0, sequence 1..max) and `generation` (sequence 1, past
    1..max-1). `total_sequence` is past + sequence throughout.

    Raises:
        UsageError: the sizes in `spec` do not fit each other or the model.
        JobError: a dynamic dimension is none of batch, sequence, past and total.
    """
    inputs = {name: value for name, value in _inputs(model).items() if is_dynamic(value)}
    if not inputs:
        return []
    longest = _longest(model, spec)
    if spec.opt_seq_len is not None and spec.opt_seq_len > longest:
        raise UsageError(
            f"--opt-seq-len {spec.opt_seq_len} is more than the longest sequence, {longest}; lower it, or give "
            "--max-seq-len"
        )
    batch = (1, spec.opt_batch_size or spec.max_batch_size, spec.max_batch_size)
    prompt = spec.max_input_len or longest
    tuned = spec.opt_seq_len or max(1, longest // 2)
    context = (1, min(tuned, prompt), prompt)
    roles = {name: _roles(value) for name, value in inputs.items()}
    if not any("past" in axis_roles for axis_roles in roles.values()):
        return [_profile("sequence", inputs, roles, {"batch": batch, "past": (0, 0, 0), "sequence": context})]
    if longest < 2:
        raise UsageError("a longest sequence of 1 leaves no room for a cache; give --max-seq-len 2 or more")
    past = (1, min(tuned, longest - 1), longest - 1)
    return [
        _profile("context", inputs, roles, {"batch": batch, "past": (0, 0, 0), "sequence": context}),
        _profile("generation", inputs, roles, {"batch": batch, "past": past, "sequence": (1, 1, 1)}),
    ]


def _profile(
    name: str, inputs: Mapping[str, ir.Value], roles: Mapping[str, list[str]], spans: dict[str, Span]
) -> Profile:
    total: list[int] = [a + b for a, b in zip(spans["past"], spans["sequence"], strict=True)]
    sizes: dict[str, list[int]] = {**{role: list(span) for role, span in spans.items()}, "total": total}

    def shape(value: ir.Value, bound: int) -> Shape:
        assert value.shape is not None
        axis_roles = roles[value.name or ""]
        return tuple(d if isinstance(d, int) else sizes[axis_roles[axis]][bound] for axis, d in enumerate(value.shape))

    return Profile(
        name, {key: Range(shape(value, 0), shape(value, 1), shape(value, 2)) for key, value in inputs.items()}
    )


_ROLES: list[tuple[str, Callable[[str], bool]]] = [
    ("total", lambda name: "total" in name or (is_past_length(name) and ("+" in name or "plus" in name))),
    ("past", is_past_length),
    ("batch", lambda name: "batch" in name),
    ("sequence", lambda name: "max" not in name and ("seq" in name or "length" in name)),
]


_BATCHES = ("n", "b", "bs", "batches")
"""Names of axis 0 in models of images."""
_GIVE = "give --min-shapes, --opt-shapes and --max-shapes"


def _roles(value: ir.Value) -> list[str]:
    """The role of each dimension: batch, sequence, past, total, or '' if it is static."""
    if value.shape is None:
        raise JobError(f"input {value.name!r} has no shape to derive profiles from; {_GIVE}")
    ids = len(value.shape) == 2 and value.dtype in (ir.DataType.INT64, ir.DataType.INT32)
    roles = []
    for axis, dim in enumerate(value.shape):
        name = "" if isinstance(dim, int) else (dim.value or "").lower()
        role = next((role for role, matches in _ROLES if matches(name)), "")
        if not role and axis == 0 and name in _BATCHES:
            role = "batch"
        if not role and not isinstance(dim, int):
            if not ids:
                place = f"axis {axis} ({name or 'unnamed'}) of input {value.name!r} {_text(value)}"
                raise JobError(f"{place} is not batch, sequence, past or total; {_GIVE}")
            role = ("batch", "sequence")[axis]
        roles.append(role)
    return roles
