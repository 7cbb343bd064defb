"""The runtime `onnxrt` on graphs of our own, of torch's exporter and on bad ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("transformers", reason="the models are written by transformers (make setup installs it)")

from onnxtools.base.errors import JobError
from onnxtools.engines.runtimes.onnxrt.cache_states import Static
from onnxtools.engines.runtimes.onnxrt.ort_runtime import OrtRuntime
from onnxtools.generation.generate import generate
from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.runtime import RuntimeOptions
from tests.exporter import hf
from tests.generation.models import exported, reference
from tests.support import fixture_path, present, succeed

CPU = RuntimeOptions(device="cpu", threads=2)
TEXTS = [[5, 9, 30, 31, 77], [3, 8], [60, 61, 62, 63]]


@pytest.mark.parametrize("form", ["concat", "scatter", "gqa", "none"])
def test_scores_are_the_logits_after_every_token(form: str) -> None:
    found = OrtRuntime(exported("llama", form), CPU).score(TEXTS)
    for text, logits in zip(TEXTS, found, strict=True):
        ids = np.array([text])
        np.testing.assert_allclose(logits, hf.logits(reference("llama"), ids, np.ones_like(ids))[0], atol=1e-4)


def test_scoring_a_model_that_returns_the_last_logits_alone_is_an_error() -> None:
    with pytest.raises(JobError, match="--logits all"):
        OrtRuntime(exported("llama", "concat", "--logits", "last"), CPU).score(TEXTS)


def test_the_cache_is_not_copied_through_the_host() -> None:
    """A static cache is one buffer, input and output at once, the same from step to step."""
    runtime = OrtRuntime(exported("llama", "gqa"), CPU)
    session = runtime.open(2, 20)
    state = session.state
    assert isinstance(state, Static)
    session.admit([0, 1], TEXTS[:2])
    before = [buffer.data_ptr() for buffer in state.buffers]
    session.step(np.array([4, 4]))
    session.step(np.array([5, 5]))
    assert [buffer.data_ptr() for buffer in state.buffers] == before
    written = state.buffers[0].numpy()
    assert (written[0, :, :7] != 0).any(axis=(0, 2)).all() and not written[0, :, 8:].any()


def test_a_model_without_a_cache_works_and_says_that_it_is_slow() -> None:
    runtime = OrtRuntime(exported("llama", "none"), CPU)
    assert not runtime.has_cache and any("no KV cache" in note for note in runtime.notes)


def with_weight(path: Path, folder: Path, name: str, value: float) -> Path:
    """The model with one weight's first row overwritten."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[...] = value
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


@pytest.mark.parametrize("form", ["concat", "gqa"])
def test_logits_that_are_not_numbers_are_an_error_that_names_the_step(form: str, tmp_path: Path) -> None:
    path = with_weight(exported("llama", form), tmp_path, "model.norm.weight", np.nan)
    with pytest.raises(JobError, match="row 0 are NaN or infinite at step 0"):
        generate(OrtRuntime(path, CPU), TEXTS, GenerationOptions())
    for settings in ({"num_beams": 2}, {"temperature": 1.0}):
        with pytest.raises(JobError, match="NaN or infinite at step 0"):
            generate(OrtRuntime(path, CPU), TEXTS, GenerationOptions(**settings))  # type: ignore[arg-type]


def test_nan_in_a_later_step_names_that_step(tmp_path: Path) -> None:
    """The position table is NaN from position 7 on: a prompt of 5 fails at the third step."""
    model = onnx.load(exported("gpt2", "concat"))
    table = next(t for t in model.graph.initializer if t.name == "model.embed_positions.weight")
    array = onnx.numpy_helper.to_array(table).copy()
    array[7:] = np.nan
    table.CopyFrom(onnx.numpy_helper.from_array(array, table.name))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(JobError, match="row 0 are NaN or infinite at step 3"):
        generate(OrtRuntime(tmp_path / "m.onnx", CPU), TEXTS[:1], GenerationOptions())


def edited(folder: Path, change: object) -> Path:
    model = onnx.load(exported("llama", "concat"))
    change(model)  # type: ignore[operator]
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def fixed_batch(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def odd_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("pixel_values", 1, [1]))


def renamed(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    """A change that renames a value everywhere."""

    def change(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.name = new if value.name == old else value.name
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]

    return change


no_ids, no_present = renamed("input_ids", "tokens"), renamed("present.1.value", "kept.1.value")


def test_a_fixed_batch_refuses_others(tmp_path: Path) -> None:
    runtime = OrtRuntime(edited(tmp_path, fixed_batch), CPU)
    assert len(generate(runtime, TEXTS[:2], GenerationOptions(max_new_tokens=3))) == 2
    with pytest.raises(JobError, match="batch is fixed to 2 and 3 rows"):
        generate(runtime, TEXTS, GenerationOptions(max_new_tokens=3))


@pytest.mark.parametrize(
    ("change", "names"), [(odd_input, "pixel_values"), (no_ids, "tokens"), (no_present, "past_key_values.1.value")]
)
def test_graphs_that_cannot_be_run_are_refused_by_the_input(change: object, names: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=names):
        OrtRuntime(edited(tmp_path, change), CPU)


def test_a_text_longer_than_a_static_cache_is_an_error() -> None:
    runtime = OrtRuntime(exported("llama", "scatter", "--cache-length", "16"), CPU)
    with pytest.raises(JobError, match="cache has 16 slots and 17 tokens"):
        generate(runtime, [[1] * 10], GenerationOptions(max_new_tokens=7))


def test_cuda_where_there_is_none_is_an_error() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(JobError, match="no CUDA provider"):
        OrtRuntime(exported("llama", "gqa"), RuntimeOptions(device="cuda"))


@pytest.mark.parametrize("name", ["hf", "nemo"])
def test_a_cache_added_to_a_full_graph_runs(name: str, tmp_path: Path) -> None:
    """`add-kv-cache` on a model exported without one, in either naming and layout, decodes as transformers does."""
    succeed(
        "add-kv-cache",
        exported("llama", "none", "--opset", "19", "--use-one-input"),
        tmp_path / "kv.onnx",
        *(["--naming", "nemo", "--layout", "sbnh"] if name == "nemo" else []),
    )
    runtime = OrtRuntime(tmp_path / "kv.onnx", CPU)
    assert runtime.io.kind == "concat" and runtime.io.caches[0].axis == (2 if name == "hf" else 0)
    found = generate(runtime, [TEXTS[0]], GenerationOptions(max_new_tokens=12))[0][0].token_ids
    expected = generate(OrtRuntime(exported("llama", "concat"), CPU), [TEXTS[0]], GenerationOptions(max_new_tokens=12))[
        0
    ][0].token_ids
    assert found == expected


def test_bf16_on_the_cpu_says_what_helps(tmp_path: Path) -> None:
    succeed("precision", exported("llama", "concat"), tmp_path / "m.onnx", "--to", "bf16", "--no-check")
    with pytest.raises(
        JobError,
        match=r"is bf16, for which ONNX Runtime has no kernels on the CPU; use --device cuda, or `onnxtools precision "
        r"--to fp16`",
    ):
        OrtRuntime(tmp_path / "m.onnx", CPU)


def test_a_transformer_engine_model_with_an_fp8_cache_decodes(tmp_path: Path) -> None:
    """TransformerEngine's own outputs of the export it was made from; its causal model, so a prefix gives the first of
    them.
    """
    source = present(fixture_path("te_gpt_fp8_ds_dyn"))
    succeed("convert", source, tmp_path / "q.onnx", "--opset19")
    succeed("add-kv-cache", tmp_path / "q.onnx", tmp_path / "kv.onnx")
    known = np.load(source.with_suffix(".npz"))
    runtime = OrtRuntime(tmp_path / "kv.onnx", CPU)
    ids, expected = known["input_ids"], known["te_export_mode"]
    session = runtime.open(len(ids), 8)
    found = [session.admit(range(len(ids)), [list(map(int, row[:4])) for row in ids]).numpy()]
    found += [session.step(ids[:, position]).numpy() for position in range(4, 8)]
    for position, logits in enumerate(found, start=3):
        np.testing.assert_allclose(logits, expected[:, position], atol=2e-2)
