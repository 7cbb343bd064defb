"""What each TensorRT is told: command lines, builder settings, refusals; logs and inspector output as those versions
wrote them.

None of these versions is on this machine. The lines are golden files, reviewed against the help text of their version;
the names that the Python interface is called with are compared with those of the real bindings (data/trt_api.json says
how they were read).
"""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import helper

from onnxtools.base.errors import JobError, UsageError
from onnxtools.engines.build.audit import holds, read_layers, summary
from onnxtools.engines.build.many import engine_paths
from onnxtools.engines.build.profiles import Profile, profiles_for
from onnxtools.engines.build.sparse_weights import check_sparsity
from onnxtools.engines.build.spec import EngineSpec, pool_size, version_of
from onnxtools.engines.build.timing_cache import TimingCache
from onnxtools.engines.build.versions import ceilings, check_options, is_mixed, is_strongly_typed
from onnxtools.engines.trtexec.command_line import trtexec_line
from onnxtools.engines.trtexec.trtexec_builder import read_log, read_version
from onnxtools.ir.model import Model
from tests.engines.graphs import FLOAT, random, tensor, two_of_four, weights, write
from tests.support import run, succeed

HERE = Path(__file__).parent
API: dict[str, Any] = json.loads((HERE / "data/trt_api.json").read_text())
TINY = (
    "--family llama --n-layer 2 --n-embd 64 --n-head 4 --n-kv-head 2 --n-inner 128 --vocab-size 97 --n-positions 256 "
    "--dtype fp16"
)


# --- command lines
# --------------------------------------------------------------------------------------------------------

DEMO = {
    "fp8": True, "fp16": True, "strongly_typed": False, "sparsity": "enable", "timing_cache": "functional.cache",
    "profiling_verbosity": "layer_names_only",
    "max_batch_size": 1, "max_seq_len": 256,
}  # fmt: skip
FULL = {
    "sparsity": "enable", "timing_cache": "t.cache", "error_on_cache_miss": True, "mem_pool_size": ("workspace:4G",),
    "builder_optimization_level": 4,
    "tiling_optimization_level": "fast", "hardware_compatibility_level": "ampere+", "version_compatible": True,
    "refit": True, "strip_weights": True,
    "allow_weight_streaming": True, "tf32": False, "plugins": ("a.so", "b.so"), "device": 1, "max_batch_size": 4,
    "max_input_len": 128, "max_output_len": 64,
}  # fmt: skip
OLD = {
    "fp16": True, "int8": True, "sparsity": "force", "timing_cache": "t.cache",
    "mem_pool_size": ("workspace:512", "dlaSRAM:1.5M"),
    "hardware_compatibility_level": "ampere+", "version_compatible": True, "tactic_sources": "-CUDNN,+CUBLAS",
    "min_shapes": ("input_ids:1x1,*:1x1",),
}  # fmt: skip
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "trtexec-8.6": ("8.6", {key: value for key, value in OLD.items() if key != "min_shapes"}),
    "trtexec-9.3-seed-demo": ("9.3", DEMO),
    "trtexec-10.13": ("10.13", FULL), "trtexec-11.4": ("11.4", FULL),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for form in ("none", "concat", "scatter"):
        succeed("export", "--random", *TINY.split(), "--kv-cache", form, "-o", folder / f"{form}.onnx")
        found[form] = folder / f"{form}.onnx"
    return found


def profiles(path: Path, spec: EngineSpec) -> list[Profile]:
    return profiles_for(Model.load(path), spec)


@pytest.mark.parametrize("name", LINES)
def test_trtexec_lines_are_the_golden_ones(name: str, models: dict[str, Path]) -> None:
    version, options = LINES[name]
    source = models["none" if version == "8.6" else "concat"]
    spec = EngineSpec(**options)
    line = trtexec_line(
        Path("gpt.onnx"), Path("gpt.engine"), spec, profiles(source, spec), version_of(version), mixed=True
    )
    assert line.replace(" --", " \\\n  --") + "\n" == (HERE / f"golden/{name}.txt").read_text()


def test_profile_and_its_shapes_stand_together_and_no_input_is_lost(models: dict[str, Path]) -> None:
    spec = EngineSpec(**DEMO)
    words = shlex.split(trtexec_line(Path("m.onnx"), Path("e"), spec, profiles(models["concat"], spec), (10, 13)))
    at = [index for index, word in enumerate(words) if word.startswith("--profile=")]
    assert [words[index] for index in at] == ["--profile=0", "--profile=1"]
    for index in at:
        assert [word.split("=")[0] for word in words[index + 1 : index + 4]] == [
            "--minShapes",
            "--optShapes",
            "--maxShapes",
        ]
    names = {entry.rsplit(":", 1)[0] for entry in words[at[0] + 1].split("=", 1)[1].split(",")}
    assert names == {"input_ids", "attention_mask", "position_ids", "past_key_values.*.key", "past_key_values.*.value"}


def test_trtexec_8_6_takes_one_profile(models: dict[str, Path]) -> None:
    spec = EngineSpec()
    with pytest.raises(UsageError, match="builds one profile, not context, generation"):
        trtexec_line(Path("m.onnx"), Path("e"), spec, profiles(models["concat"], spec), (8, 6))


def test_print_trtexec_is_a_command(models: dict[str, Path], tmp_path: Path) -> None:
    line = succeed(
        "build", models["concat"], tmp_path / "e.engine", "--print-trtexec", "--tensorrt-version", "11.4", "--no-tf32"
    ).out
    assert "--noTF32" in line and "--profile=1" in line and not (tmp_path / "e.engine").exists()


@pytest.mark.parametrize(("options", "says"), [
    (["--tensorrt-version", "10.13"], "opset 24, but trtexec reads up to 22"),
    (["--tensorrt-version", "12.0"], "8.6 to 11"), (["--fp8"], "no QuantizeLinear"),
    (["--sparsity"], "prune them"), (["--max-seq-len", "512"], "has 256 positions"),
    (["--max-seq-len", "99999999999"], "positions"),
])  # fmt: skip
def test_what_is_printed_is_checked_as_what_is_built(
    options: list[str], says: str, models: dict[str, Path], tmp_path: Path
) -> None:
    result = run("build", models["concat"], tmp_path / "e.engine", "--print-trtexec", *options)
    assert result.code in (1, 2) and says in result.err and not result.out


def test_printed_lines_are_json_where_asked(models: dict[str, Path], tmp_path: Path) -> None:
    (found,) = json.loads(succeed("build", models["concat"], tmp_path / "e.engine", "--print-trtexec", "--json").out)
    assert found["line"].startswith("trtexec --onnx=")


# --- what exists where
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "version", "says"), [
    ({"strip_weights": True}, (9, 3), "came with 10"),
    ({"tiling_optimization_level": "full"}, (10, 0), "came with 10.8"),
    ({"bf16": True}, (8, 6), "came with 9"), ({"int4": True}, (9, 3), "came with 10"),
    ({"strongly_typed": True}, (8, 6), "came with 9"),
    ({"timing_cache": "t", "error_on_cache_miss": True}, (8, 6), "came with 9"),
    ({"hardware_compatibility_level": "sameComputeCapability"}, (10, 3), "10.9"),
    ({"strongly_typed": False}, (11, 4), "always strongly typed"),
    ({"tactic_sources": "-CUDNN"}, (11, 4), "EDGE_MASK_CONVOLUTIONS"),
    ({"mem_pool_size": ("tacticSharedMem:1M",)}, (8, 6), "no such pool"),
    ({"fp8": True, "int8": True, "strongly_typed": False}, (10, 13), "take one of them"),
])  # fmt: skip
def test_what_a_version_lacks_is_refused(options: dict[str, Any], version: tuple[int, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_options(EngineSpec(**options), "trtexec", version)


@pytest.mark.parametrize(
    "options",
    [
        {"version_compatible": True},
        {"hardware_compatibility_level": "ampere+"},
        {"tactic_sources": "+JIT_CONVOLUTIONS"},
    ],
)
def test_what_tensorrt_rtx_lacks_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="TensorRT-RTX has none"):
        check_options(EngineSpec(**options), "tensorrt-rtx", (1, 7))


def test_typing_follows_graph_and_version(models: dict[str, Path]) -> None:
    spec = EngineSpec()
    assert [is_strongly_typed(spec, "tensorrt", version, True) for version in ((8, 6), (9, 3), (10, 13), (11, 4))] == [
        False,
        True,
        True,
        True,
    ]
    assert not is_strongly_typed(spec, "tensorrt", (10, 13), False) and is_strongly_typed(
        spec, "tensorrt-rtx", (1, 7), False
    )
    assert not is_strongly_typed(EngineSpec(strongly_typed=False), "tensorrt", (10, 13), True)
    assert is_mixed(Model.load(models["concat"])), "fp16 weights, fp32 norms and logits"


def test_ceilings() -> None:
    assert [ceilings(version)[0] for version in ((8, 6), (9, 3), (10, 13), (11, 4))] == [17, 19, 22, 24]


@pytest.mark.parametrize(
    ("text", "size"),
    [("workspace:1", 1 << 20), ("workspace:4G", 4 << 30), ("dlaSRAM:1.5K", 1536), ("tacticSharedMem:7B", 7)],
)
def test_pool_sizes(text: str, size: int) -> None:
    assert pool_size(text)[1] == size


@pytest.mark.parametrize("options", [
    {"mem_pool_size": ("workspce:1",)}, {"mem_pool_size": ("workspace:1T",)}, {"max_output_len": 4},
    {"max_input_len": 9, "max_seq_len": 8},
    {"opt_batch_size": 9},
    {"error_on_cache_miss": True}, {"tensorrt_version": "8.6", "strongly_typed": True},
])  # fmt: skip
def test_options_that_contradict_each_other(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--"):
        EngineSpec(**options)


def test_lengths_of_derived_profiles(models: dict[str, Path]) -> None:
    context, generation = profiles(
        models["concat"],
        EngineSpec(max_batch_size=4, opt_batch_size=2, max_input_len=24, max_output_len=8, opt_seq_len=16),
    )
    assert context.as_json()["inputs"]["input_ids"] == {"min": [1, 1], "opt": [2, 16], "max": [4, 24]}
    key = "past_key_values.0.key"
    assert generation.as_json()["inputs"][key] == {"min": [1, 2, 1, 16], "opt": [2, 2, 16, 16], "max": [4, 2, 31, 16]}


# --- the Python interface
# -------------------------------------------------------------------------------------------------


class Recorded:
    """An object with the members that the real one has, and no others; remembers what was set and called."""

    def __init__(self, kind: str, version: str) -> None:
        object.__setattr__(self, "_members", set(API[version][kind]))
        object.__setattr__(self, "calls", [])

    def __getattr__(self, name: str) -> Any:
        if name not in self._members:
            raise AttributeError(name)
        return lambda *args, **options: (
            self.calls.append((name, *args)) or (0 if name == "add_optimization_profile" else True)
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._members:
            raise AttributeError(name)
        self.calls.append((name, value))


def module(version: str) -> Any:
    """The names of `tensorrt`; enum members are their own names."""
    enums = {
        kind: SimpleNamespace(**{name: name for name in members})
        for kind, members in API[version].items()
        if members[0].isupper()
    }
    registry = SimpleNamespace(load_library=lambda path: None)
    return SimpleNamespace(**enums, ILogger=object, get_plugin_registry=lambda: registry)


@pytest.mark.parametrize("version", ["10.13", "11.4"])
def test_builder_settings_exist_under_their_names(version: str) -> None:
    pytest.importorskip("polygraphy")
    from onnxtools.engines.tensorrt.python_api import ApiBuilder

    trt = module(version)
    builder, config = ApiBuilder.__new__(ApiBuilder), Recorded("IBuilderConfig", version)
    builder.trt = trt
    made = SimpleNamespace(create_builder_config=lambda: config)
    builder._config(made, [], EngineSpec(**{**FULL, "device": 0, "plugins": (__file__,)}))
    assert config.calls == [
        ("profiling_verbosity", "DETAILED"), *(("set_flag", flag) for flag in
        ("SPARSE_WEIGHTS", "REFIT", "STRIP_PLAN", "WEIGHT_STREAMING", "VERSION_COMPATIBLE",
            "ERROR_ON_TIMING_CACHE_MISS")), ("clear_flag", "TF32"),
        ("builder_optimization_level", 4), ("tiling_optimization_level", "FAST"),
        ("set_memory_pool_limit", "WORKSPACE", 4 << 30),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("version", "strong", "flags"), [("10.13", False, ["FP16", "FP8"]), ("10.13", True, []), ("11.4", True, [])]
)
def test_tensorrt_gets_precision_flags_only_where_it_has_them(
    version: str, strong: bool, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    trt = module(version)
    trt.Builder, trt.__version__ = object, f"{version}.0"
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    # A module of its own, which the tests that follow in this process do not find.
    spec = importlib.util.find_spec("onnxtools.engines.tensorrt.trt_builder")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)

    builder, config = made.TensorRTBuilder.__new__(made.TensorRTBuilder), Recorded("IBuilderConfig", version)
    builder.trt = trt
    builder.configure(config, EngineSpec(fp8=True, fp16=True, hardware_compatibility_level="ampere+"), strong=strong)
    assert [call[1] for call in config.calls if call[0] == "set_flag"] == flags
    assert ("hardware_compatibility_level", "AMPERE_PLUS") in config.calls


class Bytes:
    """A timing cache of this test: sorted letters; what TensorRT's own merges is its own affair."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def combine(self, other: Bytes, *, ignore_mismatch: bool) -> bool:
        self.data = bytes(sorted({*self.data, *other.data}))
        return True

    def queryKeys(self) -> list[int]:
        return list(self.data)

    def serialize(self) -> bytes:
        return self.data


class Config:
    def create_timing_cache(self, data: bytes) -> Bytes | None:
        return None if data == b"damaged" else Bytes(data)

    def set_timing_cache(self, cache: Bytes, *, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> Bytes:
        return self.cache


def test_timing_caches_of_builds_that_overlap_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "t.cache"
    first, second = TimingCache(a := Config(), path), TimingCache(b := Config(), path)
    a.cache.data, b.cache.data = b"ab", b"bc"
    first.save()
    assert path.read_bytes() == b"ab"
    assert "0 timings known, 2 measured" in second.save()[0] and path.read_bytes() == b"abc"
    again = TimingCache(Config(), path)
    assert "3 timings known, 0 measured" in again.save()[0]
    assert [p.name for p in tmp_path.iterdir() if p.suffix not in (".cache", ".lock")] == []


def test_a_damaged_timing_cache_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "t.cache").write_bytes(b"damaged")
    with pytest.raises(JobError, match="is no timing cache of this TensorRT"):
        TimingCache(Config(), tmp_path / "t.cache")
    assert (tmp_path / "t.cache").read_bytes() == b"damaged"


# --- what TensorRT tells
# --------------------------------------------------------------------------------------------------


def test_inspector_layers_of_tensorrt_8() -> None:
    """NVIDIA's own sample (the file says where it is from)."""
    layers = read_layers(json.loads((HERE / "data/inspector_trt8.json").read_text()))
    assert [(x.kind, x.inputs, x.outputs, x.weights) for x in layers] == [
        ("Reformat", ("fp32",), ("int8",), ""), ("CaskConvolution", ("int8",), ("int8",), "int8"),
        ("TiledPooling", ("fp16",), ("fp16",), ""),
    ]  # fmt: skip
    assert layers[1].tactic.startswith("volta_int8x4") and not layers[1].sparse
    found = summary(layers, {})
    assert (
        found["source"] == "engine inspector"
        and holds(found, "int8")
        and holds(found, "fp16")
        and not holds(found, "fp8")
    )


def test_inspector_layers_of_tensorrt_10_name_their_onnx_nodes() -> None:
    (layer,) = read_layers(json.loads((HERE / "data/inspector_trt10.json").read_text()))
    assert layer.kind == "Reformat" and all(layer.inputs + layer.outputs)


def test_sparse_kernels_are_known_by_their_tactic() -> None:
    """A name from NVIDIA's UNet report; the weights' own flag says nothing of the kernel."""
    entry = {
        "Name": "a",
        "TacticName": "sm80_xmma_fprop_sparse_conv_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_sptensor16x8x32",
        "HasSparseWeights": 0,
    }
    assert read_layers({"Layers": [entry, {"Name": "b", "TacticName": "sm80_xmma_gemm", "HasSparseWeights": 1}]})[
        0
    ].sparse
    assert not read_layers({"Layers": [{"Name": "b", "TacticName": "sm80_xmma_gemm", "HasSparseWeights": 1}]})[0].sparse
    assert read_layers({"Layers": ["a name alone"]}) == []


def test_sparsity_by_product_says_which_kernel_was_taken(tmp_path: Path) -> None:
    """The engine's layers are in the inspector's form: several ONNX nodes in one, a node that is not named, one in two
    layers.
    """
    wide, plain = two_of_four(random(256, 256, dtype=np.float32), axis=0), random(256, 256, dtype=np.float32)
    stored = weights(a=wide, b=wide, c=plain, d=plain[:, :6], q=(9 * wide).astype(np.int8), s=np.float32(1))
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h0"], name="taken"),
        helper.make_node("MatMul", ["h0", "b"], ["h1"], name="beaten"),
    ]
    nodes += [
        helper.make_node("MatMul", ["h1", "c"], ["h2"], name="whole"),
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], name="dq"),
    ]
    nodes += [
        helper.make_node("MatMul", ["h2", "w"], ["h3"], name="coded"),
        helper.make_node("MatMul", ["h3", "d"], ["y"], name="narrow"),
    ]
    model = Model.load(
        write(tmp_path / "m.onnx", nodes, [tensor("x", [4, 256], FLOAT)], [tensor("y", [4, 6], FLOAT)], stored)
    )
    engine = read_layers({"Layers": [
        {"Name": "1", "TacticName": "sm80_xmma_gemm_sparse_f16",
            "Metadata": "[ONNX Layer: taken]\u001e[ONNX Layer: other]"},
        {"Name": "2", "TacticName": "sm80_xmma_gemm", "Metadata": "[ONNX Layer: beaten]"},
        {"Name": "3", "TacticName": "reformat", "Metadata": "[ONNX Layer: taken]"},
    ]})  # fmt: skip
    found = {layer.node: layer for layer in check_sparsity(model).built(engine).layers}
    assert {name: (layer.is_2_4, layer.kernel) for name, layer in found.items()} == {
        "taken": (True, "sparse"), "beaten": (True, "dense"), "whole": (False, ""), "coded": (True, ""),
        "narrow": (False, ""),
    }  # fmt: skip
    assert found["taken"].reason == found["beaten"].reason == "" and (found["narrow"].k, found["narrow"].n) == (256, 6)
    assert "groups of four are dense" in found["whole"].reason and "Q/DQ" in found["coded"].reason


def test_a_parsed_network_stands_in_and_says_so() -> None:
    found = summary(None, {"float8_e4m3fn": 3, "float16": 9})
    assert (
        found["source"] == "parsed network"
        and holds(found, "fp8")
        and holds(found, "fp16")
        and not holds(found, "int8")
    )


LOG = """[03/23/2021-00:14:05] [I] [TRT] (Sparsity) Layers eligible for sparse math: conv1, conv2, conv3
[03/23/2021-00:14:05] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: conv2, conv3
[04/27/2026-18:38:45] [W] [TRT] Tactic Device request: 4096MB Available: 307MB. Device memory is insufficient to use tactic.
[04/24/2026-04:49:03] [I] Engine built in 12.5 sec.
&&&& PASSED TensorRT.trtexec [TensorRT v101000] [b31] # trtexec
"""


def test_a_log_is_read() -> None:
    log = read_log(LOG.splitlines())
    assert (log.eligible, log.picked, log.seconds, log.passed) == (3, 2, 12.5, True)
    assert log.notes() == ["trtexec built it in 12.5 s", "sparsity: 2 of 3 eligible layers took a sparse kernel"]
    assert log.warnings == [
        "Tactic Device request: 4096MB Available: 307MB. Device memory is insufficient to use tactic."
    ]
    newer = read_log(["[01/01/2026-00:00:00] [I] [TRT] (Sparsity) Found 39 layer(s) eligible to use sparse tactics",
                      "[01/01/2026-00:00:00] [I] [TRT] (Sparsity) Chose 0 layer(s) using sparse tactics"])  # fmt: skip
    assert (newer.eligible, newer.picked) == (39, 0)
    failed = read_log(
        [
            "[10/05/2025-10:46:31] [E] Unknown option: --workspace 2048",
            "&&&& FAILED TensorRT.trtexec [TensorRT v100300] # x",
        ]
    )
    assert failed.errors == ["Unknown option: --workspace 2048"] and not failed.passed


@pytest.mark.parametrize(("text", "version"), [
    ("&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec", (8, 6, 1)),
    ("&&&& RUNNING TensorRT.trtexec [TensorRT v101602] [b10] # x", (10, 16, 2)),
    ("&&&& FAILED TensorRT.trtexec [TensorRT v110201] # x", (11, 2, 1)), ("nothing", None),
])  # fmt: skip
def test_versions_are_read(text: str, version: tuple[int, ...] | None) -> None:
    assert read_version(text) == version


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="would both become"):
        engine_paths([tmp_path / "a/m.onnx", tmp_path / "b/m.onnx"], tmp_path)
