"""Our kernels' graph: on a CPU each of our operators is put back as standard ones and must compute what the model did
before.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper

from onnxtools.base.errors import JobError
from onnxtools.check.feeds import random_feeds
from onnxtools.engines.kernels.library import find_nvcc, kernel_library
from onnxtools.engines.kernels.rewrite import DOMAIN, use_kernels
from onnxtools.engines.runtimes.onnxrt.next_token import AHEAD, NEXT, PAST_TOKENS, add_next_token
from onnxtools.exporter.export import export
from onnxtools.exporter.export_options import ExportOptions
from onnxtools.generation.generate import generate
from onnxtools.generation.generation_options import GenerationOptions
from onnxtools.generation.runtime import RuntimeOptions, open_runtime
from onnxtools.ir.model import Model

GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_embd": 64, "n_head": 2,
    "vocab_size": 96, "n_positions": 64,
    "activation_function": "gelu_new", "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
MEGATRON = {
    "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel", "mcore_gpt": True,
    "num_layers": 2, "hidden_size": 64,
    "ffn_hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": 64,
    "position_embedding_type": "learned_absolute",
    "normalization": "layernorm", "activation": "gelu", "openai_gelu": True, "bias": True,
    "share_embeddings_and_output_weights": True,
    "override_vocab_size": 96,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 96, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip


def exported(folder: Path, config: dict[str, object], **options: object) -> Path:
    (folder / ("model_config.yaml" if "target" in config else "config.json")).write_text(json.dumps(config))
    export(folder, folder / "model.onnx", ExportOptions(random=True, **options))  # type: ignore[arg-type]
    return folder / "model.onnx"


def standard(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Each operator of ours in ONNX Runtime's own, as engines/kernels/cuda/library.cc says what it computes."""
    nodes = []
    for node in proto.graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        name, out = node.output[0], list(node.output)
        if node.op_type == "Linear":
            gelu, bias = given["activation"] == b"GELU", len(node.input) > 2
            last = f"{name}/sum" if gelu else name
            nodes.append(helper.make_node("Transpose", [node.input[1]], [f"{name}/w"]))
            nodes.append(
                helper.make_node("MatMul", [node.input[0], f"{name}/w"], [f"{name}/product" if bias else last])
            )
            if bias:
                nodes.append(helper.make_node("Add", [f"{name}/product", node.input[2]], [last]))
            if gelu:
                nodes.append(helper.make_node("Gelu", [last], [name], approximate="tanh"))
        elif node.op_type == "LastToken":
            nodes += last_token(name, *node.input)
        elif node.op_type == "GroupQueryAttention":
            nodes.append(
                helper.make_node(
                    node.op_type, [node.input[0], "", "", *node.input[1:]], out, domain="com.microsoft", **given
                )
            )
        elif node.input[1]:
            nodes.append(
                helper.make_node(node.op_type, node.input, [out[0], "", "", *out[1:]], domain="com.microsoft", **given)
            )
        else:
            plain = {
                "SkipLayerNormalization": "LayerNormalization",
                "SkipSimplifiedLayerNormalization": "RMSNormalization",
            }[node.op_type]
            nodes.append(helper.make_node(plain, [node.input[0], *node.input[2:]], out, axis=-1, **given))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    if not any(entry.domain == "com.microsoft" for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


def last_token(name: str, rows: str, mask: str) -> list[onnx.NodeProto]:
    """By a product with the one-hot row of the last token: OneHot of ArgMax(CumSum(mask of the last tokens))."""
    made = []

    def op(op_type: str, inputs: list[str], out: str, **attributes: Any) -> str:
        made.append(helper.make_node(op_type, inputs, [f"{name}/{out}"], **attributes))
        return f"{name}/{out}"

    def number(values: list[int], out: str) -> str:
        return op("Constant", [], out, value_ints=values)

    new, axis = op("Shape", [rows], "new", start=1, end=2), number([1], "axis")
    recent = op("Slice", [mask, op("Neg", [new], "begin"), number([2**31], "end"), axis], "recent")
    summed = op("CumSum", [recent, op("Constant", [], "one", value_int=1)], "summed")
    last = op("ArgMax", [summed], "last", axis=1, keepdims=0)  # the first of the largest: what follows adds nothing
    values = op("Cast", [number([0, 1], "values")], "values16", to=onnx.TensorProto.FLOAT16)
    hot = op("OneHot", [last, new, values], "hot")
    made.append(helper.make_node("MatMul", [op("Unsqueeze", [hot, axis], "row"), rows], [name]))
    return made


def logits(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], folder: Path) -> np.ndarray:
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize(
    ("config", "form", "made"),
    [
        (MEGATRON, "gqa last", {"products": 9, "attentions": 2, "norms": 5, "picks": 2}),
        (LLAMA, "gqa last", {"products": 11, "attentions": 2, "norms": 5, "picks": 2}),
        (LLAMA, "scatter last", {"products": 15, "norms": 5}),
        (MEGATRON, "gqa", {"products": 9, "attentions": 2, "norms": 5}),
        (GPT2, "gqa", {"products": 1, "attentions": 2, "norms": 5}),  # its weights are stored [K, N]; the head is not
        (LLAMA, "gqa", {"products": 11, "attentions": 2, "norms": 5}),
        (MEGATRON, "scatter", {"products": 13, "norms": 5}),
        (LLAMA, "concat", {"products": 15, "norms": 5}),
    ],
)
def test_our_operators_compute_what_the_graph_did(
    tmp_path: Path, config: dict[str, object], form: str, made: dict[str, int]
) -> None:
    cache, _, kept = form.partition(" ")
    path = exported(tmp_path, config, dtype="fp16", kv_cache=cache, logits=kept or "all")
    model = Model.load(path)
    feeds = random_feeds(model, batch=2, sequence=7)
    if cache == "gqa":
        feeds["attention_mask"] = (np.arange(7) < [[5], [7]]).astype(np.int64)
        for value in model.graph.inputs:
            if value.name and value.name.startswith("past"):
                assert value.shape is not None
                feeds[value.name] = np.zeros([2, value.shape[1], 7, value.shape[3]], np.float16)
    before = logits(model.proto(), feeds, tmp_path)
    assert use_kernels(model) == Counter(made)
    onnx.checker.check_model(standard(model.proto()), check_custom_domain=False)
    after = logits(standard(model.proto()), feeds, tmp_path)
    # fp16: what is added before a rounding and what after it.
    assert np.linalg.norm(after - before) <= 4e-3 * np.linalg.norm(before)


def test_what_our_kernels_do_not_take_stays(tmp_path: Path) -> None:
    odd = LLAMA | {"hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 112}  # 64 divides neither
    path = exported(tmp_path, odd, dtype="fp16", kv_cache="gqa")
    model = Model.load(path)
    assert use_kernels(model) == Counter({"attentions": 2, "norms": 5})
    assert {node.op_type for node in model.graph if node.domain == DOMAIN} == {
        "GroupQueryAttention",
        "SkipSimplifiedLayerNormalization",
    }
    full = tmp_path / "full"
    full.mkdir()
    assert not use_kernels(Model.load(exported(full, LLAMA, dtype="fp32", kv_cache="gqa", logits="last")))


F16 = np.float16
WIDE, ONES = np.ones((64, 64), F16), np.ones(64, F16)


def graph_of(
    folder: Path, nodes: list[onnx.NodeProto], shapes: dict[str, list[int | str]], **stored: np.ndarray
) -> Model:
    """`nodes`, whose last output is the graph's, with fp16 inputs of `shapes` and stored arrays."""
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, shape) for name, shape in shapes.items()]
    out = helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT16, None)
    graph = helper.make_graph(
        nodes, "odd", inputs, [out], [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()]
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), folder / "odd.onnx")
    return Model.load(folder / "odd.onnx")


@pytest.mark.parametrize(
    ("nodes", "shapes", "stored"),
    [
        # A shift that is not a vector of the width, or computed: our kernel fetches it ahead.
        ([("LayerNormalization", "x scale shift", "y", {})], {"x": [2, 64]}, {"scale": ONES, "shift": ONES[:1]}),
        (
            [("Add", "b b", "shift", {}), ("LayerNormalization", "x scale shift", "y", {})],
            {"x": [2, 64], "b": [64]},
            {"scale": ONES},
        ),
        ([("RMSNormalization", "x scale", "y", {})], {"x": [2, 64]}, {"scale": np.array(1, F16)}),
        ([("LayerNormalization", "x scale", "y", {"axis": 0})], {"x": [2, 64]}, {"scale": np.ones((2, 64), F16)}),
        # A product of another kind.
        ([("Gemm", "x w", "y", {})], {"x": [2, 64]}, {"w": WIDE}),
        ([("Gemm", "x w", "y", {"transB": 1, "alpha": 0.5})], {"x": [2, 64]}, {"w": WIDE}),
        ([("Gemm", "x w c", "y", {"transB": 1})], {"x": [2, 64], "c": [2, 64]}, {"w": WIDE}),
        ([("Gemm", "x w", "y", {"transB": 1})], {"x": [2, 32]}, {"w": WIDE[:, :32].copy()}),
    ],
)
def test_what_only_looks_alike_stays(
    tmp_path: Path, nodes: list[Any], shapes: dict[str, Any], stored: dict[str, np.ndarray]
) -> None:
    made = [helper.make_node(op, inputs.split(), [output], **attributes) for op, inputs, output, attributes in nodes]
    assert not use_kernels(graph_of(tmp_path, made, shapes, **stored))


def test_a_bias_along_another_axis_is_not_the_products(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["p"], transB=1), helper.make_node("Reshape", ["p", "shape"], ["r"]),
        helper.make_node("Add", ["r", "b"], ["y"]),
    ]  # fmt: skip
    model = graph_of(tmp_path, nodes, {"x": ["rows", 64]}, w=WIDE, b=ONES, shape=np.array([-1, 64, 1]))
    assert use_kernels(model) == Counter({"products": 1})
    assert [node.op_type for node in model.graph] == ["Linear", "Reshape", "Add"]


def replace(node: ir.Node, *inputs: ir.Value) -> None:
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("min for max", lambda n: setattr(n["Max"], "op_type", "Min")),
        ("max of three", lambda n: replace(n["Max"], *n["Max"].inputs, n["Sub"].outputs[0])),
        ("max of one", lambda n: replace(n["Max"], n["Max"].inputs[0])),
        ("minus 0", lambda n: n["Sub"].replace_input_with(1, n["Max"].inputs[1])),
        ("sum of everything", lambda n: replace(n["ReduceSum"], n["ReduceSum"].inputs[0])),
        ("the largest", lambda n: setattr(n["ReduceSum"], "op_type", "ReduceMax")),
        ("every second", lambda n: replace(n["Slice"], *n["Slice"].inputs, n["Unsqueeze"].inputs[1])),
        ("not to the end", lambda n: n["Slice"].replace_input_with(2, n["Unsqueeze"].inputs[1])),
        ("another width", lambda n: n["Concat"].replace_input_with(1, n["Unsqueeze"].inputs[1])),
        ("the first ones", lambda n: n["Slice"].replace_input_with(1, n["Max"].inputs[1])),
        ("as many as rows", lambda n: n["Neg"].replace_input_with(0, n["Concat"].inputs[0])),
        ("another batch", lambda n: n["Concat"].replace_input_with(0, n["Neg"].inputs[0])),
        ("an int32 mask", lambda n: setattr(n["Slice"].inputs[0], "dtype", ir.DataType.INT32)),
    ],
)
def test_another_index_than_the_last_tokens_is_not_picked(
    tmp_path: Path, what: str, change: Callable[[dict[str, ir.Node]], None]
) -> None:
    path = exported(tmp_path, LLAMA, dtype="fp16", kv_cache="gqa", logits="last")
    assert use_kernels(Model.load(path))["picks"] == 2
    model = Model.load(path)
    chain = {node.name.rpartition("/")[2]: node for node in model.graph if node.name.startswith("/model/last")}
    for concat in ("Concat", "Concat_1"):  # each pick has its own
        change(chain | {"Concat": chain[concat]})
    assert use_kernels(model)["picks"] == 0


def test_the_operators_own_epsilon_is_kept(tmp_path: Path) -> None:
    skip = helper.make_node("SkipLayerNormalization", ["x", "s", "scale"], ["y"], domain="com.microsoft")
    plain = helper.make_node("LayerNormalization", ["y", "scale"], ["z"])
    model = graph_of(tmp_path, [skip, plain], {"x": [2, 64], "s": [2, 64]}, scale=ONES)
    assert use_kernels(model) == Counter({"norms": 2})
    assert [node.attributes["epsilon"].value for node in model.graph] == [pytest.approx(1e-12), pytest.approx(1e-5)]


@pytest.mark.parametrize("form", ["gqa", "scatter"])
def test_steps_that_feed_each_other_find_the_tokens_of_steps_by_the_host(tmp_path: Path, form: str) -> None:
    extra = {"cache_length": 24} if form == "scatter" else {}
    path = exported(tmp_path, LLAMA, dtype="fp32", kv_cache=form, **extra)
    prompts, new = [[5, 9, 30, 31, 77], [3, 8]], 6
    expected = [
        best[0].token_ids
        for best in generate(
            open_runtime("onnxrt", path, RuntimeOptions(device="cpu")),
            prompts,
            GenerationOptions(max_new_tokens=new, ignore_eos=True),
        )
    ]
    model = Model.load(path)
    add_next_token(model, ahead=True, kernel=False)
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
    session = ort.InferenceSession(model.proto().SerializeToString(), settings, providers=["CPUExecutionProvider"])
    slots, lengths = 24, np.array([len(p) for p in prompts])
    ids = np.zeros((2, 5), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    mask = (np.arange(slots if form == "scatter" else 5) < lengths[:, None]).astype(np.int64)
    feeds = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.broadcast_to(np.arange(5), (2, 5)),
        PAST_TOKENS: np.zeros((2, 1), np.int64),
    }
    feeds |= {"write_indices": np.zeros(2, np.int64)} if form == "scatter" else {}
    feeds |= {
        i.name: np.zeros([2, i.shape[1], slots, i.shape[3]], np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_key")
    }
    wanted = {i.name for i in session.get_inputs()}
    found = dict(
        zip(
            [o.name for o in session.get_outputs()],
            session.run(None, {k: v for k, v in feeds.items() if k in wanted}),
            strict=True,
        )
    )
    first = found[NEXT][np.arange(2), lengths - 1]
    state = {
        "input_ids": first[:, None], "attention_mask": (np.arange(slots) <= lengths[:, None]).astype(np.int64),
        "position_ids": lengths[:, None],
        "write_indices": lengths, PAST_TOKENS: np.zeros((2, slots), np.int64),
    }  # fmt: skip
    for _ in range(new - 1):
        caches = {
            name.replace("present", "past_key_values"): value
            for name, value in found.items()
            if name.startswith("present")
        }
        found = dict(
            zip(
                [o.name for o in session.get_outputs()],
                session.run(None, {k: v for k, v in (state | caches).items() if k in wanted}),
                strict=True,
            )
        )
        state = {name: found[f"{AHEAD}.{name}"] for name in state if f"{AHEAD}.{name}" in found} | {
            "input_ids": found[NEXT], PAST_TOKENS: found[f"{AHEAD}.tokens"],
        }  # fmt: skip
    tokens = state[PAST_TOKENS][np.arange(2)[:, None], lengths[:, None] + 1 + np.arange(new - 1)]
    assert [[int(one), *row] for one, row in zip(first, tokens.tolist(), strict=True)] == expected


# --- the library ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = find_nvcc()
    if found is None:
        pytest.skip("there is no nvcc to compile the kernels")
    return found


def test_the_library_compiles_once_and_onnxruntime_takes_it(
    tmp_path: Path, nvcc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = kernel_library(nvcc, 90)
    made = path.stat().st_mtime_ns
    assert kernel_library(nvcc, 90) == path and path.stat().st_mtime_ns == made
    # The kernel is not for the CPU, so a session is refused either way. Its words change from release to release of
    # ONNX Runtime; that they are others once the library is there says that the operator is known.
    assert cpu_refusal("Linear", path) != cpu_refusal("Linear")
    assert cpu_refusal("Linea", path) == cpu_refusal("Linea")


def cpu_refusal(op_type: str, library: Path | None = None) -> str:
    """What ONNX Runtime says to an operator of ours on the CPU, with our library or without."""
    settings = ort.SessionOptions()
    if library is not None:
        settings.register_custom_ops_library(str(library))
    x, w, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, [None, 64]) for name in "xwy")
    node = helper.make_node(op_type, ["x", "w"], ["y"], domain=DOMAIN, activation="NONE")
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(helper.make_graph([node], "one", [x, w], [y]), opset_imports=opsets, ir_version=9)
    with pytest.raises(Exception, match=op_type) as caught:
        ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return str(caught.value)


def test_a_library_that_does_not_compile_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "nvcc"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 13 && exit 0\necho "linear.cu(1): error: no" >&2\nexit 2\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(JobError, match=r"cannot compile our kernels: linear.cu\(1\): error: no"):
        kernel_library(str(fake), 90)
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_nvcc_is_found_by_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvcc() == str(nvcc)
