"""Shapes text, derived profiles, and what is refused before a build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxtools.analysis.cache import positions
from onnxtools.base.errors import JobError, UsageError
from onnxtools.engines.build.profiles import Profile, derive_profiles, parse_shapes, profiles_for
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.ir.model import Model
from tests.engines.graphs import FIXTURES, HALF, INT64, helper, linear, random, tensor, weights, write
from tests.support import refuse, succeed

SHAPES = (
    "--min-shapes",
    "input_ids:1x1,position_ids:1x1",
    "--opt-shapes",
    "input_ids:1x2,position_ids:1x2",
    "--max-shapes",
    "input_ids:1x4,position_ids:1x4",
)


def decoder(path: Path, cache: bool, names: tuple[str, str, str] = ("batch", "sequence", "past_sequence")) -> Model:
    """Inputs of a decoder; with a cache, two past inputs and an attention mask over past and new."""
    batch, sequence, past = names
    inputs = [tensor("input_ids", [batch, sequence], INT64)]
    nodes = [helper.make_node("Identity", ["input_ids"], ["logits"])]
    if cache:
        inputs += [tensor("attention_mask", [batch, "total_sequence"], INT64)]
        inputs += [tensor(f"past_key_values.0.{kind}", [batch, 2, past, 8], HALF) for kind in ("key", "value")]
    write(path, nodes, inputs, [tensor("logits", [batch, sequence], INT64)])
    return Model.load(path)


def spans(profile: Profile) -> dict[str, Any]:
    return {name: (r.min, r.opt, r.max) for name, r in profile.shapes.items()}


def test_text_is_read_with_names_that_hold_colons_and_wildcards() -> None:
    found = parse_shapes("a:1x20,b:0:7,'c:1':4,past.*.key:1x8x0x64", "--min-shapes")
    assert found == {"a": (1, 20), "b:0": (7,), "c:1": (4,), "past.*.key": (1, 8, 0, 64)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input_ids:1xx2", "--min-shapes: 'input_ids:1xx2': expected a number at character 13, before 'x2'"),
        ("input_ids:", "--min-shapes: 'input_ids:': expected a number at character 11, at the end"),
        ("ids:1,pos", "--min-shapes: 'ids:1,pos': expected 'name:shape' at character 7, before 'pos'"),
        ("ids:1,:2", "--min-shapes: 'ids:1,:2': expected a name before ':' at character 7, before ':2'"),
        ("ids:1x2y", "--min-shapes: 'ids:1x2y': expected 'x' or ',' at character 8, before 'y'"),
        ("ids:-1", "--min-shapes: 'ids:-1': expected a number at character 5, before '-1'"),
        ("ids:1,ids:2", "--min-shapes: 'ids:1,ids:2': expected 'ids' only once at character 7, before 'ids:2'"),
        ("", "--min-shapes: '': expected 'name:shape' at character 1, at the end"),
    ],
)
def test_text_errors_point_at_the_character(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_shapes(text, "--min-shapes")
    assert str(caught.value) == message


def test_static_graph_has_no_profile(tmp_path: Path) -> None:
    assert derive_profiles(Model.load(linear(tmp_path / "m.onnx", (2, 3, 64))), EngineSpec()) == []


def test_graph_without_cache_has_one_profile(tmp_path: Path) -> None:
    (profile,) = derive_profiles(
        decoder(tmp_path / "m.onnx", cache=False), EngineSpec(max_batch_size=4, max_seq_len=64)
    )
    assert spans(profile) == {"input_ids": ((1, 1), (4, 32), (4, 64))}


def test_concat_cache_has_context_and_generation(tmp_path: Path) -> None:
    spec = EngineSpec(max_batch_size=4, max_seq_len=64, opt_seq_len=20)
    context, generation = derive_profiles(decoder(tmp_path / "m.onnx", cache=True), spec)
    assert (context.name, generation.name) == ("context", "generation")
    assert spans(context) == {
        "input_ids": ((1, 1), (4, 20), (4, 64)),
        "attention_mask": ((1, 1), (4, 20), (4, 64)),
        "past_key_values.0.key": ((1, 2, 0, 8), (4, 2, 0, 8), (4, 2, 0, 8)),
        "past_key_values.0.value": ((1, 2, 0, 8), (4, 2, 0, 8), (4, 2, 0, 8)),
    }
    assert spans(generation) == {
        "input_ids": ((1, 1), (4, 1), (4, 1)),
        "attention_mask": ((1, 2), (4, 21), (4, 64)),
        "past_key_values.0.key": ((1, 2, 1, 8), (4, 2, 20, 8), (4, 2, 63, 8)),
        "past_key_values.0.value": ((1, 2, 1, 8), (4, 2, 20, 8), (4, 2, 63, 8)),
    }


def test_exporters_names_of_dimensions(tmp_path: Path) -> None:
    names = ("batch_size", "sequence_length", "past_sequence_length")
    context, _ = derive_profiles(decoder(tmp_path / "m.onnx", True, names), EngineSpec(max_batch_size=1, max_seq_len=8))
    assert context.shapes["past_key_values.0.key"].max == (1, 2, 0, 8)
    plus = write(
        tmp_path / "p.onnx", [helper.make_node("Identity", ["m"], ["y"])],
        [tensor("m", ["b", "past_sequence_length + sequence_length"], INT64), tensor("past", [1, "past_len"])],
        [tensor("y", None, INT64)],
    )  # fmt: skip
    _, generation = derive_profiles(Model.load(plus), EngineSpec(max_batch_size=1, max_seq_len=8))
    assert generation.shapes["m"].max == (1, 8)


def test_token_ids_need_no_names(tmp_path: Path) -> None:
    model = decoder(tmp_path / "m.onnx", False, ("s77", "s31", ""))
    assert derive_profiles(model, EngineSpec(max_batch_size=2, max_seq_len=8))[0].shapes["input_ids"].max == (2, 8)


def test_unknown_dimension_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        JobError,
        match=r"axis 1 \(height\) of input 'x' \[batch, height, 64\] is not batch, sequence, past or total; give "
        r"--min-shapes",
    ):
        derive_profiles(Model.load(linear(tmp_path / "m.onnx", ("batch", "height", 64))), EngineSpec())


def test_a_cache_needs_two_positions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leaves no room for a cache"):
        derive_profiles(decoder(tmp_path / "m.onnx", True), EngineSpec(max_seq_len=1))


def written(model: Model, low: str, opt: str, high: str) -> list[Profile]:
    return profiles_for(model, EngineSpec(min_shapes=(low,), opt_shapes=(opt,), max_shapes=(high,)))


def test_written_profile_with_wildcard(tmp_path: Path) -> None:
    model = decoder(tmp_path / "m.onnx", True)
    rest = "attention_mask:1x{0},past_key_values.0.value:1x2x{1}x8,past_key_values.*.key:1x2x{1}x8,input_ids:1x1"
    (profile,) = written(model, rest.format(2, 1), rest.format(3, 2), rest.format(9, 8))
    assert spans(profile)["past_key_values.0.key"] == ((1, 2, 1, 8), (1, 2, 2, 8), (1, 2, 8, 8))


X = "x:1x1x64"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((X, "x:1x8x64", "x:1x4x64"), "profile 0: axis 1 of input 'x': min 1, opt 8, max 4 must not decrease"),
        (("x:1x1x32", "x:1x8x64", "x:1x8x64"), "profile 0: axis 2 of input 'x' is 64 in the graph, not 32 to 64"),
        (
            ("x:1x64", "x:1x8x64", "x:1x8x64"),
            "profile 0: min shape 1x64 has rank 2, but input 'x' is [batch, sequence, 64]",
        ),
        (("X:1x1x64", X, X), "--min-shapes: no input is named 'X'; the inputs are x"),
        (("x:1x1x64,past.*:1", X, X), "--min-shapes: no input is named 'past.*'; the inputs are x"),
        (("x*:1x1x64,*x:1x2x64", X, X), "--min-shapes: '*x' gives input 'x' a second shape; name the input itself"),
    ],
)
def test_written_profiles_are_checked(tmp_path: Path, shapes: tuple[str, str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        written(Model.load(linear(tmp_path / "m.onnx")), *shapes)
    assert str(caught.value) == message


def test_every_dynamic_input_is_covered_and_close_names_are_listed(tmp_path: Path) -> None:
    model = decoder(tmp_path / "m.onnx", True)
    with pytest.raises(
        UsageError, match=r"profile 0: dynamic input 'attention_mask' \[batch, total_sequence\] has no shapes"
    ):
        written(model, "input_ids:1x1", "input_ids:1x1", "input_ids:1x1")
    with pytest.raises(UsageError, match="--max-shapes does not give input 'input_ids'"):
        written(model, "input_ids:1x1", "input_ids:1x1", "attention_mask:1x1")
    with pytest.raises(UsageError, match="no input is named 'input_id'; did you mean input_ids"):
        written(model, "input_id:1x1", "input_ids:1x1", "input_ids:1x1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_capability": ("89",)}, "'89' is not a capability; write it as 8.9"),
        ({"compute_capability": ("8.9", "8.9")}, "name each once"),
        ({"min_shapes": ("a:1",)}, "given 1, 0 and 0 times"),
        ({"max_seq_len": 0}, "--max-seq-len is 0"),
        ({"max_batch_size": 0}, "--max-batch-size is 0"),
        ({"max_seq_len": 8, "opt_seq_len": 9}, "between 1 and the longest sequence, 8"),
        ({"builder_optimization_level": 6}, "goes from 0 to 5"),
    ],
)
def test_spec_is_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineSpec(**options)


def test_one_dimension_has_one_size(tmp_path: Path) -> None:
    """TensorRT refuses another opt in its own words, and takes other minima and maxima that overlap."""
    nodes = [helper.make_node("Add", ["a", "b"], ["y"], name="sum")]
    source = write(tmp_path / "m.onnx", nodes, [tensor("a", ["n", 4]), tensor("b", ["n", 4])], [tensor("y", ["n", 4])])
    shapes = ("--min-shapes", "a:1x4,b:1x4", "--opt-shapes", "a:2x4,b:3x4", "--max-shapes", "a:4x4,b:8x4")
    told = refuse("build", source, tmp_path / "e.engine", *shapes, code=2)
    assert "'n' is one dimension" in told and "1, 2, 4 on axis 0 of input 'a' and 1, 3, 8 on axis 0 of 'b'" in told
    succeed(
        "build", source, tmp_path / "e.engine", *shapes[:3], "a:2x4,b:2x4", *shapes[4:], "--backend", "tensorrt-rtx"
    )


@pytest.mark.parametrize(("flags", "says"), [
    (["--max-seq-len", "8", *SHAPES], "--max-seq-len is for derived profiles"),
    (["--max-batch-size", "3", *SHAPES], "--max-batch-size is for derived profiles"),
    (["--opt-seq-len", "99"], "more than the longest sequence, 64"), (["--max-seq-len", "65"], "has 64 positions"),
    (["--print-trtexec", "--backend", "tensorrt-rtx"], "--print-trtexec prints a line for trtexec"),
    (["--timing-cache", "MODEL"], "is the model or the engine"),
    (["--print-trtexec", "--tensorrt-version", ""], "is no version"),
])  # fmt: skip
def test_options_that_would_be_ignored(flags: list[str], says: str, tmp_path: Path) -> None:
    """The graph has no word of its exporter on positions: its table has 64 rows."""
    source = FIXTURES / "te_style/gpt_fp16_fp8.onnx"
    told = refuse(
        "build", source, tmp_path / "e.engine", *(str(source) if flag == "MODEL" else flag for flag in flags), code=2
    )
    assert says in told


@pytest.mark.parametrize(
    ("name", "rows"), [("rope_no_fp8", 64), ("ts_gpt_fp16", 64), ("gpt_bf16_fp8", 64), ("attention_op", None)]
)
def test_derived_profiles_end_where_the_tables_of_positions_do(name: str, rows: int | None, tmp_path: Path) -> None:
    """Sizes of the tables as their exporter's configuration has them."""
    succeed("convert", FIXTURES / f"te_style/{name}.onnx", tmp_path / "m.onnx", "--no-check")
    profile = profiles_for(Model.load(tmp_path / "m.onnx"), EngineSpec())[0]
    assert profile.shapes["input_ids"].max[1] == (rows or 1024)


def test_profiles_of_a_file_are_those_of_the_options(tmp_path: Path) -> None:
    """A manifest's own profiles can be given again; names may hold `*`."""
    source, path = FIXTURES / "te_style/gpt_fp16_fp8.onnx", tmp_path / "p.yaml"
    path.write_text("[{name: short, inputs: {'*_ids': {min: [1, 1], opt: [1, 2], max: [1, 4]}}}]")
    model = Model.load(source)
    flags = {f"{which}_shapes": (shapes,) for which, shapes in zip(("min", "opt", "max"), SHAPES[1::2], strict=True)}
    [read], [written] = profiles_for(model, EngineSpec(profiles=str(path))), profiles_for(model, EngineSpec(**flags))  # type: ignore[arg-type]
    assert read.name == "short" and read.shapes == written.shapes
    path.write_text(json.dumps([read.as_json()]))
    assert profiles_for(model, EngineSpec(profiles=str(path)))[0].shapes == read.shapes


@pytest.mark.parametrize(("text", "says"), [
    ("{", "not YAML"), ("{}", "is no list of profiles"), ("[]", "is no list of profiles"),
        ("[1]", "profile 0: needs `inputs`"),
    ("[{inputs: {input_ids: {min: [1, 1]}}}]", "needs `inputs` with min, opt and max"),
    ("[{inputs: {input_ids: {min: [1, 1], opt: [1, x], max: [1, 4]}}}]", "is [1, 'x']; write a list of numbers"),
    ("[{inputs: {inputids: {min: [1, 1], opt: [1, 1], max: [1, 4]}}}]", "did you mean input_ids"),
    ("[{inputs: {input_ids: {min: [1, 1], opt: [1, 1], max: [1, 4]}}}]",
        "'position_ids' [batch, sequence] has no shapes"),
])  # fmt: skip
def test_a_file_of_profiles_that_does_not_fit(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(text)
    told = refuse(
        "build",
        FIXTURES / "te_style/gpt_fp16_fp8.onnx",
        tmp_path / "e.engine",
        "--profiles",
        tmp_path / "p.yaml",
        code=2,
    )
    assert says in told and "p.yaml" in told
    assert "cannot be read" in refuse(
        "build", FIXTURES / "te_style/gpt_fp16_fp8.onnx", tmp_path / "e.engine", "--profiles", tmp_path / "absent"
    )


def lookup(path: Path, index: list[Any], table: tuple[int, ...], how: str) -> Model:
    """Ids, their embedding, and a table that is looked up by what `index` computes from the shape of the ids, or
    cut.
    """
    stored = weights(words=random(97, 8), table=random(*table), zero=np.array(0), one=np.array(1), last=np.array([1]),
        axis=np.array([0]),
                     two=np.array(2), first=np.array([0]), both=np.array([0, 2]), origin=np.array([0, 0]))  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["h"]), helper.make_node("Shape", ["input_ids"], ["shape"]),
        helper.make_node("Gather", ["shape", "last"], ["length"]), helper.make_node("Squeeze", ["length"], ["n"]),
        *index,
        helper.make_node(how, ["table", "i"] if how == "Gather" else ["table", "starts", "ends", "axes"], ["t"]),
        helper.make_node("ReduceMax", ["t"], ["m"], keepdims=0), helper.make_node("Add", ["h", "m"], ["y"]),
    ]  # fmt: skip
    return Model.load(
        write(
            path,
            nodes,
            [tensor("input_ids", ["batch", "sequence"], INT64)],
            [tensor("y", ["batch", "sequence", 8])],
            stored,
        )
    )


COUNT = [helper.make_node("Range", ["zero", "n", "one"], ["c"])]


@pytest.mark.parametrize(("index", "table", "how", "rows"), [
    ([*COUNT, helper.make_node("Identity", ["c"], ["i"])], (64, 8), "Gather", 64),
    ([*COUNT, helper.make_node("Add", ["c", "two"], ["i"])], (64, 8), "Gather", 62),  # OPT begins at row 2
    ([*COUNT, helper.make_node("Mul", ["c", "zero"], ["i"])], (2, 8), "Gather", None),  # token types, all 0
    ([*COUNT, helper.make_node("Min", ["c", "two"], ["i"])], (4, 8), "Gather", None),  # buckets
    ([helper.make_node("Identity", ["first"], ["starts"]), helper.make_node("Identity", ["length"], ["ends"]),
      helper.make_node("Identity", ["axis"], ["axes"])], (64, 8), "Slice", 64),
    ([helper.make_node("Identity", ["origin"], ["starts"]),
        helper.make_node("Concat", ["last", "length"], ["ends"], axis=0),
      helper.make_node("Identity", ["both"], ["axes"])], (1, 1, 512), "Slice", 512),
])  # fmt: skip
def test_only_what_counts_positions_limits_them(
    index: list[Any], table: tuple[int, ...], how: str, rows: int | None, tmp_path: Path
) -> None:
    assert positions(lookup(tmp_path / "m.onnx", index, table, how)) == rows


def test_a_slice_of_an_old_opset_is_no_table(tmp_path: Path) -> None:
    node = helper.make_node("Slice", ["w"], ["s"], axes=[0], starts=[0], ends=[2])
    nodes = [node, helper.make_node("Gather", ["s", "input_ids"], ["y"])]
    source = write(
        tmp_path / "m.onnx",
        nodes,
        [tensor("input_ids", ["batch", "sequence"], INT64)],
        [tensor("y", None)],
        weights(w=random(4, 8)),
        opset=9,
        ir=8,
    )
    assert positions(Model.load(source)) is None
