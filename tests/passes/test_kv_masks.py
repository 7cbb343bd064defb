"""Masks by their elements: however a mask is written, the cached graph computes the same, or the mask is refused.

An attack of 510 decoders found the kinds; each of them is here once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.passes.test_kv_kinds import ADDED, CAUSAL, PADDING, SOFTMAX, VISIBLE, VOCABULARY, Score, model
from tests.support import FLOAT, INT64, Array, Session, decode, refuse, rel_l2, stored, succeed

N = helper.make_node
BOOL = TensorProto.BOOL
IDS = np.random.default_rng(1).integers(0, VOCABULARY, (2, 40))
MASK = np.ones((2, 40), np.int64)
MASK[1, :7] = 0
FAR = [N("Unsqueeze", ["key", "a1"], ["row"]), N("Sub", ["row", "key"], ["far"])]
"""Distances [sequence, sequence] of a query from a key, behind CAUSAL."""


def hides(*nodes: onnx.NodeProto, visible: str = "seen") -> list[onnx.NodeProto]:
    """The nodes, and the additive mask of what is `visible`."""
    return [*nodes, N("Where", [visible, "zero", "low"], ["bias"])]


def window(*nodes: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Causal, not padding, and what `nodes` call `near`."""
    return hides(*VISIBLE, *FAR, *nodes, N("And", ["visible", "near"], ["seen"]))


HALF = N("Cast", ["far"], ["farf"], to=FLOAT)
SERVED: dict[str, tuple[list[onnx.NodeProto], Score]] = {
    "a window of floats": (window(HALF, N("Less", ["farf", "w20f"], ["near"])), ADDED),
    "a window that is a product": (window(N("Mul", ["four", "five"], ["w"]), N("Less", ["far", "w"], ["near"])), ADDED),
    "a window by multiplication": (
        [*window(N("Less", ["far", "w20"], ["near"]))[:-1], N("Cast", ["seen"], ["s"], to=FLOAT),
         N("Sub", ["unit", "s"], ["t"]), N("Mul", ["t", "low"], ["bias"])], ADDED),
    "a table of a window": (
        hides(*VISIBLE, N("Shape", ["input_ids"], ["n"], start=1), N("Slice", ["table", "a0", "n", "a0"], ["rows"]),
              N("Slice", ["rows", "a0", "n", "a1"], ["near"]), N("And", ["visible", "near"], ["seen"])), ADDED),
    "chunks": (
        window(N("Div", ["row", "w16"], ["ci"]), N("Div", ["key", "w16"], ["cj"]), N("Equal", ["ci", "cj"], ["near"])),
        ADDED),
    "a chunk that begins at the first real token": (
        [*VISIBLE, *FAR, N("ArgMax", ["attention_mask"], ["first"], axis=1, keepdims=1),
         N("Sub", ["key", "first"], ["real"]), N("Div", ["real", "w16"], ["c"]), N("Unsqueeze", ["c", "a12"], ["cj"]),
         N("Unsqueeze", ["c", "a13"], ["ci"]), N("Equal", ["ci", "cj"], ["near"]),
         N("And", ["visible", "near"], ["seen"]), N("Where", ["seen", "zero", "low"], ["bias"])], ADDED),
    "every eighth key": (
        window(N("Mod", ["far", "eight"], ["m"]), N("Equal", ["m", "i0"], ["e"]), N("Less", ["far", "eight"], ["l"]),
               N("Or", ["e", "l"], ["near"])), ADDED),
    "a window for each head": (window(N("Less", ["far", "by_head"], ["near"])), ADDED),
    "a bias of distances": (
        [*VISIBLE, *FAR, HALF, N("Mul", ["farf", "slopes"], ["alibi"]),
         N("Where", ["visible", "alibi", "low"], ["bias"])], ADDED),
    "a bias that counts real tokens": (
        [*VISIBLE, N("CumSum", ["attention_mask", "i1"], ["count"]), N("Cast", ["count"], ["cf"], to=FLOAT),
         N("Unsqueeze", ["cf", "a12"], ["c4"]), N("Mul", ["c4", "slopes"], ["alibi"]),
         N("Where", ["visible", "alibi", "low"], ["bias"])], ADDED),
    "lowest twice": (
        [*CAUSAL, *PADDING, N("Where", ["causal", "zero", "lowest"], ["b1"]),
         N("Where", ["keep4", "zero", "lowest"], ["b2"]), N("Add", ["b1", "b2"], ["bias"])], ADDED),
    "infinity": ([*VISIBLE, N("Where", ["visible", "zero", "ninf"], ["bias"])], ADDED),
    "padding has 1": (
        [*CAUSAL, N("Cast", ["attention_mask"], ["pad"], to=BOOL), N("Not", ["pad"], ["keep"]),
         N("Unsqueeze", ["keep", "a12"], ["keep4"]), N("And", ["causal", "keep4"], ["visible"]),
         N("Where", ["visible", "zero", "low"], ["bias"])], ADDED),
    "sinks": (
        [*VISIBLE, N("Where", ["visible", "zero", "low"], ["bias"])],
        lambda n: [N("Add", [f"s{n}", "bias"], [f"m{n}"]), N("Shape", [f"m{n}"], [f"z{n}"], end=3),
                   N("Concat", [f"z{n}", "a1"], [f"t{n}"], axis=0), N("Expand", ["slopes", f"t{n}"], [f"e{n}"]),
                   N("Concat", [f"m{n}", f"e{n}"], [f"c!{n}"], axis=-1),
                   N("ReduceMax", [f"c!{n}", "last"], [f"x!{n}"]), N("Sub", [f"c!{n}", f"x!{n}"], [f"d!{n}"]),
                   N("Softmax", [f"d!{n}"], [f"f!{n}"], axis=-1),
                   N("Slice", [f"f!{n}", "a0", "last", "last"], [f"p{n}"])]),
    "a soft cap before the mask": (
        [*VISIBLE, N("Where", ["visible", "zero", "low"], ["bias"])],
        lambda n: [N("Tanh", [f"s{n}"], [f"h{n}"]), N("Add", [f"h{n}", "bias"], [f"m{n}"]), *SOFTMAX(n)]),
}  # fmt: skip

PLAIN = hides(*VISIBLE, visible="visible")
NOT_CAUSAL: dict[str, tuple[list[onnx.NodeProto], Score]] = {
    "added to later keys": ([*CAUSAL, N("Where", ["causal", "zero", "high"], ["bias"])], ADDED),
    "subtracted from earlier keys": (
        [*CAUSAL, N("Where", ["causal", "zero", "low"], ["bias"])],
        lambda n: [N("Sub", [f"s{n}", "bias"], [f"m{n}"]), *SOFTMAX(n)]),
    "hidden, then cut": (PLAIN, lambda n: [N("Add", [f"s{n}", "bias"], [f"h{n}"]),
                                           N("Max", [f"h{n}", "minus3"], [f"m{n}"]), *SOFTMAX(n)]),
    "hidden, then capped": (PLAIN, lambda n: [N("Add", [f"s{n}", "bias"], [f"h{n}"]),
                                              N("Tanh", [f"h{n}"], [f"m{n}"]), *SOFTMAX(n)]),
    "hidden, then small": (PLAIN, lambda n: [N("Add", [f"s{n}", "bias"], [f"h{n}"]),
                                             N("Mul", [f"h{n}", "tiny"], [f"m{n}"]), *SOFTMAX(n)]),
    "hidden with three": ([*CAUSAL, *FAR, N("Less", ["far", "by_head"], ["near"]), N("And", ["causal", "near"], ["c"])],
                          lambda n: [N("Where", ["c", f"s{n}", "minus3"], [f"m{n}"]), *SOFTMAX(n)]),
    "a token does not see itself": (hides(*CAUSAL, N("Less", ["key", "query"], ["seen"])), ADDED),
    "the last five": (hides(*VISIBLE, *FAR, N("Sub", ["length", "five"], ["from"]),
                            N("GreaterOrEqual", ["key", "from"], ["near"]), N("Or", ["near", "causal"], ["a"]),
                            N("And", ["a", "keep4"], ["seen"])), ADDED),
    "the largest of all scores": (PLAIN, lambda n: [
        N("ReduceMax", [f"s{n}", "last"], [f"top{n}"]), N("Mul", [f"s{n}", f"top{n}"], [f"h{n}"]),
        N("Add", [f"h{n}", "bias"], [f"m{n}"]), *SOFTMAX(n)]),
    "a scale by the length": (
        [*PLAIN, N("Cast", ["length"], ["lf"], to=FLOAT), N("Log", ["lf"], ["by"])],
        lambda n: [N("Mul", [f"s{n}", "by"], [f"h{n}"]), N("Add", [f"h{n}", "bias"], [f"m{n}"]), *SOFTMAX(n)]),
}  # fmt: skip

MORE: dict[str, Array] = {
    "w20f": np.float32(20), "w20": np.array(20), "w16": np.array(16), "four": np.array(4), "five": np.array(5),
    "eight": np.array(8), "high": np.float32(1e4), "minus3": np.float32(-3), "tiny": np.float32(1e-5),
    "by_head": np.array([[[3]], [[25]]]), "slopes": np.array([[[-0.5]], [[0.25]]], np.float32),
    "table": (np.subtract.outer(np.arange(200), np.arange(200)) < 20), "zero_int": np.array(0),
}  # fmt: skip


def written(path: Path, before: list[onnx.NodeProto], score: Score) -> Path:
    model(path, before, score)
    proto = onnx.load(path)
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(stored(**{name: array for name, array in MORE.items() if name in read}))
    onnx.save(proto, path)
    return path


def looks_ahead(path: Path) -> bool:
    """Whether an early token's logits change with the last token."""
    session, other = Session(path), IDS.copy()
    other[:, -1] = (other[:, -1] + 1) % VOCABULARY
    feeds = {"attention_mask": np.ones_like(MASK)}
    a, b = (session({"input_ids": ids, **{k: v for k, v in feeds.items() if k in session.inputs}})["logits"]
            for ids in (IDS, other))  # fmt: skip
    shorter = session({"input_ids": IDS[:, :30], **{k: v[:, :30] for k, v in feeds.items() if k in session.inputs}})
    return bool(np.abs(a[:, :-1] - b[:, :-1]).max() > 1e-4 or np.abs(a[:, :30] - shorter["logits"]).max() > 1e-4)


@pytest.mark.parametrize("kind", SERVED)
def test_steps_equal_the_full_run(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", *SERVED[kind])
    succeed("add-kv-cache", path, tmp_path / "kv.onnx")
    mask = 1 - MASK if kind == "padding has 1" else MASK
    original, session = Session(path), Session(tmp_path / "kv.onnx")
    for rows, length in ((slice(0, 2), 40), (slice(0, 1), 9)):
        if kind == "infinity":
            rows = slice(0, 1)  # the padded row of the original itself is NaN
        feeds = {"input_ids": IDS[rows, :length], "attention_mask": mask[rows, :length]}
        expected = original(feeds)["logits"][MASK[rows, :length].astype(bool)]
        for steps in ([length], [length - 1, 1], [3, length - 5, 2]):
            found = decode(session, feeds, steps)[MASK[rows, :length].astype(bool)]
            assert rel_l2(found, expected) < 2e-5, steps


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_what_looks_ahead_gets_no_cache(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", *NOT_CAUSAL[kind])
    assert looks_ahead(path), "the test's own graph must look ahead"
    refuse("add-kv-cache", path, tmp_path / "kv.onnx")
    refuse("add-kv-cache", path, tmp_path / "kv.onnx", "--no-check")  # it is not the check alone that sees it
    assert not (tmp_path / "kv.onnx").exists()


MIXERS: dict[str, list[onnx.NodeProto]] = {
    "Pad and Conv": [N("Transpose", ["e"], ["t"], perm=[0, 2, 1]), N("Pad", ["t", "pads"], ["q"]),
                     N("Conv", ["q", "kernel"], ["c"]), N("Transpose", ["c"], ["x0"], perm=[0, 2, 1])],
    "LSTM": [N("Transpose", ["e"], ["t"], perm=[1, 0, 2]), N("GRU", ["t", "gw", "gr"], ["g"], hidden_size=16),
             N("Squeeze", ["g", "a1"], ["h"]), N("Transpose", ["h"], ["x0"], perm=[1, 0, 2])],
    "pooled": [N("Transpose", ["e"], ["t"], perm=[0, 2, 1]), N("GlobalAveragePool", ["t"], ["p"]),
               N("Transpose", ["p"], ["u"], perm=[0, 2, 1]), N("Add", ["e", "u"], ["x0"])],
    "L2 norm": [N("LpNormalization", ["e"], ["x0"], axis=1)],
    "largest place": [N("ArgMax", ["e"], ["a"], axis=1, keepdims=1), N("Cast", ["a"], ["f"], to=FLOAT),
                      N("Add", ["e", "f"], ["x0"])],
    "first token": [N("Gather", ["e", "a0"], ["f"], axis=1), N("Add", ["e", "f"], ["x0"])],
    "backwards": [N("Slice", ["e", "last", "start", "a1", "last"], ["x0"])],
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXERS)
def test_tokens_that_meet_outside_attention(kind: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", PLAIN, ADDED)
    proto = onnx.load(path)
    proto.graph.node[0].output[0] = "e"
    nodes = [*proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend([nodes[0], *MIXERS[kind], *nodes[1:]])
    weights = {"pads": np.array([0, 0, 2, 0, 0, 0]), "kernel": np.ones((16, 16, 3), np.float32) * np.float32(0.1),
               "gw": np.ones((1, 48, 16), np.float32) * np.float32(0.1), "start": np.array([-(2**31)]),
               "gr": np.ones((1, 48, 16), np.float32) * np.float32(0.1), "a0": np.array([0]), "a1": np.array([1]),
               "last": np.array([-1])}  # fmt: skip
    have = {tensor.name for tensor in proto.graph.initializer}
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(stored(**{k: v for k, v in weights.items() if k in read - have}))
    onnx.save(proto, path)
    Session(path)({"input_ids": IDS, "attention_mask": MASK})
    refuse("add-kv-cache", path, tmp_path / "kv.onnx", "--no-check")  # it is not the check alone that sees it
    assert not (tmp_path / "kv.onnx").exists()


@pytest.mark.parametrize("opset", [13, 14])
def test_old_opsets_are_raised(opset: int, tmp_path: Path) -> None:
    proto = onnx.load(model(tmp_path / "m.onnx", PLAIN, ADDED))
    proto.opset_import[0].version = opset
    onnx.save(proto, tmp_path / "m.onnx")
    assert "opset 15" in succeed("add-kv-cache", tmp_path / "m.onnx", tmp_path / "kv.onnx").out


def test_half_of_an_encoder_decoder_is_named(tmp_path: Path) -> None:
    proto = onnx.load(model(tmp_path / "m.onnx", PLAIN, ADDED))
    proto.graph.input.append(helper.make_tensor_value_info("encoder_attention_mask", INT64, ["batch", "other"]))
    onnx.save(proto, tmp_path / "m.onnx")
    assert "encoder-decoder" in refuse("add-kv-cache", tmp_path / "m.onnx", tmp_path / "kv.onnx")
