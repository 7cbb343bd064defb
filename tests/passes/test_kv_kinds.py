"""`add-kv-cache` and caches of other exporters: torch's safe softmax, encoders that only hide padding, sizes that are
sums or names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxtools.analysis.cache import settle_sizes
from onnxtools.ir.model import Model
from tests.support import (
    FLOAT,
    INT64,
    Array,
    Feeds,
    Session,
    decode,
    info,
    normal,
    refuse,
    rel_l2,
    run,
    stored,
    succeed,
    write,
)

N = helper.make_node
HEADS, SIZE, VOCABULARY, LAYERS = 2, 8, 32, 2
WIDTH = HEADS * SIZE
BOOL = TensorProto.BOOL
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 9))
MASK = np.ones((3, 9), np.int64)
MASK[1, :3] = 0
MASK[2, :8] = 0
NUMBERS: Feeds = {"zero": np.float32(0), "zeros": np.zeros(1, np.float32), "ninf": np.float32(-np.inf),
    "low": np.float32(-10000),
    "lowest": np.float32(np.finfo(np.float32).min),
                  "unit": np.float32(1), "scale": np.float32(SIZE**-0.5), "root": np.float32(SIZE**-0.25),
                  "a0": np.array([0]), "a1": np.array([1]),
                      "a12": np.array([1, 2]),
                  "a13": np.array([1, 3]), "i0": np.array(0), "i1": np.array(1), "split": np.array([0, 0, HEADS, SIZE]),
                  "merge": np.array([0, 0, WIDTH]),
                  "last": np.array([-1]), "true": np.array(True)}  # fmt: skip
CAUSAL = [N("Shape", ["input_ids"], ["shape"]), N("Gather", ["shape", "i1"], ["length"]),
    N("Range", ["i0", "length", "i1"], ["key"]),
          N("Unsqueeze", ["key", "a1"], ["query"]), N("LessOrEqual", ["key", "query"], ["causal"])]  # fmt: skip
PADDING = [N("Cast", ["attention_mask"], ["keep"], to=BOOL), N("Unsqueeze", ["keep", "a12"], ["keep4"])]
VISIBLE = [*CAUSAL, *PADDING, N("And", ["causal", "keep4"], ["visible"])]
Score = Callable[[str], list[onnx.NodeProto]]
"""The nodes from s{layer} to p{layer}, scores to probabilities."""


def model(path: Path, before: list[onnx.NodeProto], score: Score) -> Path:
    """A decoder of two layers; `before` makes masks, `score` uses them."""
    arrays = {**NUMBERS, "emb": normal(VOCABULARY, WIDTH), "head": normal(WIDTH, VOCABULARY, seed=1)}
    nodes = [N("Gather", ["emb", "input_ids"], ["x0"]), *before]
    for layer in map(str, range(LAYERS)):
        for index, kind in enumerate("qkv"):
            arrays[f"w{kind}{layer}"] = normal(WIDTH, WIDTH, seed=10 * int(layer) + index + 2) * np.float32(0.3)
            nodes += [N("MatMul", [f"x{layer}", f"w{kind}{layer}"], [f"{kind}f{layer}"]),
                N("Reshape", [f"{kind}f{layer}", "split"], [f"{kind}h{layer}"]),
                      N("Transpose", [f"{kind}h{layer}"], [f"{kind}{layer}"], perm=[0, 2, 1, 3])]  # fmt: skip
        nodes += [N("Transpose", [f"k{layer}"], [f"kt{layer}"], perm=[0, 1, 3, 2]),
            N("MatMul", [f"q{layer}", f"kt{layer}"], [f"r{layer}"]),
                  N("Mul", [f"r{layer}", "scale"], [f"s{layer}"]), *score(layer),
                  N("MatMul", [f"p{layer}", f"v{layer}"], [f"c{layer}"]),
                  N("Transpose", [f"c{layer}"], [f"ct{layer}"], perm=[0, 2, 1, 3]),
                  N("Reshape", [f"ct{layer}", "merge"], [f"o{layer}"]),
                  N("Add", [f"x{layer}", f"o{layer}"], [f"x{int(layer) + 1}"])]  # fmt: skip
    nodes.append(N("MatMul", [f"x{LAYERS}", "head"], ["logits"]))
    for index, node in enumerate(nodes):
        node.name = f"{node.op_type}_{index}"
    read = {name for node in nodes for name in node.input}
    inputs = [info(name, ["batch", "sequence"], INT64) for name in ("input_ids", "attention_mask") if name in read]
    used = {name: array for name, array in arrays.items() if name in read}
    return write(path, nodes, inputs, [info("logits", ["batch", "sequence", VOCABULARY])], stored(**used), opset=19)


# --- safe softmax -----------------------------------------------------------------------------------------------------

BIAS = N("Where", ["visible", "zero", "ninf"], ["bias"])
TORCH: Score = lambda n: [N("Add", [f"s{n}", "bias"], [f"m{n}"]), N("Softmax", [f"m{n}"], [f"u{n}"], axis=-1)]  # noqa: E731
SAFE: dict[str, tuple[list[onnx.NodeProto], Score]] = {
    "NaN to zero": ([BIAS], lambda n: [*TORCH(n), N("IsNaN", [f"u{n}"], [f"n{n}"]), N("Where", [f"n{n}", "zero",
        f"u{n}"], [f"p{n}"])]),
    "NaN to [0]": ([BIAS], lambda n: [*TORCH(n), N("IsNaN", [f"u{n}"], [f"n{n}"]), N("Where", [f"n{n}", "zeros",
        f"u{n}"], [f"p{n}"])]),
    "number or zero": ([BIAS], lambda n: [*TORCH(n), N("IsNaN", [f"u{n}"], [f"n{n}"]), N("Not", [f"n{n}"], [f"o{n}!"]),
        N("Where", [f"o{n}!", f"u{n}", "zero"], [f"p{n}"])]),
    "chosen scores": ([], lambda n: [N("Where", ["visible", f"s{n}", "ninf"], [f"m{n}"]), N("Softmax", [f"m{n}"],
        [f"u{n}"], axis=-1),
        N("IsNaN", [f"u{n}"], [f"n{n}"]),
                                     N("Where", [f"n{n}", "zero", f"u{n}"], [f"p{n}"])]),
    "rows without a key": (
        [BIAS, N("Equal", ["bias", "ninf"], ["out"]), N("Cast", ["out"], ["out_n"], to=INT64),
            N("ReduceMin", ["out_n", "last"], ["all_n"]),
            N("Cast", ["all_n"], ["all"], to=BOOL)],
        lambda n: [*TORCH(n), N("Where", ["all", "zero", f"u{n}"], [f"p{n}"])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAFE)
def test_safe_softmax_stays_safe_for_padded_prompts(kind: str, tmp_path: Path) -> None:
    before, score = SAFE[kind]
    path = model(tmp_path / "m.onnx", [*VISIBLE, *before], score)
    feeds = {"input_ids": IDS, "attention_mask": MASK}
    expected = Session(path)(feeds)["logits"]
    assert np.isfinite(expected).all()
    result = run("add-kv-cache", path, tmp_path / "kv.onnx")
    if kind == "rows without a key" and result.code == 1:
        assert "mask" in result.err or "attention" in result.err
        return
    assert result.code == 0, result.err
    session = Session(tmp_path / "kv.onnx")
    for steps in ([9], [8, 1], [5, 3, 1], [9 - 4] + [1] * 4):
        found = decode(session, feeds, steps)
        assert np.isfinite(found).all(), steps
        assert rel_l2(found[MASK.astype(bool)], expected[MASK.astype(bool)]) < 1e-5, steps


# --- encoders ---------------------------------------------------------------------------------------------------------

SOFTMAX: Score = lambda n: [N("Softmax", [f"m{n}"], [f"p{n}"], axis=-1)]  # noqa: E731
ADDED: Score = lambda n: [N("Add", [f"s{n}", "bias"], [f"m{n}"]), *SOFTMAX(n)]  # noqa: E731
ONE_MINUS = [
    N("Cast", ["attention_mask"], ["f"], to=FLOAT),
    N("Sub", ["unit", "f"], ["g"]),
    N("Mul", ["g", "low"], ["h"]),
    N("Unsqueeze", ["h", "a12"], ["bias"]),
]
SQUARE = [
    N("Cast", ["attention_mask"], ["keep"], to=BOOL),
    N("Unsqueeze", ["keep", "a12"], ["row"]),
    N("Unsqueeze", ["keep", "a13"], ["col"]),
    N("And", ["row", "col"], ["both"]),
]
ENCODERS: dict[str, tuple[list[onnx.NodeProto], Score]] = {
    "one minus the mask": (ONE_MINUS, ADDED),
    "lowest of fp32": ([*ONE_MINUS[:2], N("Mul", ["g", "lowest"], ["h"]), ONE_MINUS[3]], ADDED),
    "chosen by padding": (PADDING, lambda n: [N("Where", ["keep4", f"s{n}", "low"], [f"m{n}"]), *SOFTMAX(n)]),
    "infinity for padding": ([*PADDING, N("Where", ["keep4", "zero", "ninf"], ["bias"])], ADDED),
    "both ways": ([*SQUARE, N("Where", ["both", "zero", "low"], ["bias"])], ADDED),
    "both ways, expanded": (
        [*SQUARE, N("Shape", ["both"], ["size"]), N("Expand", ["both", "size"], ["wide"]),
            N("Where", ["wide", "zero", "low"], ["bias"])], ADDED
    ),
    "no mask": ([], lambda n: [N("Softmax", [f"s{n}"], [f"p{n}"], axis=-1)]),
    "everything visible": ([*CAUSAL, N("Or", ["causal", "true"], ["all"]),
        N("Where", ["all", "zero", "low"], ["bias"])], ADDED),
    "padding, safely": (
        [*PADDING, N("Where", ["keep4", "zero", "ninf"], ["bias"])],
        lambda n: [*TORCH(n), N("IsNaN", [f"u{n}"], [f"n{n}"]), N("Where", [f"n{n}", "zero", f"u{n}"], [f"p{n}"])],
    ),
    "one layer of two": ([*ONE_MINUS, *VISIBLE, N("Where", ["visible", "zero", "low"], ["hidden"])],
                         lambda n: [N("Add", [f"s{n}", "bias" if n == "1" else "hidden"], [f"m{n}"]), *SOFTMAX(n)]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS)
def test_attention_that_sees_the_future_gets_no_cache(kind: str, tmp_path: Path) -> None:
    before, score = ENCODERS[kind]
    path = model(tmp_path / "m.onnx", before, score)
    later = IDS.copy()
    later[:, -1] = (later[:, -1] + 1) % VOCABULARY
    ones = np.ones_like(MASK)
    logits = [Session(path)({"input_ids": ids, "attention_mask": ones})["logits"][:, 0] for ids in (IDS, later)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-4, "the test's own graph must look ahead"
    refuse("add-kv-cache", path, tmp_path / "kv.onnx")
    assert not (tmp_path / "kv.onnx").exists()


# --- what other exporters call their sizes ----------------------------------------------------------------------------


def causal(path: Path) -> Path:
    before, score = [*VISIBLE, N("Where", ["visible", "zero", "low"], ["bias"])], ADDED
    return model(path, before, score)


def renamed(path: Path, output: Path, names: dict[str, str]) -> Path:
    proto = onnx.load(path)
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param in names or (axis == 3 and "head" in names):
                dim.dim_param = names[dim.dim_param or "head"]
    onnx.save(proto, output)
    return output


@pytest.mark.parametrize("total", [
    "past_sequence_length + sequence_length", "sequence_length + past_sequence_length",
    "past_sequence_length+sequence_length", "total_sequence_length",
])  # fmt: skip
def test_a_mask_as_long_as_past_and_new_tokens(total: str, tmp_path: Path) -> None:
    source = causal(tmp_path / "m.onnx")
    succeed("add-kv-cache", source, tmp_path / "kv.onnx")
    names = {
        "batch": "batch_size",
        "sequence": "sequence_length",
        "past_sequence": "past_sequence_length",
        "total_sequence": total,
    }
    other = renamed(tmp_path / "kv.onnx", tmp_path / "optimum.onnx", names)
    told = succeed("validate", source, other).out
    assert "steps" in told and "FAIL" not in told
    broken = onnx.load(other)
    next(tensor for tensor in broken.graph.initializer if tensor.name == "wk1").raw_data = normal(
        WIDTH, WIDTH, seed=99
    ).tobytes()
    onnx.save(broken, tmp_path / "broken.onnx")
    assert run("validate", source, tmp_path / "broken.onnx").code == 1


@pytest.mark.parametrize("name", ["kv_cache_dim", "head_size", "past_head_dim"])
def test_a_head_size_that_is_a_name(name: str, tmp_path: Path) -> None:
    source = causal(tmp_path / "m.onnx")
    succeed("add-kv-cache", source, tmp_path / "kv.onnx")
    other = renamed(tmp_path / "kv.onnx", tmp_path / "genai.onnx", {"head": name})
    succeed("validate", source, other)
    loaded = Model.load(other)
    settle_sizes(loaded)
    sizes = [
        value.shape[3]
        for value in (*loaded.graph.inputs, *loaded.graph.outputs)
        if value.shape is not None and len(value.shape) == 4
    ]
    assert sizes == [SIZE] * (4 * LAYERS)


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_the_head_size_of_grouped_query_attention(packed: bool, tmp_path: Path) -> None:
    heads, shared, size = 4, 2, 16
    widths = (
        {"q": (heads + 2 * shared) * size} if packed else {"q": heads * size, "k": shared * size, "v": shared * size}
    )
    nodes = [N("Gather", ["emb", "input_ids"], ["x"]), *(N("MatMul", ["x", f"w{n}"], [n]) for n in widths)]
    nodes.append(N("GroupQueryAttention",
        ["q", "" if packed else "k", "" if packed else "v", "past_key_values.0.key", "past_key_values.0.value",
        "lens", "total"],
                   ["logits", "present.0.key", "present.0.value"], domain="com.microsoft", num_heads=heads,
                   kv_num_heads=shared))  # fmt: skip
    arrays: dict[str, Array] = {"emb": normal(9, 32), **{f"w{n}": normal(32, width) for n, width in widths.items()}}
    cache = [
        info(f"past_key_values.0.{kind}", ["batch", shared, "past_sequence", "kv_cache_dim"])
        for kind in ("key", "value")
    ]
    inputs = [
        info("input_ids", ["batch", "sequence"], INT64),
        info("lens", ["batch"], TensorProto.INT32),
        info("total", [], TensorProto.INT32),
        *cache,
    ]
    outputs = [
        info("logits", ["batch", "sequence", heads * size]),
        *(info(f"present.0.{kind}", ["batch", shared, "total", "kv_cache_dim"]) for kind in ("key", "value")),
    ]
    path = write(tmp_path / "m.onnx", nodes, inputs, outputs, stored(**arrays), domains=["com.microsoft"])
    loaded = Model.load(path)
    settle_sizes(loaded)
    assert [
        value.shape[3] for value in (*loaded.graph.inputs[3:], *loaded.graph.outputs[1:]) if value.shape is not None
    ] == [size] * 4
