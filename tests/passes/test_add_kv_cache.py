"""`add-kv-cache`: a full run and an incremental run give the same logits, for every family of attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.conftest import Make
from tests.support import (
    E4M3,
    FLOAT,
    FP8,
    HALF,
    HALF_PRECISION,
    INT64,
    MX,
    NO_ATTENTION,
    STATIC,
    STYLE,
    TE,
    Array,
    Case,
    Feeds,
    Session,
    decode,
    dims,
    info,
    max_abs,
    normal,
    refuse,
    rel_l2,
    run,
    splits,
    stored,
    succeed,
    write,
)

CURRENT = "gpt_current_scaling"
FAMILIES = [name for name in (*TE, *STYLE) if name not in (*NO_ATTENTION, *MX)]
EXACT = [name for name in FAMILIES if name not in (*HALF_PRECISION, CURRENT)]
DYNAMIC = [name for name in EXACT if name not in STATIC]
TOLERANCE = 1e-5


def kept(case: Case, logits: Array) -> Array:
    """Logits of real tokens: what a padded position computes means nothing."""
    mask = case.feeds.get("attention_mask")
    return logits if mask is None else logits[mask.astype(bool)]


def full(path: Path, feeds: Feeds) -> Array:
    return Session(path)(feeds)["logits"]


def caches(path: Path, kind: str = "input") -> dict[str, tuple[int, list[int | str]]]:
    graph = onnx.load(path, load_external_data=False).graph
    values = [v for v in getattr(graph, kind) if "key_values" in v.name or v.name.startswith("present")]
    return {v.name: (v.type.tensor_type.elem_type, dims(v)) for v in values}


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXACT, indirect=True)
def test_decoding_equals_the_full_run(case: Case, converted: Make, cached: Make) -> None:
    session, expected = Session(cached(case.name)), kept(case, full(converted(case.name), case.feeds))
    for steps in splits(case.sequence):
        assert max_abs(kept(case, decode(session, case.feeds, steps)), expected) <= TOLERANCE, steps


@pytest.mark.parametrize("case", EXACT, indirect=True)
def test_decoding_equals_the_exporters_numbers(case: Case, cached: Make) -> None:
    logits = decode(Session(cached(case.name)), case.feeds, [5, *[1] * (case.sequence - 5)])
    assert rel_l2(kept(case, logits), kept(case, case.expected)) <= case.tolerance


@pytest.mark.parametrize("case", HALF_PRECISION, indirect=True)
def test_sixteen_bit_decoding_stays_within_the_noise(case: Case, cached: Make) -> None:
    session = Session(cached(case.name))
    for steps in splits(case.sequence):
        assert rel_l2(decode(session, case.feeds, steps), case.expected) <= case.tolerance, steps


def other_feeds(batch: int, sequence: int) -> Feeds:
    ids = np.random.default_rng(3).integers(0, 128, (batch, sequence))
    places = np.broadcast_to(np.arange(sequence), (batch, sequence)).copy()
    return {"input_ids": ids, "position_ids": places, "attention_mask": np.ones((batch, sequence), np.int64)}


@pytest.mark.parametrize(("batch", "sequence"), [(3, 9), (1, 23), (1, 1)])
@pytest.mark.parametrize("case", DYNAMIC, indirect=True)
def test_other_batches_and_lengths(case: Case, batch: int, sequence: int, converted: Make, cached: Make) -> None:
    feeds = other_feeds(batch, sequence)
    session, expected = Session(cached(case.name)), full(converted(case.name), feeds)
    for steps in [s for s in splits(sequence) if all(s)]:
        assert max_abs(decode(session, feeds, steps), expected) <= TOLERANCE, steps


@pytest.mark.parametrize("case", STATIC, indirect=True)
def test_a_static_export_becomes_dynamic(case: Case, cached: Make) -> None:
    """Three rows instead of two, and fewer tokens: a causal model's logits of a prefix are those of the whole."""
    rows, length = [1, 0, 1], case.sequence - 3
    feeds = {name: array[rows, :length] for name, array in case.feeds.items()}
    session = Session(cached(case.name))
    assert dims(session.inputs["input_ids"]) == ["batch", "sequence"]
    for steps in splits(length):
        assert max_abs(decode(session, feeds, steps), case.expected[rows, :length]) <= TOLERANCE, steps


def test_current_scaling_prefill_is_equal_and_decoding_is_warned_of(converted: Make, tmp_path: Path) -> None:
    case = Case(CURRENT)
    result = succeed("add-kv-cache", converted(CURRENT), tmp_path / "kv.onnx")
    assert "warning" in result.out and "current scaling" in result.out
    assert (
        max_abs(
            decode(Session(tmp_path / "kv.onnx"), case.feeds, [case.sequence]), full(converted(CURRENT), case.feeds)
        )
        <= TOLERANCE
    )


def test_a_window_really_hides_old_keys(cached: Make) -> None:
    """With a window of four, the first token cannot reach the last logits of two layers more than six places away."""
    case, session = Case("window"), Session(cached("window"))
    feeds = {name: array.copy() for name, array in case.feeds.items()}
    feeds["input_ids"][:, 0] = (feeds["input_ids"][:, 0] + 1) % 128
    a, b = (decode(session, f, [4, *[1] * 8]) for f in (case.feeds, feeds))
    assert max_abs(a[:, :4], b[:, :4]) > 1e-3
    assert max_abs(a[:, 7:], b[:, 7:]) <= TOLERANCE


def test_left_padding_gives_the_unpadded_rows(cached: Make) -> None:
    """Each padded row, decoded in steps, equals the same tokens without padding."""
    case, session = Case("padding_mask"), Session(cached("padding_mask"))
    row, mask = -1, case.feeds["attention_mask"][-1].astype(bool)
    assert not mask.all()
    logits = decode(session, case.feeds, [6, *[1] * 6])[row][mask]
    alone = {name: array[row:][:, mask] for name, array in case.feeds.items()}
    assert max_abs(logits, decode(session, alone, [int(mask.sum())])[0]) <= TOLERANCE


# --- options ----------------------------------------------------------------------------------------------------------

OPTIONS = [
    ["--policy", "new"],
    ["--layout", "sbnh"],
    ["--naming", "nemo"],
    ["--policy", "new", "--layout", "sbnh", "--naming", "nemo"],
    ["--dtype", "fp32"],
]


@pytest.mark.parametrize("flags", OPTIONS, ids=" ".join)
@pytest.mark.parametrize(
    "case",
    ["te_gpt_fp8_ds_dyn", "rms_swiglu_gqa_rope", "mqa_srelu_zcg", "padding_mask", "ts_swiglu_rms_fp32", *STATIC],
    indirect=True,
)
def test_layouts_policies_and_names(case: Case, flags: list[str], converted: Make, cached: Make) -> None:
    path = cached(case.name, *flags)
    expected = kept(case, full(converted(case.name), case.feeds))
    for steps in ([5, *[1] * (case.sequence - 5)], [case.sequence]):
        assert max_abs(kept(case, decode(Session(path), case.feeds, steps)), expected) <= TOLERANCE
    onnx.checker.check_model(str(path), full_check=True)


KV = {
    "te_gpt_fp8_ds_dyn": (4, 32),
    "rms_swiglu_gqa_rope": (2, 16),
    "mqa_srelu_zcg": (1, 16),
    "sdpa_gqa": (2, 16),
    "attention_op": (2, 16),
    "rope_no_fp8": (2, 16),
}


@pytest.mark.parametrize(("name", "kv"), KV.items())
def test_the_cache_holds_kv_heads(name: str, kv: tuple[int, int], cached: Make) -> None:
    expected = {
        f"past_key_values.{layer}.{kind}": (FLOAT, ["batch", kv[0], "past_sequence", kv[1]])
        for layer in range(2)
        for kind in ("key", "value")
    }
    assert caches(cached(name)) == expected


def test_names_and_shapes_of_every_option(cached: Make) -> None:
    name = "rms_swiglu_gqa_rope"
    whole = ["batch", 2, "total_sequence", 16]
    assert list(caches(cached(name), "output")) == [
        "present.0.key",
        "present.0.value",
        "present.1.key",
        "present.1.value",
    ]
    assert caches(cached(name), "output")["present.1.key"] == (FLOAT, whole)
    new = cached(name, "--policy", "new", "--layout", "sbnh", "--naming", "nemo")
    assert caches(new)["past_key_values.1.decoder.value"] == (FLOAT, ["past_sequence", "batch", 2, 16])
    assert caches(new, "output")["new_key_values.1.decoder.value"] == (FLOAT, ["sequence", "batch", 2, 16])
    nemo = cached(name, "--naming", "nemo")
    assert "present_key_values.0.decoder.key" in caches(nemo, "output")


@pytest.mark.parametrize("policy", ["concat", "new"])
@pytest.mark.parametrize(("dtype", "element", "numpy_type"), [("fp8", E4M3, FP8), ("fp16", HALF, np.float16)])
@pytest.mark.parametrize("case", ["te_gpt_none_dyn", "rope_no_fp8", "gpt_fp16_fp8"], indirect=True)
def test_stored_element_types(
    case: Case, dtype: str, element: int, numpy_type: type, policy: str, converted: Make, cached: Make
) -> None:
    """Every split gives what the prefill gives: old and new tokens are rounded alike.

    Rounding costs what the type costs.
    """
    path = cached(case.name, "--dtype", dtype, "--policy", policy)
    assert {kind for kind, _ in (*caches(path).values(), *caches(path, "output").values())} == {element}
    session, expected = Session(path), full(converted(case.name), case.feeds)
    prefill = decode(session, case.feeds, [case.sequence])
    assert rel_l2(prefill, expected) <= (0.12 if dtype == "fp8" else max(2e-3, case.tolerance * 2))
    for steps in splits(case.sequence)[1:]:
        assert rel_l2(decode(session, case.feeds, steps), prefill) <= max(
            1e-5, case.tolerance * (case.name in HALF_PRECISION)
        ), steps


def test_an_fp8_cache_holds_the_rounded_keys(cached: Make) -> None:
    """Stored bits = the fp32 cache, divided by the scale and rounded by ml_dtypes."""
    case, scale = Case("rope_no_fp8"), 0.125
    empty = {
        f"past_key_values.{layer}.{kind}": np.zeros((2, 2, 0, 16), np.float32)
        for layer in range(2)
        for kind in ("key", "value")
    }
    wide = Session(cached("rope_no_fp8"))({**case.feeds, **empty})
    narrow = Session(cached("rope_no_fp8", "--dtype", "fp8", "--kv-scale", str(scale)))(
        {**case.feeds, **{k: v.astype(FP8) for k, v in empty.items()}}
    )
    expected = np.clip(wide["present.0.key"] / np.float32(scale), -448, 448).astype(FP8)
    assert narrow["present.0.key"].tobytes() == expected.tobytes()


def test_bf16_cache_has_its_type(cached: Make) -> None:
    assert {kind for kind, _ in caches(cached("gpt_bf16_fp8")).values()} == {TensorProto.BFLOAT16}


def test_position_ids_stay_inputs(cached: Make) -> None:
    assert [v.name for v in onnx.load(cached("te_gpt_fp8_ds_dyn")).graph.input][:2] == ["input_ids", "position_ids"]
    assert [v.name for v in onnx.load(cached("rms_swiglu_gqa_rope")).graph.input][:1] == ["input_ids"]


def test_a_mask_input_spans_the_total_length(cached: Make) -> None:
    value = Session(cached("padding_mask")).inputs["attention_mask"]
    assert dims(value) == ["batch", "total_sequence"]


@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_the_graph_passes_the_checker(case: Case, cached: Make) -> None:
    onnx.checker.check_model(str(cached(case.name)), full_check=True)


def test_all_layers_are_reported(converted: Make, tmp_path: Path) -> None:
    assert (
        "2 attention blocks found, 2 kv heads of 16"
        in succeed("add-kv-cache", converted("rms_swiglu_gqa_rope"), tmp_path / "kv.onnx").out
    )


# --- what must be refused ---------------------------------------------------------------------------------------------

HEADS, SIZE, VOCABULARY = 2, 4, 11


def attention_model(
    path: Path,
    mask: Callable[[list[onnx.NodeProto]], str | None],
    *,
    extra: Sequence[onnx.ValueInfoProto] = (),
    **arrays: Array,
) -> Path:
    """ids -> embedding -> one attention with the mask that `mask` adds to `nodes` -> logits."""
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["h"], "embed")]
    for name in "qkv":
        nodes += [
            helper.make_node("MatMul", ["h", f"w{name}"], [f"{name}2"], f"{name}_proj"),
            helper.make_node("Reshape", [f"{name}2", "split"], [f"{name}3"], f"{name}_split"),
            helper.make_node(
                "Transpose",
                [f"{name}3"],
                [f"{name}4"],
                f"{name}_heads",
                perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3],
            ),
        ]
    nodes.append(helper.make_node("MatMul", ["q4", "k4"], ["scores"], "qk"))
    masked = mask(nodes) or "scores"
    nodes += [
        helper.make_node("Softmax", [masked], ["p"], "softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v4"], ["c"], "pv"),
        helper.make_node("Transpose", ["c"], ["ct"], "merge", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["ct", "join"], ["cj"], "join_heads"),
        helper.make_node("MatMul", ["cj", "head"], ["logits"], "lm_head"),
    ]
    width = HEADS * SIZE
    weights = {
        "table": normal(VOCABULARY, width),
        "wq": normal(width, width, seed=1),
        "wk": normal(width, width, seed=2),
        "wv": normal(width, width, seed=3),
        "head": normal(width, VOCABULARY, seed=4),
        "split": np.array([0, 0, HEADS, SIZE]),
        "join": np.array([0, 0, width]),
        **arrays,
    }
    inputs = [info("input_ids", ["batch", "sequence"], INT64), *extra]
    return write(path, nodes, inputs, [info("logits", ["batch", "sequence", VOCABULARY])], stored(**weights), opset=19)


def lengths(nodes: list[onnx.NodeProto]) -> None:
    """Positions of queries [s, 1] and of keys [s], counted in the graph."""
    nodes += [
        helper.make_node("Shape", ["input_ids"], ["s1"], start=1, end=2),
        helper.make_node("Squeeze", ["s1"], ["s"]),
        helper.make_node("Range", ["zero", "s", "one"], ["j"]),
        helper.make_node("Unsqueeze", ["j", "one_axis"], ["i"]),
    ]


NUMBERS = {
    "zero": np.array(0),
    "one": np.array(1),
    "one_axis": np.array([1]),
    "low": np.float32(-1e4),
    "none": np.float32(0),
}


def causal(nodes: list[onnx.NodeProto]) -> str:
    lengths(nodes)
    nodes += [
        helper.make_node("Greater", ["j", "i"], ["hide"]),
        helper.make_node("Where", ["hide", "low", "scores"], ["masked"], "mask"),
    ]
    return "masked"


def bidirectional_block(nodes: list[onnx.NodeProto]) -> str:
    """Blocks of three tokens that see each other: no causal rule."""
    lengths(nodes)
    nodes += [
        helper.make_node("Div", ["i", "three"], ["bi"]),
        helper.make_node("Div", ["j", "three"], ["bj"]),
        helper.make_node("Greater", ["bj", "bi"], ["hide"]),
        helper.make_node("Where", ["hide", "low", "scores"], ["masked"], "block_mask"),
    ]
    return "masked"


def alibi(nodes: list[onnx.NodeProto]) -> str:
    """A bias that grows with distance."""
    lengths(nodes)
    nodes += [
        helper.make_node("Sub", ["j", "i"], ["d"]),
        helper.make_node("Cast", ["d"], ["df"], to=FLOAT),
        helper.make_node("Greater", ["j", "i"], ["hide"]),
        helper.make_node("Where", ["hide", "low", "df"], ["bias"]),
        helper.make_node("Add", ["scores", "bias"], ["masked"], "alibi_mask"),
    ]
    return "masked"


def anticausal(nodes: list[onnx.NodeProto]) -> str:
    lengths(nodes)
    nodes += [
        helper.make_node("Less", ["j", "i"], ["hide"]),
        helper.make_node("Where", ["hide", "low", "scores"], ["masked"], "reversed_mask"),
    ]
    return "masked"


def weak(nodes: list[onnx.NodeProto]) -> str:
    """Hidden places get -1 instead of a blocking value."""
    causal(nodes)
    nodes[-1].input[1] = "minus"
    return "masked"


def test_the_small_model_decodes(tmp_path: Path) -> None:
    path = attention_model(tmp_path / "in.onnx", causal, **NUMBERS)
    succeed("add-kv-cache", path, tmp_path / "kv.onnx")
    feeds = {"input_ids": np.random.default_rng(0).integers(0, VOCABULARY, (2, 7))}
    assert max_abs(decode(Session(tmp_path / "kv.onnx"), feeds, [2, 1, 4]), full(path, feeds)) <= TOLERANCE


def test_a_bias_of_distances_decodes(tmp_path: Path) -> None:
    """ALiBi written as one sum of bias and mask: neither follows the rule of a mask."""
    path = attention_model(tmp_path / "in.onnx", alibi, **NUMBERS)
    succeed("add-kv-cache", path, tmp_path / "kv.onnx")
    feeds = {"input_ids": np.random.default_rng(0).integers(0, VOCABULARY, (2, 7))}
    for steps in ([7], [2, 1, 4], [1] * 7):
        assert max_abs(decode(Session(tmp_path / "kv.onnx"), feeds, steps), full(path, feeds)) <= TOLERANCE


BAD_MASKS = [
    (bidirectional_block, "softmax"),
    (anticausal, "softmax"),
    (weak, "softmax"),
    (lambda nodes: None, "no causal mask"),
]


@pytest.mark.parametrize(("mask", "named"), BAD_MASKS, ids=["blocks", "anticausal", "weak", "none"])
def test_a_mask_that_is_not_causal_is_refused_by_name(
    mask: Callable[[list[onnx.NodeProto]], str | None], named: str, tmp_path: Path
) -> None:
    path = attention_model(tmp_path / "in.onnx", mask, **NUMBERS, three=np.array(3), minus=np.float32(-1))
    assert named in refuse("add-kv-cache", path, tmp_path / "kv.onnx", "--no-check")
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


def test_positions_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    """CumSum over ones counts from zero whatever the cache holds."""

    def mask(nodes: list[onnx.NodeProto]) -> str:
        nodes[0:1] = [
            helper.make_node("Gather", ["table", "input_ids"], ["words"]),
            helper.make_node("Shape", ["input_ids"], ["ids_shape"]),
            helper.make_node("ConstantOfShape", ["ids_shape"], ["ones"], value=helper.make_tensor("", INT64, [1], [1])),
            helper.make_node("CumSum", ["ones", "one"], ["places"], "count_up"),
            helper.make_node("Gather", ["positions", "places"], ["p_emb"], "position_table"),
            helper.make_node("Add", ["words", "p_emb"], ["h"]),
        ]
        return causal(nodes)

    path = attention_model(tmp_path / "in.onnx", mask, **NUMBERS, positions=normal(256, HEADS * SIZE, seed=5))
    message = refuse("add-kv-cache", path, tmp_path / "kv.onnx", "--no-check")
    assert "position" in message
    assert not (tmp_path / "kv.onnx").exists()


def before(nodes: list[onnx.NodeProto], *extra: onnx.NodeProto) -> str:
    """Put `extra` between the embedding (`words`) and the projections (which read `h`); causal mask, positions counted
    first.
    """
    causal(nodes)
    counted = [node for node in nodes if node.output[0] in ("s1", "s", "j", "i")]
    rest = [node for node in nodes[1:] if node not in counted]
    nodes[:] = [helper.make_node("Gather", ["table", "input_ids"], ["words"], "embed"), *counted, *extra, *rest]
    return "masked"


MIXERS: dict[str, list[onnx.NodeProto]] = {
    "mean over the sequence": [
        helper.make_node("ReduceMean", ["words", "one_axis"], ["m"], "mixer", keepdims=1),
        helper.make_node("Add", ["words", "m"], ["h"]),
    ],
    "running sum": [helper.make_node("CumSum", ["words", "one"], ["h"], "mixer")],
    "positions from the end": [
        helper.make_node("Sub", ["s", "j"], ["back"], "mixer"),
        helper.make_node("Gather", ["positions", "back"], ["pe"]),
        helper.make_node("Add", ["words", "pe"], ["h"]),
    ],
}


@pytest.mark.parametrize("kind", MIXERS)
def test_tokens_that_meet_outside_attention_are_refused(kind: str, tmp_path: Path) -> None:
    path = attention_model(
        tmp_path / "in.onnx", lambda nodes: before(nodes, *MIXERS[kind]), **NUMBERS, positions=normal(256, HEADS * SIZE)
    )
    message = refuse("add-kv-cache", path, tmp_path / "kv.onnx")
    assert ("'pe'" if kind == "positions from the end" else "'mixer'") in message


def windowed(nodes: list[onnx.NodeProto]) -> str:
    lengths(nodes)
    nodes += [
        helper.make_node("Sub", ["i", "j"], ["d"]),
        helper.make_node("GreaterOrEqual", ["d", "width"], ["far"]),
        helper.make_node("Greater", ["j", "i"], ["later"]),
        helper.make_node("Or", ["far", "later"], ["hide"]),
        helper.make_node("Where", ["hide", "low", "scores"], ["masked"], "mask"),
    ]
    return "masked"


@pytest.mark.parametrize("width", [1, 2, 5, 64, 1024, 4096])
def test_windows_of_many_widths(width: int, tmp_path: Path) -> None:
    """The note names the width, and decoding past it (where that is cheap) hides the same keys as the full run."""
    path = attention_model(tmp_path / "in.onnx", windowed, **NUMBERS, width=np.array(width))
    assert f"sliding window of {width}" in succeed("add-kv-cache", path, tmp_path / "kv.onnx").out
    feeds = {"input_ids": np.random.default_rng(0).integers(0, VOCABULARY, (2, 12))}
    assert max_abs(decode(Session(tmp_path / "kv.onnx"), feeds, [3, 1, 8]), full(path, feeds)) <= TOLERANCE


MASKS: dict[str, list[onnx.NodeProto]] = {
    "a table of booleans": [
        helper.make_node("Slice", ["triangle", "zero_axis", "s1", "one_axis"], ["t1"]),
        helper.make_node("Slice", ["t1", "zero_axis", "s1", "zero_axis"], ["t2"]),
        helper.make_node("Where", ["t2", "low", "scores"], ["masked"]),
    ],
    "multiplied and added": [
        helper.make_node("Greater", ["j", "i"], ["hide"]),
        helper.make_node("Cast", ["hide"], ["hf"], to=FLOAT),
        helper.make_node("Mul", ["hf", "low"], ["bias"]),
        helper.make_node("Add", ["bias", "scores"], ["masked"]),
    ],
    "softcap before the mask": [
        helper.make_node("Div", ["scores", "five"], ["sd"]),
        helper.make_node("Tanh", ["sd"], ["st"]),
        helper.make_node("Mul", ["st", "five"], ["sm"]),
        helper.make_node("Greater", ["j", "i"], ["hide"]),
        helper.make_node("Where", ["hide", "low", "sm"], ["masked"]),
    ],
    "a scale for each head": [
        helper.make_node("Mul", ["scores", "per_head"], ["sm"]),
        helper.make_node("LessOrEqual", ["j", "i"], ["keep"]),
        helper.make_node("Where", ["keep", "sm", "low"], ["masked"]),
    ],
}


@pytest.mark.parametrize("kind", MASKS)
def test_ways_to_write_a_causal_mask(kind: str, tmp_path: Path) -> None:
    def mask(nodes: list[onnx.NodeProto]) -> str:
        lengths(nodes)
        nodes += MASKS[kind]
        return "masked"

    extra = {"triangle": np.triu(np.ones((64, 64), bool), 1), "zero_axis": np.array([0]), "five": np.float32(5)}
    path = attention_model(
        tmp_path / "in.onnx", mask, **NUMBERS, **extra, per_head=np.array([1, 2], np.float32).reshape(1, 2, 1, 1)
    )
    succeed("add-kv-cache", path, tmp_path / "kv.onnx")
    feeds = {"input_ids": np.random.default_rng(0).integers(0, VOCABULARY, (3, 11))}
    expected = full(path, feeds)
    for steps in splits(11):
        assert rel_l2(decode(Session(tmp_path / "kv.onnx"), feeds, steps), expected) <= 1e-6


TABLES: dict[str, list[onnx.NodeProto]] = {
    "gathered": [helper.make_node("Gather", ["positions", "j"], ["pe"])],
    "sliced": [helper.make_node("Slice", ["positions", "zero_axis", "s1"], ["pe"])],
}


@pytest.mark.parametrize("kind", TABLES)
def test_learned_positions_counted_inside(kind: str, tmp_path: Path) -> None:
    nodes = [*TABLES[kind], helper.make_node("Add", ["words", "pe"], ["h"])]
    arrays = {"positions": normal(64, HEADS * SIZE, seed=5), "zero_axis": np.array([0])}
    path = attention_model(tmp_path / "in.onnx", lambda n: before(n, *nodes), **NUMBERS, **arrays)
    succeed("add-kv-cache", path, tmp_path / "kv.onnx")
    feeds = {"input_ids": np.random.default_rng(0).integers(0, VOCABULARY, (3, 11))}
    assert rel_l2(decode(Session(tmp_path / "kv.onnx"), feeds, [4, 1, 6]), full(path, feeds)) <= 1e-6


def test_positions_counted_from_the_mask_are_right_or_refused(tmp_path: Path) -> None:
    """Hugging Face: position_ids = attention_mask.cumsum(-1) - 1, and the mask hides padding too."""

    def mask(nodes: list[onnx.NodeProto]) -> str:
        places = [
            helper.make_node("CumSum", ["attention_mask", "one"], ["count"], "count_mask"),
            helper.make_node("Sub", ["count", "one"], ["places"]),
            helper.make_node("Gather", ["positions", "places"], ["pe"]),
        ]
        before(nodes, *places, helper.make_node("Add", ["words", "pe"], ["h"]))
        nodes += [
            helper.make_node("Unsqueeze", ["attention_mask", "middle"], ["am"]),
            helper.make_node("Equal", ["am", "zero"], ["padded"]),
            helper.make_node("Where", ["padded", "low", "masked"], ["masked2"], "padding"),
        ]
        return "masked2"

    extra = [info("attention_mask", ["batch", "sequence"], INT64)]
    arrays = {"positions": normal(64, HEADS * SIZE, seed=5), "middle": np.array([1, 2])}
    path = attention_model(tmp_path / "in.onnx", mask, extra=extra, **NUMBERS, **arrays)
    feeds = {
        "input_ids": np.random.default_rng(0).integers(0, VOCABULARY, (2, 7)),
        "attention_mask": np.ones((2, 7), np.int64),
    }
    expected = full(path, feeds)
    if run("add-kv-cache", path, tmp_path / "kv.onnx").code:
        refuse("add-kv-cache", path, tmp_path / "kv.onnx")
    else:
        assert rel_l2(decode(Session(tmp_path / "kv.onnx"), feeds, [4, 1, 2]), expected) <= 1e-6


@pytest.mark.parametrize("case", ["te_linear_fp8_ds"], indirect=True)
def test_no_token_input_is_refused(case: Case, converted: Make, tmp_path: Path) -> None:
    assert "input_ids" in refuse("add-kv-cache", converted(case.name), tmp_path / "kv.onnx")


def test_no_attention_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["logits"]),
    ]
    path = write(
        tmp_path / "in.onnx",
        nodes,
        [info("input_ids", ["b", "s"], INT64)],
        [info("logits", ["b", "s", 8])],
        stored(table=normal(8, 4), w=normal(4, 8)),
    )
    assert "no attention" in refuse("add-kv-cache", path, tmp_path / "kv.onnx")
    assert not (tmp_path / "kv.onnx").exists()


@pytest.mark.parametrize("flags", [[], ["--naming", "nemo"], ["--policy", "new", "--layout", "sbnh"]], ids=" ".join)
def test_a_cached_model_is_refused(flags: list[str], cached: Make, tmp_path: Path) -> None:
    message = refuse("add-kv-cache", cached("rms_swiglu_gqa_rope", *flags), tmp_path / "kv.onnx")
    assert "already has a KV cache" in message and "past_key_values.0" in message


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv-scale", "0"],
        ["--kv-scale", "-1"],
        ["--kv-scale", "nan"],
        ["--kv-scale", "inf"],
        ["--dtype", "int8"],
        ["--layout", "x"],
    ],
    ids=" ".join,
)
def test_wrong_options_are_usage_errors(flags: list[str], converted: Make, tmp_path: Path) -> None:
    refuse("add-kv-cache", converted("rms_swiglu_gqa_rope"), tmp_path / "kv.onnx", *flags, code=2)
    assert not list(tmp_path.iterdir())


def test_an_fp8_cache_needs_opset_19(tmp_path: Path) -> None:
    assert "opset 19" in refuse("add-kv-cache", Case("sdpa_gqa").path, tmp_path / "kv.onnx", "--dtype", "fp8")


@pytest.mark.parametrize("name", ["sdpa_gqa", "padding_mask"])
def test_a_raw_export_can_be_cached(name: str, tmp_path: Path) -> None:
    """Without `convert` first: a plain opset-18 export."""
    case = Case(name)
    result = succeed("add-kv-cache", case.path, tmp_path / "kv.onnx")
    assert "2 attention blocks" in result.out
    assert (
        rel_l2(kept(case, decode(Session(tmp_path / "kv.onnx"), case.feeds, [4, *[1] * 8])), kept(case, case.expected))
        <= 1e-6
    )
