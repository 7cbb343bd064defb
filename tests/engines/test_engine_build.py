"""Real builds: the manifest, several capabilities and profiles, atomicity, and every error line."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxtools.base.errors import JobError, UsageError
from onnxtools.engines.build.builder import get_builder
from onnxtools.engines.build.engine import build
from onnxtools.engines.build.manifest import hash_file
from onnxtools.engines.build.profiles import profiles_for
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.engines.trtexec.command_line import trtexec_line
from onnxtools.ir.model import Model
from tests.engines.conftest import Build
from tests.engines.graphs import (
    BF16,
    FIXTURES,
    FLOAT,
    HALF,
    INT64,
    files,
    fp8_linear,
    helper,
    linear,
    manifest,
    random,
    tensor,
    weights,
    write,
)

TE_LINEAR = FIXTURES / "te" / "te_linear_fp8_ds.onnx"
TE_GPT = FIXTURES / "te" / "te_gpt_fp8_ds_dyn.onnx"


def cached(path: Path, opset: int = 24) -> Path:
    """A cache that grows by Concat, read by a product."""
    nodes = [
        helper.make_node("Concat", ["past_key", "x"], ["present"], axis=1),
        helper.make_node("MatMul", ["present", "w"], ["y"]),
    ]
    inputs = [tensor("x", ["batch", "sequence", 64]), tensor("past_key", ["batch", "past_sequence", 64])]
    outputs = [tensor("present", ["batch", "total_sequence", 64]), tensor("y", ["batch", "total_sequence", 64])]
    return write(path, nodes, inputs, outputs, weights(w=random(64, 64)), opset=opset)


def test_manifest_says_what_was_built(tmp_path: Path, make: Build) -> None:
    source = linear(tmp_path / "m.onnx")
    engine = make(source, compute_capability=("8.9", "12.0"), tf32=False, builder_optimization_level=1)
    found = manifest(engine)
    assert found == engine.manifest
    plan = engine.path.read_bytes()
    assert found["engine"] == {"file": "e.engine", "bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()}
    assert found["graph"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert found["inputs"] == [{"name": "x", "dtype": "float16", "shape": [-1, -1, 64]}]
    assert found["outputs"] == [{"name": "y", "dtype": "float16", "shape": [-1, -1, 128]}]
    assert found["profiles"] == [
        {"name": "sequence", "inputs": {"x": {"min": [1, 1, 64], "opt": [2, 8, 64], "max": [2, 16, 64]}}}
    ]
    assert found["compute_capabilities"] == ["8.9", "12.0"]
    assert found["layers"]["types"]["MATRIX_MULTIPLY"] == 1
    assert found["backend"]["name"] == "tensorrt-rtx" and found["build_seconds"] > 0 and found["peak_rss_mib"] > 0
    assert b"sm89" in plan and b"sm120" in plan


def test_concat_cache_builds_with_two_profiles(tmp_path: Path, make: Build) -> None:
    engine = make(cached(tmp_path / "m.onnx"))
    assert [p["name"] for p in manifest(engine)["profiles"]] == ["context", "generation"]
    assert engine.path.stat().st_size > 0


@pytest.mark.parametrize("name", ["te_linear_fp8_ds", "te_gpt_fp8_ds_dyn"])
def test_te_exports_build_and_hold_fp8(make: Build, name: str) -> None:
    engine = make(FIXTURES / "te" / f"{name}.onnx", fp8=True)
    assert b"type=fp8_e4m3" in engine.path.read_bytes()
    graph = onnx.load(FIXTURES / "te" / f"{name}.onnx").graph
    assert [i["name"] for i in manifest(engine)["inputs"]] == [i.name for i in graph.input]
    assert manifest(engine)["layers"]["output_dtypes"]["float8_e4m3fn"] > 0


def test_standard_fp8_builds(tmp_path: Path, make: Build) -> None:
    assert b"type=fp8_e4m3" in make(fp8_linear(tmp_path / "m.onnx"), fp8=True).path.read_bytes()


def test_external_weights_are_hashed_and_a_model_in_memory_builds(tmp_path: Path) -> None:
    source = linear(tmp_path / "m.onnx")
    onnx.save(onnx.load(source), source, save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "out").mkdir()
    from_file = build(source, tmp_path / "out" / "a.engine", EngineSpec())
    assert from_file.manifest["weights"] == [hash_file(tmp_path / "m.data")]
    from_memory = build(Model.load(source), tmp_path / "out" / "b.engine", EngineSpec())
    assert from_memory.manifest["graph"]["file"] == "m.onnx"
    assert files(tmp_path / "out") == ["a.engine", "a.engine.json", "b.engine", "b.engine.json"]


def test_provenance_comes_from_the_model(tmp_path: Path, make: Build) -> None:
    model = onnx.load(linear(tmp_path / "m.onnx"))
    entry = {"input": "te.onnx", "passes": [{"pass": "convert"}]}
    helper.set_model_props(model, {"onnxtools.provenance": json.dumps([entry, {"input": "of another shape"}])})
    onnx.save(model, tmp_path / "m.onnx")
    assert manifest(make(tmp_path / "m.onnx"))["provenance"] == [entry]


# Refusals: each message names the object and the next step, and leaves no file.


def refused(make: Build, tmp_path: Path, source: Path, **options: Any) -> str:
    """The message of a refused build that left nothing behind and kept the engine that was there."""
    engine = tmp_path / "e.engine"
    engine.write_bytes(b"old")
    with pytest.raises((JobError, UsageError)) as caught:
        make(source, **options)
    assert engine.read_bytes() == b"old" and files(tmp_path) == ["e.engine"]
    return str(caught.value)


def test_fp8_needs_an_fp8_graph(tmp_path: Path, make: Build) -> None:
    message = refused(make, tmp_path, linear(tmp_path / "m.onnx"), fp8=True)
    assert (
        "no QuantizeLinear or DequantizeLinear in the graph is FP8; make one with `onnxtools quantize --fp8`" in message
    )


def test_int8_is_not_fp8(tmp_path: Path, make: Build) -> None:
    stored = weights(s=np.float32(0.5), z=np.int8(0))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    source = write(tmp_path / "m.onnx", nodes, [tensor("x", [4], FLOAT)], [tensor("y", [4], FLOAT)], stored)
    assert "is FP8" in refused(make, tmp_path, source, fp8=True)


@pytest.mark.parametrize("make_fp8", [lambda path: TE_LINEAR, fp8_linear])
def test_fp8_needs_ada(tmp_path: Path, make: Build, make_fp8: Any) -> None:
    message = refused(make, tmp_path, make_fp8(tmp_path / "m.onnx"), compute_capability=("8.9", "8.6"))
    assert "the graph is FP8, which compute capability 8.6 lacks; build for 8.9 or newer" in message


def test_cast_to_fp8_needs_ada_too(tmp_path: Path, make: Build) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=onnx.TensorProto.FLOAT8E4M3FN),
        helper.make_node("Cast", ["f"], ["y"], to=HALF),
    ]
    source = write(tmp_path / "m.onnx", nodes, [tensor("x", [4])], [tensor("y", [4])])
    assert "compute capability 8.0 lacks" in refused(make, tmp_path, source, compute_capability=("8.0",))


def test_unknown_capability(tmp_path: Path, make: Build) -> None:
    message = refused(make, tmp_path, linear(tmp_path / "m.onnx"), compute_capability=("9.0",))
    assert message.startswith(
        "--compute-capability 9.0 (H100, H200, GH200): tensorrt-rtx does not build for it; --compute-capability names "
        "another of 7.5"
    )
    assert "--print-trtexec prints the line" in message and "--backend tensorrt" in message


def test_ceilings(tmp_path: Path, make: Build) -> None:
    assert "opset 26, but tensorrt-rtx reads up to 25" in refused(make, tmp_path, linear(tmp_path / "m.onnx", opset=26))
    assert "IR version 14, but tensorrt-rtx reads up to 13" in refused(
        make, tmp_path, linear(tmp_path / "m.onnx", ir=14)
    )


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_scales(tmp_path: Path, make: Build, scale: float) -> None:
    message = refused(make, tmp_path, fp8_linear(tmp_path / "m.onnx", scale))
    assert message.startswith(
        f"node 'Q' (QuantizeLinear): its scale is {scale:g}, but TensorRT takes finite scales above 0 only"
    )
    assert message.endswith("(and 1 more such nodes)")


def test_scale_computed_from_constants(tmp_path: Path, make: Build) -> None:
    """TransformerEngine writes the reciprocal of a stored number."""
    stored = weights(inverse=np.float32(-2), s=np.float32(1))
    nodes = [
        helper.make_node("Reciprocal", ["inverse"], ["scale"], name="reciprocal"),
        helper.make_node("TRT_FP8QuantizeLinear", ["x", "scale"], ["q"], name="Q", domain="trt"),
        helper.make_node("TRT_FP8DequantizeLinear", ["q", "s"], ["y"], name="DQ", domain="trt"),
    ]
    source = write(
        tmp_path / "m.onnx",
        nodes,
        [tensor("x", [4, 8], FLOAT)],
        [tensor("y", [4, 8], FLOAT)],
        stored,
        opset=18,
        domains=["trt"],
    )
    assert refused(make, tmp_path, source).startswith("node 'Q' (trt::TRT_FP8QuantizeLinear): its scale is -0.5,")


def test_operator_the_parser_lacks(tmp_path: Path, make: Build) -> None:
    nodes = [
        helper.make_node("Bernoulli", ["x"], ["a"], name="b1"),
        helper.make_node("Bernoulli", ["a"], ["y"], name="b2"),
    ]
    message = refused(make, tmp_path, write(tmp_path / "m.onnx", nodes, [tensor("x", [4])], [tensor("y", [4])]))
    assert message.startswith("node 'b1' (Bernoulli): tensorrt-rtx's parser has no such operator")
    assert message.endswith("(and 1 more such nodes)")


def test_every_parser_error_names_node_operator_and_output(tmp_path: Path, make: Build) -> None:
    """GroupQueryAttention counts as supported until it is parsed."""
    nodes = [
        helper.make_node("Attention", ["q", "q", x], [y], name=f"/{y}/Attention", softcap=2.0)
        for x, y in (("q", "x"), ("x", "y"))
    ]
    lines = refused(
        make, tmp_path, write(tmp_path / "m.onnx", nodes, [tensor("q", [1, 4, 8, 32])], [tensor("y", None)])
    ).splitlines()
    assert "TensorRT-RTX's parser refuses 2 nodes; see it with `onnxtools inspect`" in lines[0]
    reason = "Setting softcap is not supported in TensorRT Attention"
    assert lines[1:] == [f"  node '/{y}/Attention' (Attention) -> '{y}': {reason}" for y in "xy"]
    mean = [helper.make_node("ReduceMean", ["x", "axes"], ["y"], name="/norm/ReduceMean")]
    source = write(tmp_path / "m.onnx", mean, [tensor("x", [4, 64]), tensor("axes", [1], INT64)], [tensor("y", None)])
    assert "node '/norm/ReduceMean' (ReduceMean): TensorRT takes the axes as an initializer" in refused(
        make, tmp_path, source
    )
    one = [
        helper.make_node(
            "GroupQueryAttention",
            ["q", "q", "q"],
            ["y"],
            name="gqa",
            domain="com.microsoft",
            num_heads=4,
            kv_num_heads=4,
        )
    ]
    source = write(tmp_path / "m.onnx", one, [tensor("q", [1, 8, 128])], [tensor("y", None)], domains=["com.microsoft"])
    assert "parser refuses node 'gqa' (GroupQueryAttention) -> 'y': " in refused(make, tmp_path, source)


def test_builder_error_is_one_line(tmp_path: Path, make: Build) -> None:
    """Inputs that must agree and cannot: only the builder sees it."""
    source = write(tmp_path / "m.onnx", [helper.make_node("Add", ["a", "b"], ["y"], name="sum")],
                   [tensor("a", ["n"]), tensor("b", ["m"])], [tensor("y", None)])  # fmt: skip
    text = {"min_shapes": ("a:2,b:3",), "opt_shapes": ("a:2,b:3",), "max_shapes": ("a:2,b:3",)}
    message = refused(make, tmp_path, source, **text)
    assert message.endswith(
        "cannot build it: API Usage Error (IElementWiseLayer sum: broadcast dimensions must be conformable); see the "
        "graph with `onnxtools inspect`"
    )


@pytest.mark.parametrize("longest", [16, 64])
def test_profile_that_no_run_can_have(tmp_path: Path, make: Build, longest: int) -> None:
    """TensorRT only warns when the largest shapes contradict a constant of the graph, and builds an engine that
    fails.
    """
    source = write(tmp_path / "m.onnx", [helper.make_node("Add", ["x", "table"], ["y"], name="positions")],
                   [tensor("x", ["sequence", 64])], [tensor("y", ["sequence", 64])],
                   weights(table=random(12, 64)))  # fmt: skip
    message = refused(make, tmp_path, source, max_seq_len=longest, opt_seq_len=12 if longest == 16 else None)
    assert "the graph cannot run in its profiles" in message and "lower --max-seq-len" in message


def test_values_that_decide_shapes(tmp_path: Path, make: Build) -> None:
    source = write(tmp_path / "m.onnx", [helper.make_node("Reshape", ["x", "shape"], ["y"], name="r")],
                   [tensor("x", [4, 4]), tensor("shape", [1], INT64)], [tensor("y", None)])  # fmt: skip
    assert "the values of input 'shape' decide shapes" in refused(make, tmp_path, source)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    source = linear(tmp_path / "m.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="its folder cannot be created"):
        build(source, tmp_path / "file" / "e.engine", EngineSpec())
    (tmp_path / "folder.json").mkdir()
    for name in ("folder", "folder.json"):
        with pytest.raises(JobError, match=r"folder\.json: is a folder; name "):
            build(source, tmp_path / name, EngineSpec())
    with pytest.raises(UsageError, match=r"m\.onnx is the model or its data file"):
        build(source, source, EngineSpec())
    assert onnx.load(source).graph.node


def test_timing_cache_is_left_alone(tmp_path: Path, make: Build) -> None:
    cache = tmp_path / "t.cache"
    source = linear(tmp_path / "m.onnx")
    assert manifest(make(source, timing_cache=str(cache)))["notes"] == [
        f"timing cache: TensorRT-RTX has none; {cache} not written"
    ]
    cache.write_bytes(b"kept")
    assert manifest(make(source, timing_cache=str(cache)))["notes"] == [
        f"timing cache: TensorRT-RTX has none; {cache} left as it is"
    ]
    assert cache.read_bytes() == b"kept"
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="its folder cannot be created"):
        make(source, timing_cache=str(tmp_path / "file" / "t.cache"))
    (note,) = manifest(make(source, timing_cache=str(tmp_path)))["notes"]
    assert f"{tmp_path}/no-gpu-tensorrt-rtx-1.7.1.cache not written" in note or "-tensorrt-rtx-" in note, (
        "a file for each GPU and version"
    )


FULL_DISK = """
import resource, sys
from pathlib import Path
from onnxtools.engines.build.engine import build
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.base.errors import JobError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    build(Path(sys.argv[1]), Path(sys.argv[2]), EngineSpec(max_seq_len=16))
except JobError as error:
    print(error)
"""


def test_full_disk_leaves_the_old_engine(tmp_path: Path) -> None:
    source, engine = linear(tmp_path / "m.onnx"), tmp_path / "e.engine"
    engine.write_bytes(b"old")
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(source), str(engine)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout == f"{engine}: cannot be written (File too large); free space or choose another folder\n"
    assert engine.read_bytes() == b"old" and files(tmp_path) == ["e.engine"]


def test_interrupt_cancels_and_leaves_nothing(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(300)]
    stored = weights(**{f"w{i}": random(64, 64) for i in range(300)})
    source = write(
        tmp_path / "m.onnx", nodes, [tensor("h0", ["batch", "sequence", 64])], [tensor("h300", None)], stored
    )
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(200):
            build(source, tmp_path / "e.engine", EngineSpec(max_seq_len=16))
    assert [name for name in files(tmp_path) if name.startswith(".")] == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_unknown_builder() -> None:
    with pytest.raises(UsageError, match="tensorrt-rtx"):
        get_builder("tensorrt-rt")


def test_bf16_and_dtype_names(tmp_path: Path, make: Build) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=FLOAT)]
    source = write(tmp_path / "m.onnx", nodes, [tensor("x", [4], BF16)], [tensor("y", [4], FLOAT)])
    found = manifest(make(source))
    assert (found["inputs"][0]["dtype"], found["outputs"][0]["dtype"]) == ("bfloat16", "float32")


def test_trtexec_line(tmp_path: Path) -> None:
    source = cached(tmp_path / "m.onnx")
    spec = EngineSpec(
        max_batch_size=1, max_seq_len=8, sparsity="enable", timing_cache="t c", tf32=False, builder_optimization_level=4
    )
    line = trtexec_line(Path("m.onnx"), Path("gpt.engine"), spec, profiles_for(Model.load(source), spec))
    assert line == (
        "trtexec --onnx=m.onnx --saveEngine=gpt.engine --skipInference --sparsity=enable '--timingCacheFile=t c'"
        " --builderOptimizationLevel=4 --noTF32 --profilingVerbosity=detailed"
        " --profile=0 --minShapes=x:1x1x64,past_key:1x0x64 --optShapes=x:1x4x64,past_key:1x0x64 "
        "--maxShapes=x:1x8x64,past_key:1x0x64"
        " --profile=1 --minShapes=x:1x1x64,past_key:1x1x64 --optShapes=x:1x1x64,past_key:1x4x64 "
        "--maxShapes=x:1x1x64,past_key:1x7x64"
    )
