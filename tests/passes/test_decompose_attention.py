"""`decompose-attention` against onnx.reference's Attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from tests.support import FLOAT, Array, Feeds, Session, info, normal, ops, refuse, rel_l2, succeed, write

HEADS, KV, LENGTH, SIZE = 4, 2, 5, 8


def model(
    path: Path,
    *,
    flat: bool = False,
    kv_heads: int = HEADS,
    mask: Array | None = None,
    keys: int = LENGTH,
    outputs: int = 1,
    past: bool = False,
    **attributes: Any,
) -> tuple[Path, Feeds]:
    """One Attention on [batch, heads, sequence, channels], or [batch, sequence, hidden] if `flat`."""
    heads = {"q": HEADS, "k": kv_heads, "v": kv_heads}
    sizes = {"q": LENGTH, "k": keys, "v": keys}
    feeds = {n: normal(2, h, sizes[n], SIZE, seed=ord(n)) for n, h in heads.items()}
    if flat:
        feeds = {n: a.transpose(0, 2, 1, 3).reshape(2, sizes[n], -1).copy() for n, a in feeds.items()}
        attributes |= {"q_num_heads": HEADS, "kv_num_heads": kv_heads}
    names = ["q", "k", "v"]
    if mask is not None:
        feeds["mask"] = mask
    if past:
        feeds |= {f"past_{n}": normal(2, kv_heads, 3, SIZE, seed=ord(n) + 9) for n in "kv"}
        names += ["mask" if mask is not None else "", "past_k", "past_v"]
    elif mask is not None:
        names.append("mask")
    inputs = [
        info(
            n, ["batch", *a.shape[1:]] if n != "mask" else list(a.shape), TensorProto.BOOL if a.dtype == bool else FLOAT
        )
        for n, a in feeds.items()
    ]
    made = ["y", "present_k", "present_v", "qk"][:outputs]
    shape = ["batch", LENGTH, HEADS * SIZE] if flat else ["batch", HEADS, LENGTH, SIZE]
    results = [info("y", shape), *(info(n, ["batch", kv_heads, None, SIZE]) for n in made[1:])]
    return write(
        path, [helper.make_node("Attention", names, made, "attn", **attributes)], inputs, results, opset=23
    ), feeds


def check(path: Path, feeds: Feeds, *flags: str) -> None:
    out = path.with_name("out.onnx")
    succeed("decompose-attention", path, out, *flags)
    onnx.checker.check_model(str(out), full_check=True)
    assert "Attention" not in ops(out)
    expected = np.asarray(ReferenceEvaluator(str(path)).run(None, feeds)[0])
    assert rel_l2(Session(out)(feeds)["y"], expected) <= 1e-6


BOOLEAN = np.tril(np.ones((LENGTH, LENGTH), bool), 1)
ADDED = normal(LENGTH, LENGTH, seed=5)


@pytest.mark.parametrize("kv_heads", [HEADS, KV, 1])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("causal", [0, 1])
def test_heads_layouts_and_causality(kv_heads: int, flat: bool, causal: int, tmp_path: Path) -> None:
    check(*model(tmp_path / "in.onnx", kv_heads=kv_heads, flat=flat, is_causal=causal))


@pytest.mark.parametrize(
    "mask",
    [
        BOOLEAN,
        ADDED,
        np.broadcast_to(BOOLEAN, (2, 1, LENGTH, LENGTH)).copy(),
        np.broadcast_to(ADDED, (1, HEADS, LENGTH, LENGTH)).copy(),
    ],
    ids=["bool", "float", "bool 4d", "float 4d"],
)
@pytest.mark.parametrize("causal", [0, 1])
def test_masks(mask: Array, causal: int, tmp_path: Path) -> None:
    check(*model(tmp_path / "in.onnx", mask=mask, is_causal=causal), "--no-check")


def test_a_boolean_mask_input_passes_the_numeric_check(tmp_path: Path) -> None:
    check(*model(tmp_path / "in.onnx", mask=np.broadcast_to(BOOLEAN, (2, 1, LENGTH, LENGTH)).copy()))


def test_scale(tmp_path: Path) -> None:
    check(*model(tmp_path / "in.onnx", scale=0.3))


def test_keys_of_another_length(tmp_path: Path) -> None:
    check(*model(tmp_path / "in.onnx", keys=7))


@pytest.mark.parametrize(
    ("options", "named"), [({"softcap": 5.0}, "softcap"), ({"past": True}, "input"), ({"outputs": 3}, "output")]
)
def test_what_has_no_rule_is_refused_by_name(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    path, _ = model(tmp_path / "in.onnx", **options)
    message = refuse("decompose-attention", path, tmp_path / "out.onnx", "--no-check")
    assert "attn" in message and named in message
    assert not (tmp_path / "out.onnx").exists()


def test_causal_with_more_keys_is_right_or_refused(tmp_path: Path) -> None:
    """ONNX aligns `is_causal` with the upper left corner where the lengths differ."""
    path, feeds = model(tmp_path / "in.onnx", keys=7, is_causal=1)
    try:
        check(path, feeds)
    except AssertionError:
        assert "attn" in refuse("decompose-attention", path, tmp_path / "out.onnx", "--no-check")
