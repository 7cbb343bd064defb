"""`precision`: near transformers' fp32, in the types it promises, with few casts."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("transformers")

from tests.calibration.texts import calibration_file
from tests.exporter import hf
from tests.generation.models import exported, reference
from tests.passes.test_folding import run
from tests.support import Session, info, refuse, rel_l2, stored, succeed, write
from tests.support import run as app

IDS = np.random.default_rng(2).integers(0, 97, (2, 9))
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def narrowed(tmp_path: Path, *flags: str, name: str = "llama", form: str = "concat") -> Path:
    succeed("precision", exported(name, form), tmp_path / "n.onnx", *flags)
    return tmp_path / "n.onnx"


@pytest.mark.parametrize("form", ["concat", "scatter", "gqa", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "nemotron", "llama_tied_biased"])
def test_fp16_is_near_and_its_caches_and_weights_are_fp16(name: str, form: str, tmp_path: Path) -> None:
    path = narrowed(tmp_path, "--to", "fp16", name=name, form=form)
    assert 1e-6 < rel_l2(run(path), hf.logits(reference(name), IDS, np.ones((2, 9), np.int64))) < 5e-3
    model = onnx.load(path)
    assert all(
        t.data_type != TensorProto.FLOAT for t in model.graph.initializer if len(t.dims) == 2 and "rope" not in t.name
    )
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    assert types["logits"] == TensorProto.FLOAT and all(t == TensorProto.FLOAT16 for n, t in types.items() if "." in n)


@pytest.mark.parametrize("opset", ["19", "24"])
@pytest.mark.parametrize("to", ["fp16", "bf16"])
def test_norms_softmax_and_rope_stay_wide(opset: str, to: str, tmp_path: Path) -> None:
    """Checked by onnx: every node's types fit, and those of the kind are fp32."""
    succeed("export", hf_folder(), "-o", tmp_path / "m.onnx", "--opset", opset)
    succeed("precision", tmp_path / "m.onnx", tmp_path / "n.onnx", "--to", to)
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "n.onnx"), strict_mode=True, check_type=True)
    onnx.checker.check_model(model, full_check=True)
    types = {
        v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    types |= {t.name: t.data_type for t in model.graph.initializer}
    seen = set()
    for node in model.graph.node:
        if node.op_type in ("Softmax", "RotaryEmbedding", "ReduceMean", "Sqrt"):
            seen.add(node.op_type)
            assert {types[name] for name in (node.input[0], node.output[0])} == {TensorProto.FLOAT}
        elif node.op_type in ("Gemm", "MatMul"):
            assert types[node.output[0]] == TYPES[to]
        elif node.op_type == "Attention":
            assert helper.get_node_attr_value(node, "softmax_precision") == TensorProto.FLOAT
    assert seen == ({"Softmax", "ReduceMean", "Sqrt"} if opset == "19" else {"RotaryEmbedding"})
    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    assert not any(
        node.input[0] in casts and types[casts[node.input[0]].input[0]] == types[node.output[0]]
        for node in casts.values()
    )


def hf_folder() -> Path:
    from tests.generation.models import checkpoint

    return checkpoint("llama")


def test_weights_are_rounded_to_nearest(tmp_path: Path) -> None:
    for to, dtype in (("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        found = {t.name: numpy_helper.to_array(t) for t in onnx.load(narrowed(tmp_path, "--to", to)).graph.initializer}
        for name, parameter in reference("llama").named_parameters():
            if name.endswith("proj.weight"):
                expected = parameter.detach().numpy().astype(dtype)
                np.testing.assert_array_equal(
                    found[f"{name}_{'float16' if to == 'fp16' else 'bfloat16'}"].view(np.uint16),
                    expected.view(np.uint16),
                )


def test_inputs_and_outputs_keep_their_types_when_asked(tmp_path: Path) -> None:
    before, after = (
        onnx.load(exported("llama", "concat")).graph,
        onnx.load(narrowed(tmp_path, "--to", "fp16", "--keep-io")).graph,
    )
    for old, new in zip((*before.input, *before.output), (*after.input, *after.output), strict=True):
        assert (old.name, old.type.tensor_type.elem_type) == (new.name, new.type.tensor_type.elem_type)
    assert rel_l2(run(tmp_path / "n.onnx"), hf.logits(reference("llama"), IDS, np.ones((2, 9), np.int64))) < 5e-3


def test_a_weight_beyond_fp16_is_named(tmp_path: Path) -> None:
    model = onnx.load(exported("llama", "concat"))
    tensor = next(t for t in model.graph.initializer if t.name.endswith("layers.0.mlp.up_proj.weight"))
    array = numpy_helper.to_array(tensor).copy()
    array[0, 0] = 70000
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "m.onnx")
    assert "up_proj.weight" in refuse("precision", tmp_path / "m.onnx", tmp_path / "n.onnx", "--no-check")
    assert not (tmp_path / "n.onnx").exists()
    succeed("precision", tmp_path / "m.onnx", tmp_path / "n.onnx", "--to", "bf16")


def test_values_that_fp16_cannot_hold_are_named_by_calibration(tmp_path: Path) -> None:
    model = onnx.load(exported("llama", "concat"))
    for tensor in model.graph.initializer:
        if "layers.1.mlp.up_proj" in tensor.name or "layers.1.post_attention" in tensor.name:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1000), tensor.name))
    onnx.save(model, tmp_path / "m.onnx")
    out = succeed(
        "precision", tmp_path / "m.onnx", tmp_path / "n.onnx", "--calib", calibration_file(tmp_path), "--no-check"
    ).out
    assert "exceed fp16's 65504" in out and "layers.1/mlp" in out
    out = succeed(
        "precision", exported("llama", "concat"), tmp_path / "o.onnx", "--calib", calibration_file(tmp_path)
    ).out
    assert "nothing exceeds fp16's 65504" in out and "values exceed" not in out


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("to", ["fp16", "bf16"])
def test_a_damaged_weight_is_named(to: str, value: float, tmp_path: Path) -> None:
    model = onnx.load(exported("llama", "concat"))
    tensor = next(t for t in model.graph.initializer if t.name.endswith("layers.1.mlp.up_proj.weight"))
    array = numpy_helper.to_array(tensor).copy()
    array[3, 5] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "m.onnx")
    assert "layers.1.mlp.up_proj.weight' has infinite or NaN" in refuse(
        "precision", tmp_path / "m.onnx", tmp_path / "n.onnx", "--to", to, "--no-check"
    )
    assert not list(tmp_path.glob("n.onnx*"))
    told = app("validate", tmp_path / "m.onnx", tmp_path / "m.onnx")
    assert told.code == 1 and "is NaN or infinite; look for a damaged weight" in " ".join(told.out.split())


def test_a_model_without_fp32_weights_says_so(tmp_path: Path) -> None:
    narrowed(tmp_path)
    assert "nothing to narrow" in succeed("precision", tmp_path / "n.onnx", tmp_path / "o.onnx").out


def test_one_cast_serves_all_readers(tmp_path: Path) -> None:
    """x is narrow for two products and wide for a softmax: two casts of the input, whatever the number of readers."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["u"], "first"), helper.make_node("Softmax", ["u"], ["s"], "softmax"),
        helper.make_node("Exp", ["u"], ["e"], "exp"), helper.make_node("Add", ["s", "e"], ["t"], "sum"),
        helper.make_node("MatMul", ["t", "b"], ["y"], "second"), helper.make_node("MatMul", ["t", "a"], ["z"], "third"),
    ]  # fmt: skip
    arrays = stored(a=np.eye(8, dtype=np.float32), b=np.ones((8, 8), np.float32))
    path = write(tmp_path / "m.onnx", nodes, [info("x", [4, 8])], [info("y", [4, 8]), info("z", [4, 8])], arrays)
    succeed("precision", path, tmp_path / "n.onnx", "--keep-io")
    casts = [node for node in onnx.load(tmp_path / "n.onnx").graph.node if node.op_type == "Cast"]
    assert len(casts) == 5  # x, u, t, and the two outputs
    feeds = {"x": np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)}
    for name, array in Session(tmp_path / "n.onnx")(feeds).items():
        assert rel_l2(array, Session(path)(feeds)[name]) < 2e-3
