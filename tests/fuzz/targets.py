"""What is fuzzed: a name, and a function that makes an input from a `random.Random` and hands it to the tool.

A refusal is an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import onnx
import yaml

from onnxtools.analysis.facts import analyse, constants
from onnxtools.calibration.data import read_samples
from onnxtools.check.describe import describe, differences
from onnxtools.check.feeds import random_feeds, read_feeds
from onnxtools.check.validate import validate
from onnxtools.checkpoints.checkpoint import Region
from onnxtools.checkpoints.checkpoint import reading as reading_file
from onnxtools.checkpoints.model_info import ModelInfo
from onnxtools.checkpoints.open import open_checkpoint
from onnxtools.checkpoints.safetensors import read_safetensors
from onnxtools.checkpoints.tokenizer import Tokenizer
from onnxtools.checkpoints.torch_file import loads, read_torch
from onnxtools.cli.recipe import read_recipe
from onnxtools.engines.build.manifest import read_manifest
from onnxtools.engines.build.preflight import preflight
from onnxtools.engines.build.profiles import parse_shapes, profiles_for
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.engines.runtimes.trt import engine_io
from onnxtools.engines.trtexec.trtexec_builder import OnPaper
from onnxtools.evaluate.lambada import read_lambada
from onnxtools.exporter.export import export
from onnxtools.exporter.export_options import ExportOptions
from onnxtools.ir.model import Model
from onnxtools.ir.provenance import provenance
from onnxtools.passes.convert import Convert
from onnxtools.passes.decompose_attention import DecomposeAttention
from onnxtools.passes.fold_constants import FoldConstants
from onnxtools.passes.kv_cache.add_kv_cache import AddKvCache
from onnxtools.passes.legalize import Legalize
from onnxtools.passes.precision import Precision
from onnxtools.passes.prune.prune_pass import Prune
from onnxtools.passes.quantize.quantize_pass import Quantize
from onnxtools.passes.set_opset import SetOpset
from onnxtools.pipeline.manager import PassManager
from onnxtools.pipeline.passbase import Pass
from tests.fuzz import seeds
from tests.fuzz.mutate import mutate_message, mutated_bytes, mutated_json

Target = Callable[[Random, Path], None]
CHANGES = True
"""Off: `reading` hands the seeds on whole."""


def graph(random: Random, where: Path) -> Path:
    """A changed graph, its bytes too once in a while; the data file of the one that has some lies beside it."""
    proto = onnx.ModelProto()
    proto.CopyFrom(random.choice(seeds.graphs()))
    mutate_message(random, proto)
    data = proto.SerializeToString()
    path = where / "m.onnx"
    path.write_bytes(mutated_bytes(random, data) if random.random() < 0.1 else data)
    (where / "external.onnx.data").write_bytes((seeds.folder() / "external.onnx.data").read_bytes())
    return path


def loading(random: Random, where: Path) -> None:
    model = Model.load(graph(random, where))
    provenance(model)
    describe(model)
    ModelInfo.read(where / "m.onnx", model.ir.metadata_props)


def saving(random: Random, where: Path) -> None:
    model = Model.load(graph(random, where))
    model.save(where / "out" / "o.onnx", copy_weights=random.random() < 0.5)
    differences(Model.load(where / "out" / "o.onnx"), model)


def inference(random: Random, where: Path) -> None:
    model = Model.load(graph(random, where))
    analyse(model)
    constants(model)


def inputs(random: Random, where: Path) -> None:
    random_feeds(Model.load(graph(random, where)))


def shapes_of_an_engine(random: Random, where: Path) -> None:
    model, spec = Model.load(graph(random, where)), EngineSpec(max_seq_len=random.choice((None, 8, 4096)))
    preflight(model, spec, OnPaper((10, 13)), strong=True)
    profiles_for(model, spec)


def checking(random: Random, where: Path) -> None:
    model = Model.load(graph(random, where))
    validate(model, model)


def passing(*passes: Pass) -> Target:
    def target(random: Random, where: Path) -> None:
        model = Model.load(graph(random, where))
        PassManager([random.choice(passes)]).run(model)
        model.save(where / "o.onnx")

    return target


def reading(
    name: str,
    seed: Callable[[], bytes],
    read: Callable[[Path], object],
    change: Callable[[Random, bytes], bytes] = mutated_bytes,
) -> Target:
    """A file called `name`, changed, and what reads it."""

    def target(random: Random, where: Path) -> None:
        (where / name).write_bytes(change(random, seed()) if CHANGES else seed())
        read(where / name)

    return target


def pickled(random: Random, where: Path) -> None:
    loads(mutated_bytes(random, random.choice(seeds.pickles())), "seed.pkl")


def exported(random: Random, where: Path) -> None:
    config = random.choice((seeds.CONFIG, seeds.GPT2))
    (where / "config.json").write_bytes(mutated_json(random, json.dumps(config).encode()))
    export(where, where / "o.onnx", ExportOptions(random=True, weights=False))


def recipe(random: Random, where: Path) -> None:
    tree = json.dumps(yaml.safe_load(seeds.RECIPE)).encode()
    data = mutated_json(random, tree) if random.random() < 0.5 else mutated_bytes(random, seeds.RECIPE.encode())
    (where / "r.yaml").write_bytes(data)
    read_recipe(where / "r.yaml")


def shapes(random: Random, where: Path) -> None:
    text = mutated_bytes(random, b"input_ids:1x8,past_key_values.0.key:1x2x0x8,*:4").decode(errors="replace")
    parse_shapes(text, "--min-shapes")


def tokenizing(path: Path) -> None:
    made = Tokenizer.open(path)
    made.decode(made.encode("a b ab  <s>é"))
    made.pair("a b", " ab")


def engine(path: Path) -> None:
    engine_io(path.with_suffix(""), read_manifest(path.with_suffix("")))


def texts(random: Random, where: Path) -> None:
    rows = [{"text": "a b"}, {"text": "b a b", "tokens": [1, 2]}, {"text": "a ab b", "x": [1]}]
    data = b"\n".join(mutated_json(random, json.dumps(row).encode()) for row in rows)
    (where / "t.jsonl").write_bytes(data)
    if random.random() < 0.5:
        read_lambada(where / "t.jsonl")
    else:
        (where / "tokenizer.json").write_text(json.dumps(seeds.TOKENIZER))
        list(read_samples(seeds.loaded(seeds.graphs()[0], where), Quantize(scheme="fp8", calib=str(where / "t.jsonl"))))


def _torch(path: Path) -> object:
    with reading_file(path):
        return read_torch(Region.of(path))


def _json(tree: object) -> Callable[[], bytes]:
    return lambda: json.dumps(tree).encode()


def _npz() -> bytes:
    import io

    import numpy as np

    made = io.BytesIO()
    np.savez(made, input_ids=np.arange(8).reshape(1, 8), x=np.ones((2, 3), np.float32))
    return made.getvalue()


def beside(random: Random, where: Path) -> None:
    """What other tools' folders say of a model."""
    trees = {
        "config.json": seeds.CONFIG, "generation_config.json": {"eos_token_id": [1, 2], "pad_token_id": 0},
        "genai_config.json": {"model": {"eos_token_id": 2, "context_length": 8}},
        "tokenizer_config.json": {"eos_token": {"content": "<s>"},
            "added_tokens_decoder": {"4": {"content": "<s>", "special": True}}},
        "onnxtools.json": {"tokens": {"eos_token_ids": [1], "pad_token_id": 0, "bos_token_id": 1},
            "model": {"max_position_embeddings": 8}},
        "special_tokens_map.json": {"eos_token": "<s>"},
    }  # fmt: skip
    for name, tree in trees.items():
        if random.random() < 0.6:
            (where / name).write_bytes(mutated_json(random, json.dumps(tree).encode()))
    (where / "tokenizer.json").write_text(json.dumps(seeds.TOKENIZER))
    ModelInfo.read(where / "m.onnx", {})
    Tokenizer.open(where)


TARGETS: dict[str, Target] = {
    "load": loading, "save": saving, "infer": inference, "feeds": inputs, "profiles": shapes_of_an_engine,
    "validate": checking,
    "fold-constants": passing(FoldConstants()), "legalize": passing(Legalize()),
    "convert": passing(Convert(), SetOpset(version=21)),
    "add-kv-cache": passing(AddKvCache(), DecomposeAttention()), "prune": passing(Prune()),
    "quantize": passing(Quantize(scheme="int4-rtn")),
    "precision": passing(Precision(to="fp16"), Precision(to="bf16")),
    "gguf": reading("m.gguf", seeds.gguf_file, open_checkpoint),
    "safetensors": reading("m.safetensors", seeds.safetensors_file, read_safetensors),
    "pickle": pickled, "torch": reading("m.bin", lambda: seeds.by_torch()[0], _torch),
    "nemo": reading("m.nemo", seeds.nemo_tar, open_checkpoint),
    "ckpt": reading("m.ckpt", lambda: seeds.by_torch()[1], open_checkpoint),
    "config": exported, "beside": beside,
    "tokenizer": reading("tokenizer.json", _json(seeds.TOKENIZER), tokenizing, mutated_json), "recipe": recipe,
    "shapes": shapes,
    "manifest": reading("e.json", seeds.manifest, engine, mutated_json), "texts": texts,
    "polygraphy": reading("i.json", _json([{"x": [[1.0, 2.0]]}]), read_feeds, mutated_json),
    "npz": reading("i.npz", _npz, read_feeds),
}  # fmt: skip
"""28, by name."""
