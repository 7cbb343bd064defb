"""What `export`'s options do to the graph and the files; expected values from transformers and from the checkpoint
itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("transformers", reason="the references are transformers' own models (make setup installs it)")

from onnxtools.base import registry
from onnxtools.exporter.export import export
from onnxtools.exporter.export_options import ExportOptions
from tests.exporter import hf
from tests.exporter.driver import Driver, decode
from tests.support import ops, refuse, rel_l2, succeed

IDS = np.random.default_rng(3).integers(3, 97, (2, 12))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, hf.make("llama", folder)


def mask(*, left: int = 0, right: int = 0) -> np.ndarray:
    found = np.ones_like(IDS)
    found[1, :left] = 0
    found[1, IDS.shape[1] - right :] = 0
    return found


@pytest.mark.parametrize("kind", ["none", "concat", "scatter", "gqa"])
@pytest.mark.parametrize("padding", [{}, {"left": 3}, {"right": 4}])
def test_last_logits_are_those_of_the_last_real_token(
    llama: tuple[Path, Any], tmp_path: Path, kind: Any, padding: dict[str, int]
) -> None:
    if kind == "gqa" and "left" in padding:
        pytest.skip("GroupQueryAttention takes padding on the right only")
    folder, model = llama
    export(folder, tmp_path / "m.onnx", ExportOptions(kv_cache=kind, logits="last"))
    expected, last = hf.logits(model, IDS, mask(**padding)), (11, 11 - padding.get("right", 0))
    found = Driver(tmp_path / "m.onnx", kind, mask(**padding)).step(IDS)
    assert found.shape == (2, 1, 97)
    assert max(np.abs(found[row, 0] - expected[row, last[row]]).max() for row in range(2)) <= 1e-4


def test_gqa_with_padding_on_the_right_goes_on_behind_the_shorter_row(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """GroupQueryAttention counts each row's tokens: new ones overwrite the padding, as ONNX Runtime's own models do."""
    folder, model = llama
    export(folder, tmp_path / "m.onnx", ExportOptions(kv_cache="gqa"))
    driver = Driver(tmp_path / "m.onnx", "gqa", mask(right=4))
    driver.step(IDS)
    new = IDS[:, :1]
    driver.mask = np.concatenate([np.ones((2, 1), np.int64), mask(right=4)], axis=1)  # rows of 13 and 9 tokens
    found = driver.step(new)
    for row, length in enumerate((12, 8)):
        whole = np.concatenate([IDS[row : row + 1, :length], new[row : row + 1]], axis=1)
        assert np.abs(found[row, 0] - hf.logits(model, whole, np.ones_like(whole))[0, -1]).max() <= 1e-4


@pytest.mark.parametrize(("kind", "opset"), [("none", 24), ("concat", 24), ("concat", 19)])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_input(tmp_path: Path, name: str, kind: Any, opset: int) -> None:
    model = hf.make(name, tmp_path)
    export(tmp_path, tmp_path / "m.onnx", ExportOptions(kv_cache=kind, opset=opset, use_one_input=True))
    inputs = [value.name for value in onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.input]
    assert [name for name in inputs if not name.startswith("past")] == ["input_ids"]
    found = decode(tmp_path / "m.onnx", kind, IDS, mask(), (5, 1, 6))
    assert np.abs(found - hf.logits(model, IDS, mask())).max() <= 1e-4


def test_names_shapes_and_types_of_inputs_and_outputs(llama: tuple[Path, Any], tmp_path: Path) -> None:
    export(llama[0], tmp_path / "m.onnx", ExportOptions(dtype="fp16"))
    graph = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph

    def said(value: onnx.ValueInfoProto) -> tuple[str, int, list[Any]]:
        tensor = value.type.tensor_type
        return value.name, tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]

    half, whole, integer = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    assert [said(value) for value in graph.input[:5]] == [
        ("input_ids", integer, ["batch", "sequence"]),
        ("attention_mask", integer, ["batch", "total_sequence"]),
        ("position_ids", integer, ["batch", "sequence"]),
        ("past_key_values.0.key", half, ["batch", 2, "past_sequence", 16]),
        ("past_key_values.0.value", half, ["batch", 2, "past_sequence", 16]),
    ]
    assert [said(value) for value in graph.output[:2]] == [
        ("logits", whole, ["batch", "sequence", 97]),
        ("present.0.key", half, ["batch", 2, "total_sequence", 16]),
    ]


@pytest.mark.parametrize("kind", ["none", "concat", "scatter", "gqa"])
@pytest.mark.parametrize("opset", [19, 20, 21, 23, 24])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_graph_passes_the_checker_with_shape_inference(
    llama: tuple[Path, Any], tmp_path: Path, kind: Any, opset: int, dtype: Any
) -> None:
    if kind == "scatter" and opset < 24:
        pytest.skip("TensorScatter is of opset 24")
    export(llama[0], tmp_path / "m.onnx", ExportOptions(kv_cache=kind, opset=opset, dtype=dtype))
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=kind != "gqa")
    assert inferred.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("opset", [19, 24])
@pytest.mark.parametrize("name", ["gpt2", "llama", "nemotron"])
def test_fp16_is_near_fp32(tmp_path: Path, name: str, opset: int) -> None:
    model = hf.make(name, tmp_path)
    export(tmp_path, tmp_path / "m.onnx", ExportOptions(dtype="fp16", opset=opset))
    assert rel_l2(decode(tmp_path / "m.onnx", "concat", IDS, mask(), (5, 1, 6)), hf.logits(model, IDS, mask())) <= 5e-3


def test_opset_19_has_primitive_operators_only(llama: tuple[Path, Any], tmp_path: Path) -> None:
    export(llama[0], tmp_path / "m.onnx", ExportOptions(opset=19))
    assert not {"RMSNormalization", "RotaryEmbedding", "Attention", "Swish", "Gelu"} & set(ops(tmp_path / "m.onnx"))
    export(llama[0], tmp_path / "m.onnx", ExportOptions(opset=24))
    assert {"RMSNormalization", "RotaryEmbedding", "Attention", "Swish"} <= set(ops(tmp_path / "m.onnx"))


@pytest.mark.parametrize("opset", [19, 24])
def test_the_pass_gives_what_export_gives(llama: tuple[Path, Any], tmp_path: Path, opset: int) -> None:
    """`export --kv-cache none` then `add-kv-cache` is `export --kv-cache concat`, names and numbers."""
    export(llama[0], tmp_path / "full.onnx", ExportOptions(kv_cache="none", opset=opset))
    succeed("add-kv-cache", tmp_path / "full.onnx", tmp_path / "added.onnx")
    export(llama[0], tmp_path / "born.onnx", ExportOptions(opset=opset))
    graphs = [onnx.load(tmp_path / name, load_external_data=False).graph for name in ("added.onnx", "born.onnx")]
    for side in ("input", "output"):
        added, born = ({value.name: value.type for value in getattr(graph, side)} for graph in graphs)
        assert added == born
    found = [decode(tmp_path / name, "concat", IDS, mask(left=2), (5, 1, 6)) for name in ("added.onnx", "born.onnx")]
    assert np.abs(found[0] - found[1])[mask(left=2).astype(bool)].max() <= 1e-4


def test_weights_stay_in_the_folder_of_the_checkpoint(tmp_path: Path) -> None:
    model = hf.make("llama", tmp_path)
    said = succeed("export", tmp_path, "-o", tmp_path / "m.onnx").out
    assert "weights stay in model.safetensors" in said
    found = decode(tmp_path / "m.onnx", "concat", IDS, mask(), (12,))
    assert np.abs(found - hf.logits(model, IDS, mask())).max() <= 1e-4
    succeed("export", tmp_path, "-o", tmp_path / "c.onnx", "--copy-weights")
    (tmp_path / "model.safetensors").unlink()
    assert np.array_equal(found, decode(tmp_path / "c.onnx", "concat", IDS, mask(), (12,)))


def test_onnxtools_json_and_the_files_beside(llama: tuple[Path, Any], tmp_path: Path) -> None:
    (llama[0] / "tokenizer.json").write_text('{"a": 1}')
    try:
        export(llama[0], tmp_path / "m.onnx", ExportOptions(kv_cache="scatter", dtype="fp16", cache_length=48))
    finally:
        (llama[0] / "tokenizer.json").unlink()
    info = json.loads((tmp_path / "onnxtools.json").read_text())
    assert (tmp_path / "tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "generation_config.json").is_file()
    assert (
        info["model"]["family"] == "llama"
        and info["model"]["num_key_value_heads"] == 2
        and info["tokens"]["eos_token_ids"] == [2]
    )
    assert info["kv_cache"] == {
        "kind": "scatter", "dtype": "fp16", "layout": "bnsh", "past": "past_key_values.{n}.{kind}",
        "present": "present.{n}.{kind}",
        "length": 48, "layers": 2, "heads": 2, "head_dim": 16,
    }  # fmt: skip
    metadata = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx", load_external_data=False).metadata_props}
    assert json.loads(metadata["onnxtools.model"]) == info


# --- random weights and configuration files ---------------------------------------------------------------------------


LARGE = {"mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "gptj"}
"""Families whose sizes are not all options: they take a folder with config.json."""
SIZES = ["--n-layer", "2", "--n-embd", "64", "--n-head", "4", "--n-positions", "32", "--vocab-size", "97"]


@pytest.mark.parametrize("family", sorted(set(registry.names(registry.FAMILIES)) - LARGE - {"gguf", "llama-gguf"}))
def test_random_weights_of_every_family_run(family: str, tmp_path: Path) -> None:
    sizes = SIZES if family in ("bloom", "mpt") else [*SIZES, "--n-inner", "96"]
    for name in ("a.onnx", "b.onnx"):
        succeed("export", "--random", "--family", family, *sizes, "--dtype", "fp32", "-o", tmp_path / name)
    found = [decode(tmp_path / name, "concat", IDS, mask(), (5, 1, 6)) for name in ("a.onnx", "b.onnx")]
    assert np.isfinite(found[0]).all() and found[0].std() > 0.01
    assert np.array_equal(*found), "the same sizes give the same weights"


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "gptj"])
def test_random_weights_of_a_configuration_run(name: str, tmp_path: Path) -> None:
    hf.make(name, tmp_path / "hf")
    succeed("export", "--random", tmp_path / "hf", "--dtype", "fp32", "-o", tmp_path / "m.onnx")
    found = decode(tmp_path / "m.onnx", "concat", IDS, mask(), (5, 1, 6))
    assert np.isfinite(found).all() and found.std() > 0.01


@pytest.mark.parametrize(
    ("family", "option"), [("bloom", "--n-inner"), ("mpt", "--n-inner"), ("gemma3_text", "--n-kv-head")]
)
def test_a_size_that_the_family_does_not_have_is_refused(family: str, option: str, tmp_path: Path) -> None:
    arguments = ["export", "--random", "--family", family, *SIZES, option, "48", "-o", tmp_path / "m.onnx"]
    code = 2 if option == "--n-inner" else 1
    assert (option if code == 2 else "48") in refuse(*arguments, code=code)


def test_random_weights_do_not_depend_on_slabs() -> None:
    import onnx_ir as ir

    from onnxtools.storage.lazy import RandomRows
    from onnxtools.storage.rows import read_rows

    tensor = RandomRows((5000, 48), ir.DataType.FLOAT, "w", 0.0, 0.02)
    whole = read_rows(tensor, 0, 5000)
    step = tensor.row_multiple
    assert np.array_equal(whole[step : 3 * step], read_rows(tensor, step, 3 * step))
    assert abs(whole.mean()) < 1e-3 and abs(whole.std() - 0.02) < 1e-3


def test_175b_without_weights_is_a_graph_alone(tmp_path: Path) -> None:
    said = succeed(
        "export",
        "--random",
        "--n-layer",
        "96",
        "--n-embd",
        "12288",
        "--n-head",
        "96",
        "--no-weights",
        "-o",
        tmp_path / "gpt.onnx",
    ).out
    assert "no weights written: gpt.onnx.data would hold" in said
    assert {file.name for file in tmp_path.iterdir()} == {"gpt.onnx", "onnxtools.json"}
    graph = onnx.load(tmp_path / "gpt.onnx", load_external_data=False).graph
    parameters = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
    assert abs(parameters / 175e9 - 1) < 0.01  # GPT-3's table 2.1 (arXiv 2005.14165)


def test_options_from_yaml_and_set(llama: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        f"source: {llama[0]}\noutput: m.onnx\nkv_cache: none\nopset: 19\ndtype: fp16\n"
    )
    succeed("export", "--config", tmp_path / "config.yaml", "--set", "opset=20", "--dtype", "fp32")
    made = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert made.opset_import[0].version == 20
    assert not any(value.name.startswith("past") for value in made.graph.input)
    assert {t.data_type for t in made.graph.initializer if "proj" in t.name} == {onnx.TensorProto.FLOAT}
    for setting, words in (
        ("opsett=20", "unknown option 'opsett'"),
        ("opset=x", "opset is 'x'; it takes int"),
        ("opset", "takes key=value"),
    ):
        assert words in refuse("export", "--config", tmp_path / "config.yaml", "--set", setting, code=2)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-o", "m.onnx"], 2, "name a checkpoint, or say --random"),
        (["--random"], 2, "no output; write"),
        (["--random", "-o", "m.bin"], 2, "does not end in .onnx"),
        (["--random", "--opset", "18", "-o", "m.onnx"], 2, "it takes 19 to 24"),
        (["--random", "--kv-cache", "scatter", "--opset", "23", "-o", "m.onnx"], 2, "scatter needs opset 24"),
        (["--random", "--kv-cache", "gqa", "--use-one-input", "-o", "m.onnx"], 2, "how full the cache is"),
        (["--random", "--cache-length", "9", "-o", "m.onnx"], 2, "positive length of a scatter cache"),
        (["--random", "--kv-cache", "scatter", "--cache-length", "9999", "-o", "m.onnx"], 1,
            "longer than the 1024 positions"),
        (["--random", "--n-head", "7", "-o", "m.onnx"], 1, "768 is not divisible by 7 heads"),
        (["--random", "--n-head", "48", "--n-embd", "384", "--kv-cache", "gqa", "-o", "m.onnx"], 1, "multiples of 16"),
        (["--random", "--family", "t5", "-o", "m.onnx"], 2, "no family is named 't5'"),
    ],
)  # fmt: skip
def test_wrong_commands(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refuse("export", *arguments, code=code)
    assert not list(tmp_path.iterdir())
