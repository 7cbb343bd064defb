"""Graphs that optimum and ONNX Runtime GenAI wrote (fixtures/exporters), against what transformers computes.

`make test-exporters` writes the graphs anew and tests those: ONNXTOOLS_EXPORTED is their folder.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from tests.support import Array, Feeds, Session, dims, refuse, rel_l2, run, succeed

GRAPHS = Path(os.environ.get("ONNXTOOLS_EXPORTED", Path(__file__).parents[2] / "fixtures" / "exporters" / "graphs"))
DECODERS = sorted(path.name.removesuffix(".onnx.gz") for path in GRAPHS.glob("*.onnx.gz"))
WHOLE = [name for name in DECODERS if "." not in name and not name.startswith("genai")]
PAST = [name for name in DECODERS if name.endswith(".past")]
GENAI = [name for name in DECODERS if name.startswith("genai")]
STEPS = ([9], [1] * 9, [4, 1, 1, 1, 1, 1], [3, 3, 3])
TOLERANCE = 2e-5


def graph(name: str, folder: Path) -> Path:
    path = folder / f"{name}.onnx"
    path.write_bytes(gzip.decompress((GRAPHS / f"{name}.onnx.gz").read_bytes()))
    return path


def truth(name: str) -> tuple[Feeds, Array]:
    """Inputs and transformers' logits; positions count real tokens."""
    stored = np.load(GRAPHS / f"{name.removesuffix('.past')}.npz")
    mask = stored["attention_mask"]
    places = (np.cumsum(mask, axis=1) - 1).clip(0)
    return {"input_ids": stored["input_ids"], "attention_mask": mask, "position_ids": places}, stored["logits"]


def stepped(path: Path, feeds: Feeds, steps: list[int]) -> Array:
    """Logits of a graph with a cache, fed `steps` tokens at a time: what a runtime would do, written out."""
    session = Session(path)
    shapes = {name: dims(value) for name, value in session.inputs.items() if "past_key" in name}
    batch, done, logits = len(feeds["input_ids"]), 0, []
    types = {name: value.type.tensor_type.elem_type for name, value in session.inputs.items()}
    half = {10: np.float16}
    cache = {
        name: np.zeros([d if isinstance(d, int) else 0 if "past" in d else batch for d in shape],
                       half.get(types[name], np.float32))
        for name, shape in shapes.items()
    }  # fmt: skip
    for step in steps:
        window = {name: array[:, done : done + step] for name, array in feeds.items()}
        window["attention_mask"] = feeds["attention_mask"][:, : done + step]
        results = session({**{k: v for k, v in window.items() if k in session.inputs}, **cache})
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
        logits.append(results["logits"])
        done += step
    return np.concatenate(logits, axis=1)


def real(feeds: Feeds, logits: Array) -> Array:
    return logits[feeds["attention_mask"].astype(bool)]


@pytest.mark.parametrize("name", WHOLE)
def test_a_cache_is_added_to_optimums_decoders(name: str, tmp_path: Path) -> None:
    """Padding on both sides, windows shorter than the text: in one run and in steps."""
    path = graph(name, tmp_path)
    succeed("add-kv-cache", path, tmp_path / "kv.onnx")
    feeds, expected = truth(name)
    if name == "stablelm":  # optimum's own graph is 1% off where the left is padded
        session = Session(path)
        expected = session({key: array for key, array in feeds.items() if key in session.inputs})["logits"]
    for steps in STEPS:
        found = stepped(tmp_path / "kv.onnx", feeds, steps)
        assert rel_l2(real(feeds, found), real(feeds, expected)) < TOLERANCE, steps


@pytest.mark.parametrize("name", [name for name in WHOLE if name in ("llama", "gpt_oss")])
def test_the_cached_graph_goes_on(name: str, tmp_path: Path) -> None:
    """What add-kv-cache writes is a graph as any other: half precision, INT8, and `validate` against the original."""
    path = graph(name, tmp_path)
    succeed("add-kv-cache", path, tmp_path / "kv.onnx")
    succeed("validate", path, tmp_path / "kv.onnx")
    succeed("precision", tmp_path / "kv.onnx", tmp_path / "half.onnx", "--to", "fp16", "--tolerance", "0.05")
    feeds, expected = truth(name)
    found = stepped(tmp_path / "half.onnx", feeds, [4, 5])
    assert rel_l2(real(feeds, found), real(feeds, expected)) < 0.05


@pytest.mark.parametrize("name", [name for name in PAST if name.split(".")[0] in ("gpt2", "gptj", "llama", "bloom")])
def test_optimums_decoders_with_a_cache(name: str, tmp_path: Path) -> None:
    path = graph(name, tmp_path)
    feeds, expected = truth(name)
    succeed("precision", path, tmp_path / "half.onnx", "--to", "fp16")
    succeed("validate", path, tmp_path / "half.onnx")
    assert rel_l2(real(feeds, stepped(tmp_path / "half.onnx", feeds, [4, 1, 4])), real(feeds, expected)) < 5e-3
    data = {key: array for key, array in feeds.items() if key in Session(path).inputs}
    np.savez(tmp_path / "data.npz", **data)  # no caches: they start empty
    succeed("quantize", path, tmp_path / "q.onnx", "--int8", "--all-layers", "--calib", tmp_path / "data.npz")
    assert rel_l2(real(feeds, stepped(tmp_path / "q.onnx", feeds, [4, 5])), real(feeds, expected)) < 0.1
    if name == "gpt2.past":
        succeed("quantize", path, tmp_path / "q8.onnx", "--fp8", "--calib", tmp_path / "data.npz", "--tolerance", "1")
        succeed("quantize", path, tmp_path / "q4.onnx", "--int4-rtn", "--tolerance", "1")
    succeed("prune", path, tmp_path / "pruned.onnx", "--tolerance", "9")
    assert "already has a KV cache" in refuse("add-kv-cache", path, tmp_path / "kv.onnx")


@pytest.mark.parametrize("name", PAST)
def test_a_full_run_equals_optimums_steps(name: str, tmp_path: Path) -> None:
    succeed("validate", graph(name.removesuffix(".past"), tmp_path), graph(name, tmp_path))


@pytest.mark.parametrize("name", GENAI)
def test_graphs_of_genais_builder(name: str, tmp_path: Path) -> None:
    """Its caches have a name for the size of a head, and windows that take no shorter cache."""
    path = graph(name, tmp_path)
    told = succeed("validate", path, path).out
    assert "--batch 1 compares such steps too" in told
    succeed("validate", path, path, "--batch", "1")
    succeed("precision", path, tmp_path / "half.onnx", "--to", "fp16", "--tolerance", "0.05")
    assert run("benchmark", path, "--iterations", "1", "--input-seq-len", "8", "--output-seq-len", "4").code == 0
    ids = np.random.default_rng(0).integers(3, 64, (2, 9))
    np.savez(tmp_path / "data.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    flags = ("--fp8", "--calib", tmp_path / "data.npz", "--tolerance", "1")
    if name == "genai_llama_int4":
        assert "quantized already (11 MatMulNBits)" in refuse("quantize", path, tmp_path / "q.onnx", *flags)
        return
    succeed("quantize", path, tmp_path / "q.onnx", *flags)
    succeed("prune", path, tmp_path / "p.onnx")
    assert "GroupQueryAttention" in refuse("build", path, tmp_path / "m.engine")
