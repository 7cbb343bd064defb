"""Steps that feed each other, as a captured step on CUDA does, here on the CPU: the same graph, bindings and loop."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

pytest.importorskip("transformers", reason="it makes the tiny checkpoint (make setup installs it)")

from onnxtools.base.errors import JobError
from onnxtools.engines.runtimes.onnxrt.next_token import NEXT, add_next_token
from onnxtools.engines.runtimes.onnxrt.ort_runtime import OrtRuntime, OrtSession
from onnxtools.engines.runtimes.onnxrt.ort_session import register_kernels
from onnxtools.evaluate.timing import generate_timed
from onnxtools.generation.generate import generate
from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.runtime import Ids, RuntimeOptions, open_runtime
from onnxtools.ir.model import Model
from tests.generation.models import exported

PROMPTS = [[5, 9, 30, 31, 77], [3, 8], [60, 61, 62, 63, 64, 65, 66, 67, 1]]
CPU = RuntimeOptions(device="cpu", threads=2)


class Ahead(OrtRuntime):
    """ONNX Runtime on the CPU with the graph that a session on CUDA gets."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, CPU)
        model = Model.load(path)
        add_next_token(model, ahead=True, kernel=False)
        settings = ort.SessionOptions()
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        self.session = ort.InferenceSession(
            model.proto().SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )
        self.looks_ahead = self.takes_tokens = True
        self.results = [self.io.logits.name, NEXT]
        self.chunks: list[int] = []

    def open(self, slots: int, length: int) -> OrtSession:
        session = super().open(slots, length)
        ahead = session.ahead

        def counted(ids: Ids, count: int) -> Ids:
            self.chunks.append(count)
            return self.changed(ahead(ids, count))

        session.ahead = counted  # type: ignore[method-assign]
        return session

    def changed(self, tokens: Ids) -> Ids:
        return tokens


def tokens(runtime: object, prompts: list[list[int]], **options: object) -> list[list[int]]:
    return [best[0].token_ids for best in generate(runtime, prompts, GenerationOptions(**options))]  # type: ignore[arg-type]


@pytest.fixture(params=["gqa", "scatter"])
def path(request: pytest.FixtureRequest) -> Path:
    return exported("llama", request.param)


def test_the_tokens_are_those_of_single_steps_whatever_came_before(path: Path) -> None:
    plain, ahead = open_runtime("onnxrt", path, CPU), Ahead(path)
    for prompts in (PROMPTS, [row[::-1] for row in PROMPTS], PROMPTS):  # the second uses the buffers of the first
        assert tokens(ahead, prompts, max_new_tokens=24, ignore_eos=True) == tokens(
            plain, prompts, max_new_tokens=24, ignore_eos=True
        )
    assert ahead.chunks == [23, 23, 23]  # nothing may end the text
    for new in (1, 2, 3):
        assert tokens(ahead, PROMPTS, max_new_tokens=new, ignore_eos=True) == tokens(
            plain, PROMPTS, max_new_tokens=new, ignore_eos=True
        )
    assert tokens(ahead, PROMPTS, max_new_tokens=9, num_beams=3) == tokens(
        plain, PROMPTS, max_new_tokens=9, num_beams=3
    )
    assert tokens(ahead, PROMPTS, max_new_tokens=24, ignore_eos=True) == tokens(
        plain, PROMPTS, max_new_tokens=24, ignore_eos=True
    )


@pytest.mark.parametrize("form", ["gqa", "scatter"])
def test_prompts_are_captured_when_their_length_comes_twice_in_a_row(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Captures(Ahead):
        """A session on the CPU takes the number of a graph and runs as ever."""

        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.captures, self.seen = True, list[str]()

        def run(self, binding: Any, options: Any = None) -> None:
            self.seen.append(options.get_run_config_entry("gpu_graph_id") if options else "none")
            super().run(binding, options)

    path = exported("llama", form, "--logits", "last")
    captures, plain = Captures(path), open_runtime("onnxrt", path, CPU)
    other = [[*row, 7] for row in PROMPTS]
    every = range(3)
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS, other, PROMPTS, other, other):
        found = []
        for runtime in (captures, plain):
            with closing(runtime.open(3, 24)) as session:
                found.append(session.admit(every, prompts).argmax()[0].tolist())
        assert found[0] == found[1]
    assert captures.seen == ["none", "3", "3", "none", "none", "none", "4"]  # 1 and 2 are those of the steps
    session = captures.open(3, 24)
    session.admit(every, other)
    session.step(np.array([1, 2, 3]))
    session.reorder(np.array([2, 0, 1]))  # as a beam search does for each step: not worth a graph
    session.step(np.array([1, 2, 3]))
    assert captures.seen[-3:] == ["4", "1", "none"]
    monkeypatch.setattr("onnxtools.engines.runtimes.onnxrt.cache_states.MAX_GRAPHS", 5)
    for _ in range(2):
        session.admit(every, other)
        session.step(np.array([1, 2, 3]))
    assert captures.seen[-4:] == ["none", "5", "none", "5"]


def test_a_row_that_ends_within_a_chunk_ends_there(path: Path) -> None:
    plain, ahead = open_runtime("onnxrt", path, CPU), Ahead(path)
    free = tokens(plain, PROMPTS, max_new_tokens=24, ignore_eos=True)
    for runtime in (plain, ahead):
        object.__setattr__(runtime.info, "eos_token_ids", (free[0][4], free[1][12]))
    found = tokens(ahead, PROMPTS, max_new_tokens=24)
    assert found == tokens(plain, PROMPTS, max_new_tokens=24)
    assert len(found[0]) <= 5 and found != free
    assert set(ahead.chunks) <= {8, 7} and ahead.chunks  # it looks every eight steps


def test_a_token_seen_as_it_comes_takes_single_steps(path: Path) -> None:
    ahead, seen = Ahead(path), []
    generate(
        ahead,
        PROMPTS,
        GenerationOptions(max_new_tokens=5, ignore_eos=True),
        on_token=lambda row, token: bool(seen.append((row, token))),
    )
    assert len(seen) == 15 and not ahead.chunks


def test_a_benchmark_takes_all_steps_at_once(path: Path) -> None:
    plain, ahead = open_runtime("onnxrt", path, CPU), Ahead(path)
    prompts = np.arange(18).reshape(2, 9)
    found, marks = generate_timed(ahead, prompts, 7)
    assert ahead.chunks == [6] and len(marks) == 7 and np.allclose(np.diff(marks), np.diff(marks)[0])
    assert np.array_equal(found, generate_timed(plain, prompts, 7)[0])


def test_a_token_that_is_none_is_an_error_of_its_step(path: Path) -> None:
    class Spoilt(Ahead):
        def changed(self, tokens: Ids) -> Ids:
            tokens[1, 3:] = -1
            return tokens

    with pytest.raises(JobError, match="row 1 are NaN or infinite at step 4"):
        tokens(Spoilt(path), PROMPTS, max_new_tokens=9, ignore_eos=True)
    with pytest.raises(JobError, match="row 1 are NaN or infinite at step 4"):
        generate_timed(Spoilt(path), np.arange(18).reshape(2, 9), 7)


def test_our_kernels_want_a_card_and_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at(capability: int, **options: bool) -> tuple[bool, str]:
        notes: list[str] = []
        monkeypatch.setattr("onnxtools.engines.runtimes.onnxrt.ort_session.device_capability", lambda: capability)
        return register_kernels(ort.SessionOptions(), RuntimeOptions(**options), notes), "; ".join(notes)  # type: ignore[arg-type]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("onnxtools.engines.runtimes.onnxrt.ort_session.find_nvcc", lambda: None)
    assert at(0) == at(89) == at(90, kernels=False) == (False, "")
    why = "our kernels are not used, which is slower: "
    assert at(90) == (False, f"{why}there is no nvcc to compile them; install the CUDA toolkit; or say --no-kernels")
    monkeypatch.setattr("onnxtools.engines.runtimes.onnxrt.ort_session.find_nvcc", lambda: "/bin/false")
    assert at(90) == (False, f"{why}/bin/false --version fails; repair the CUDA toolkit; or say --no-kernels")
    monkeypatch.setattr("onnxtools.engines.runtimes.onnxrt.ort_session.find_nvcc", lambda: "/bin/echo")
    (tmp_path / "file").touch()
    assert at(90)[0] is False and str(tmp_path / "file") in at(90)[1]  # a cache folder that cannot be


def test_a_library_that_does_not_load_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setattr("onnxtools.engines.runtimes.onnxrt.ort_session.device_capability", lambda: 90)
    monkeypatch.setattr(
        "onnxtools.engines.runtimes.onnxrt.ort_session.kernel_library", lambda nvcc, capability: tmp_path / "broken.so"
    )
    monkeypatch.setattr("onnxtools.engines.runtimes.onnxrt.ort_session.find_nvcc", lambda: "nvcc")
    notes: list[str] = []
    assert register_kernels(ort.SessionOptions(), RuntimeOptions(), notes) is False and "broken.so" in notes[0]


def test_a_static_cache_without_a_mask_takes_single_steps() -> None:
    model = Model.load(exported("llama", "scatter"))
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    model.graph.inputs.remove(mask)
    add_next_token(model, ahead=True, kernel=True)
    assert [value.name for value in model.graph.outputs if (value.name or "").startswith("onnxtools")] == [NEXT]
