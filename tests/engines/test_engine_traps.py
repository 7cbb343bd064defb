"""What TensorRT misreads: refused with the node's name, or mended and read back from the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx as trt

from onnxtools.base.errors import JobError
from onnxtools.engines.tensorrt.network import attentions, mend_attention
from tests.engines.conftest import Build
from tests.engines.graphs import (
    BOOL,
    FIXTURES,
    FLOAT,
    HALF,
    INT64,
    attention,
    helper,
    manifest,
    random,
    tensor,
    two_of_four,
    weights,
    write,
)
from tests.support import succeed


def parse(source: Path) -> tuple[Any, ...]:
    """(network, and what must outlive it)."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(source))
    return network, parser, builder


def refusal(make: Build, source: Path) -> str:
    with pytest.raises(JobError) as caught:
        make(source)
    return str(caught.value)


LENGTHS = tensor("lengths", ["batch"], INT64)
PAST = [(4, tensor("pk", ["batch", 4, "past", 32])), (5, tensor("pv", ["batch", 4, "past", 32]))]


def test_nonpad_kv_seqlen_is_refused(tmp_path: Path, make: Build) -> None:
    """The trap itself: the parser drops the input, so a build would answer with other numbers."""
    source = attention(tmp_path / "m.onnx", extra=[(6, LENGTHS)])
    (layer,) = attentions(trt, parse(source)[0])
    assert layer.key_value_lengths is None
    assert refusal(make, source).startswith(
        "node '/attn/Attention' (Attention): TensorRT's parser drops its nonpad_kv_seqlen input"
    )


def test_causal_on_other_lengths_is_refused(tmp_path: Path, make: Build) -> None:
    for keys in ("total_sequence", 32):
        message = refusal(make, attention(tmp_path / "m.onnx", keys=keys, is_causal=1))
        assert message.startswith(
            "node '/attn/Attention' (Attention): is_causal=1 on other lengths of queries and keys"
        )
        assert "`onnxtools decompose-attention IN OUT` writes an explicit mask" in message


def test_causal_on_equal_lengths_builds_as_it_is(tmp_path: Path, make: Build) -> None:
    """A square mask has one lower triangle, so upper-left and lower-right alignment agree."""
    source = attention(tmp_path / "m.onnx", is_causal=1)
    (layer,) = attentions(trt, parse(source)[0])
    assert layer.causal_kind == trt.CausalMaskKind.UPPER_LEFT
    assert make(source).path.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": HALF, "is_causal": 1}, "cannot combine is_causal with a mask"),
        ({"extra": PAST}, "takes no past_key or past_value input; concatenate the cache outside"),
        ({"outputs": 3}, "takes an Attention with one output only"),
    ],
)
def test_attention_that_tensorrt_cannot_take(
    tmp_path: Path, make: Build, options: dict[str, Any], message: str
) -> None:
    assert message in refusal(make, attention(tmp_path / "m.onnx", **options))


def test_fp32_attention_is_made_decomposable(tmp_path: Path, make: Build) -> None:
    source = attention(tmp_path / "m.onnx", dtype=FLOAT)
    network, *_alive = parse(source)
    assert not attentions(trt, network)[0].decomposable
    assert mend_attention(trt, network) == ["1 Attention nodes marked decomposable"]
    assert attentions(trt, network)[0].decomposable
    assert manifest(make(source))["mends"] == ["1 Attention nodes marked decomposable"]


@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_boolean_mask_is_made_additive(tmp_path: Path, make: Build, dtype: int) -> None:
    source = attention(tmp_path / "m.onnx", dtype=dtype, mask=BOOL)
    network, *_alive = parse(source)
    assert attentions(trt, network)[0].mask.dtype == trt.DataType.BOOL
    assert mend_attention(trt, network)[1] == "1 boolean attention masks made additive"
    assert attentions(trt, network)[0].mask.dtype == attentions(trt, network)[0].get_input(0).dtype
    assert "1 boolean attention masks made additive" in manifest(make(source))["mends"]


def test_boolean_mask_takes_the_fused_kernel(tmp_path: Path, make: Build) -> None:
    """Unmended, fp16 with a boolean mask is 1.46 MB (TensorRT-RTX 1.7.1); the additive graph is 0.31 MB."""
    assert make(attention(tmp_path / "m.onnx", mask=BOOL)).path.stat().st_size < 800_000


def scatter(path: Path, rank: int = 4, **attributes: Any) -> Path:
    heads: list[int | str] = [4] if rank == 4 else []
    dims = [
        tensor("cache", ["batch", *heads, 64, 32]),
        tensor("new", ["batch", *heads, "sequence", 32]),
        tensor("at", ["batch"], INT64),
    ]
    node = helper.make_node("TensorScatter", ["cache", "new", "at"], ["y"], name="/cache/TensorScatter", **attributes)
    return write(path, [node], dims, [tensor("y", None)])


def test_tensor_scatter(tmp_path: Path, make: Build) -> None:
    text = "cache:1x4x64x32,new:1x4x{}x32,at:1"
    shapes = {f"{which}_shapes": (text.format(n),) for which, n in (("min", 1), ("opt", 2), ("max", 4))}
    assert make(scatter(tmp_path / "m.onnx"), **shapes).path.exists()
    for source in (scatter(tmp_path / "m.onnx", rank=3), scatter(tmp_path / "c.onnx", mode="circular")):
        message = refusal(make, source)
        assert message.startswith(
            "node '/cache/TensorScatter' (TensorScatter): TensorRT takes rank 4, axis -2 and mode linear, not rank"
        )


def test_foreign_operator_with_an_onnx_name(tmp_path: Path, make: Build) -> None:
    """The parser reads acme::Relu as ONNX's Relu."""
    node = helper.make_node("Relu", ["x"], ["y"], name="mine", domain="acme")
    source = write(tmp_path / "m.onnx", [node], [tensor("x", [4])], [tensor("y", [4])], domains=["acme"])
    assert parse(source)[0].num_layers > 0
    assert refusal(make, source).startswith("node 'mine' (acme::Relu): TensorRT would read it as ONNX's Relu")


# 2:4 weights


def products(path: Path, sparse: tuple[bool, bool, bool]) -> Path:
    """x @ a, Gemm with b transposed, and c behind Transpose and Cast: K is axis 0, 1 and 1 of what is stored."""
    a, b, c = random(64, 64), random(64, 64), random(64, 64).astype("float32")
    a, b, c = (two_of_four(w, axis) if yes else w for w, axis, yes in zip((a, b, c), (0, 1, 1), sparse, strict=True))
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("Gemm", ["h", "b"], ["g"], name="second", transB=1),
        helper.make_node("Transpose", ["c"], ["ct"], name="t", perm=[1, 0]),
        helper.make_node("Cast", ["ct"], ["ch"], name="cast", to=HALF),
        helper.make_node("MatMul", ["g", "ch"], ["y"], name="third"),
    ]
    return write(path, nodes, [tensor("x", [4, 64])], [tensor("y", [4, 64])], weights(a=a, b=b, c=c))


def test_sparsity_counts(tmp_path: Path, make: Build) -> None:
    found = manifest(make(products(tmp_path / "m.onnx", (True, True, True)), sparsity="enable"))
    assert (found["sparsity"]["sparse"], found["sparsity"]["total"]) == (3, 3)
    assert found["notes"] == ["sparsity: 3 of 3 products have 2:4 weights"]
    found = manifest(make(products(tmp_path / "m.onnx", (True, False, True)), sparsity="enable"))
    assert found["notes"] == ["sparsity: 2 of 3 products have 2:4 weights; dense: b"]
    assert [(one["node"], one["op"], one["k"], one["n"], one["is_2_4"],
        one["kernel"]) for one in found["sparsity"]["layers"]] == [
        ("first", "MatMul", 64, 64, True, ""), ("second", "Gemm", 64, 64, False, ""),
        ("third", "MatMul", 64, 64, True, ""),
    ]  # fmt: skip
    assert (
        "below 256" in found["sparsity"]["layers"][0]["reason"]
        and "of 1024 groups of four are dense" in found["sparsity"]["layers"][1]["reason"]
    )


def test_sparsity_without_sparse_weights(tmp_path: Path, make: Build) -> None:
    source = products(tmp_path / "m.onnx", (False, False, False))
    with pytest.raises(
        JobError,
        match=r"0 of 3 products have 2:4 weights along the summed axis \(a: .* groups of four are dense\); prune them "
        r"with `onnxtools prune IN OUT`",
    ):
        make(source, sparsity="enable")
    assert manifest(make(source))["sparsity"] is None


def test_sparse_along_the_wrong_axis_does_not_count(tmp_path: Path, make: Build) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")
    stored = weights(w=two_of_four(random(64, 64), axis=1))
    source = write(tmp_path / "m.onnx", [node], [tensor("x", [4, 64])], [tensor("y", [4, 64])], stored)
    with pytest.raises(JobError, match="0 of 1 products"):
        make(source, sparsity="enable")


@pytest.mark.parametrize(("name", "operator", "remedy"), [
    ("attention_op", "ReduceMean", []), ("padding_mask", "ReduceMean", []),
    ("gpt_mxfp8", "TRT_MXFP8DequantizeLinear", ["--keep-mx", "--no-check"]),
])  # fmt: skip
def test_what_the_parser_would_refuse_is_named_before_and_the_remedy_helps(
    name: str, operator: str, remedy: list[str], tmp_path: Path, make: Build
) -> None:
    source = FIXTURES / "te_style" / f"{name}.onnx"
    with pytest.raises(JobError, match=rf"{operator}\): .*onnxtools convert"):
        make(source)
    succeed("convert", source, tmp_path / "converted.onnx", *remedy)
    make(tmp_path / "converted.onnx")
