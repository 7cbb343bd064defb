"""What several test modules share: the fixtures, ONNX Runtime and a decoder without the product's code, the command
line.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxtools.cli.main import main

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "fixtures"
SHARED = ROOT.parent / "shared"
"""Files beside the repository, not part of a clone; a test asks for one by `present`."""
SHARED_TE = SHARED / "fixtures" / "te"
FP8 = ml_dtypes.float8_e4m3fn
FLOAT, HALF, INT64, UINT8, E4M3 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT64,
    TensorProto.UINT8,
    TensorProto.FLOAT8E4M3FN,
)


# --- fixtures ---------------------------------------------------------------------------------------------------------

TE = ("te_gpt_fp8_ds", "te_gpt_fp8_ds_dyn", "te_gpt_none_dyn", "te_linear_fp8_ds", "te_lnmlp_fp8_ds")
STYLE = tuple(sorted(path.stem for path in (FIXTURES / "te_style").glob("*.onnx")))
MX = ("gpt_mxfp8", "mxfp8_linear")
STATIC = ("te_gpt_fp8_ds", "gpt_static_arange")
HALF_PRECISION = ("gpt_fp16_fp8", "gpt_bf16_fp8", "ts_gpt_fp16")
"""16-bit models: a rounding that falls the other way moves an FP8 value by 6%, so they agree only within their
`noise`.
"""
NO_ATTENTION = ("te_linear_fp8_ds", "te_lnmlp_fp8_ds", "mxfp8_linear")


def fixture_path(name: str) -> Path:
    """The model `name`, from the repository's own copy where there is one; it may be absent (../shared)."""
    own = [FIXTURES / folder / f"{name}.onnx" for folder in ("te", "te_style")]
    return next((path for path in own if path.exists()), SHARED_TE / f"{name}.onnx")


def present(path: Path) -> Path:
    """`path`, or the test is skipped: what lies beside the repository is not part of a clone."""
    if not path.exists():
        pytest.skip(f"{path} is absent (it is not part of a clone)")
    return path


@dataclass(frozen=True)
class Case:
    """One fixture: the model and the data beside it."""

    name: str

    @property
    def path(self) -> Path:
        return fixture_path(self.name)

    @property
    def data(self) -> Feeds:
        with np.load(self.path.with_suffix(".npz")) as archive:
            return {name: archive[name] for name in archive.files}

    @property
    def feeds(self) -> Feeds:
        return {
            name: array
            for name, array in self.data.items()
            if name not in ("te_export_mode", "te_native", "expected", "noise")
        }

    @property
    def expected(self) -> Array:
        """TransformerEngine's own output in export mode, or PyTorch's eager output."""
        data = self.data
        return data["te_export_mode"] if "te_export_mode" in data else data["expected"]

    @property
    def tolerance(self) -> float:
        """Relative L2: 1e-6 in fp32 graphs, the stored `noise` in 16-bit FP8 ones."""
        return max(1e-6, float(self.data["noise"])) if self.name in HALF_PRECISION else 1e-6

    @property
    def sequence(self) -> int:
        return int(self.feeds["input_ids"].shape[1])


def rel_l2(actual: Array, expected: Array) -> float:
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def max_abs(actual: Array, expected: Array) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max())


# --- running a file ---------------------------------------------------------------------------------------------------


class Session:
    """A model file on ONNX Runtime, as any user would load it; bfloat16 and E8M0 scales go to onnx.reference."""

    def __init__(self, path: Path) -> None:
        proto = onnx.load(path)
        self.inputs = {value.name: value for value in proto.graph.input}
        self.outputs = [value.name for value in proto.graph.output]
        types = {tensor.data_type for tensor in proto.graph.initializer}
        if types & {TensorProto.BFLOAT16, TensorProto.FLOAT8E8M0}:
            self._evaluator = ReferenceEvaluator(proto)
            self._run = self._reference
            return
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry(
            "session.disable_quant_qdq", "1"
        )  # ONNX Runtime breaks FP8 Q/DQ around fp32 MatMul
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._run = self._onnxruntime

    def __call__(self, feeds: Mapping[str, Array]) -> Feeds:
        return dict(zip(self.outputs, self._run({name: feeds[name] for name in self.inputs}), strict=True))

    def _reference(self, feeds: Feeds) -> list[Array]:
        return [np.asarray(value) for value in self._evaluator.run(None, feeds)]

    def _onnxruntime(self, feeds: Feeds) -> list[Array]:
        values = {name: self._value(array) for name, array in feeds.items()}
        return [self._array(value) for value in self._session.run_with_ort_values(None, values)]

    @staticmethod
    def _value(array: Array) -> Any:
        array = np.ascontiguousarray(array)
        if array.dtype == FP8:
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), E4M3)
        return ort.OrtValue.ortvalue_from_numpy(array)

    @staticmethod
    def _array(value: Any) -> Array:
        array: Array = value.numpy()
        return array.view(FP8) if "float8e4m3fn" in value.data_type() else array


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def decode(session: Session, feeds: Mapping[str, Array], steps: Sequence[int]) -> Array:
    """Logits of a cached model that is fed `steps` tokens at a time; what a runtime would do, written out."""
    batch = feeds["input_ids"].shape[0]
    cache: Feeds = {}
    axes: dict[str, int] = {}
    for name, value in session.inputs.items():
        if name.startswith("past_key_values"):
            shape = dims(value)
            axes[name] = shape.index("past_sequence")
            sizes = [size if isinstance(size, int) else 0 if size == "past_sequence" else batch for size in shape]
            cache[name] = np.zeros(sizes, helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
    done, logits = 0, []
    for step in steps:
        window = {
            name: array[:, : done + step] if name == "attention_mask" else array[:, done : done + step]
            for name, array in feeds.items()
        }
        results = session({**{k: v for k, v in window.items() if k in session.inputs}, **cache})
        for name in cache:
            rest = name.removeprefix("past_key_values")
            output = next(
                prefix + rest
                for prefix in ("present", "present_key_values", "new_key_values")
                if prefix + rest in results
            )
            new = results[output]
            cache[name] = joined(cache[name], new, axes[name]) if output.startswith("new") else new
            assert cache[name].shape[axes[name]] == done + step
        logits.append(results["logits"])
        done += step
    return np.concatenate(logits, axis=1)


def joined(past: Array, new: Array, axis: int) -> Array:
    """Concatenation by bytes: numpy joins no FP8."""
    if new.dtype != FP8:
        return np.concatenate([past, new], axis)
    return np.concatenate([past.view(np.uint8), new.view(np.uint8)], axis).view(FP8)


def splits(sequence: int) -> list[list[int]]:
    """At once, one by one, a prompt and steps, uneven chunks, an early cut."""
    third = sequence // 3
    return [
        [sequence],
        [1] * sequence,
        [sequence // 2] + [1] * (sequence - sequence // 2),
        [third, third, sequence - 2 * third],
        [1, sequence - 1],
    ]


# --- making small models ----------------------------------------------------------------------------------------------


def info(name: str, shape: Sequence[int | str | None] | None, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def stored(**arrays: Array) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto] = (),
    *,
    opset: int = 18,
    domains: Sequence[str] = (),
    ir_version: int = 10,
    value_info: Sequence[onnx.ValueInfoProto] = (),
) -> Path:
    """A model file; `domains` come first in opset_import, as some exporters write them."""
    imports = [*(helper.make_opsetid(domain, 1) for domain in domains), helper.make_opsetid("", opset)]
    graph = helper.make_graph(
        list(nodes), "graph", list(inputs), list(outputs), list(initializers), value_info=list(value_info)
    )
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=ir_version), path)
    return path


def external(path: Path, data_name: str = "weights.bin", size_threshold: int = 0) -> Path:
    """Move the weights of `path` to a data file beside it, as onnx does it."""
    proto = onnx.load(path)
    onnx.save(proto, path, save_as_external_data=True, location=data_name, size_threshold=size_threshold)
    return path


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def linear(path: Path, weight: Array | None = None, *, opset: int = 18, name: str = "w") -> Path:
    """y = x @ w, [4, 64] @ [64, 128] unless given."""
    weight = normal(64, 128) if weight is None else weight
    inputs, outputs = [info("x", [4, weight.shape[0]])], [info("y", [4, weight.shape[1]])]
    return write(
        path,
        [helper.make_node("MatMul", ["x", name], ["y"], name="mm")],
        inputs,
        outputs,
        stored(**{name: weight}),
        opset=opset,
    )


def e4m3(x: Array) -> Array:
    """The reference rounding to E4M3: saturate at 448, round to nearest even (ml_dtypes)."""
    return np.clip(x.astype(np.float32), -448, 448).astype(FP8)


def initializers(path: Path) -> dict[str, Array]:
    return {
        tensor.name: numpy_helper.to_array(tensor, str(path.parent)) for tensor in onnx.load(path).graph.initializer
    }


def ops(path: Path) -> list[str]:
    return [
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in onnx.load(path, load_external_data=False).graph.node
    ]


def opsets(path: Path) -> dict[str, int]:
    return {entry.domain: entry.version for entry in onnx.load(path, load_external_data=False).opset_import}


# --- the command line -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def run(*args: str | Path) -> Result:
    """The command line in this process, up to and including its exit code."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in args])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def succeed(*args: str | Path) -> Result:
    result = run(*args)
    assert result.code == 0, result.err
    return result


def refuse(*args: str | Path, code: int = 1) -> str:
    """The one line on stderr of a command that must fail; nothing else may be on stderr."""
    result = run(*args)
    assert result.code == code, (result.code, result.err)
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err and "internal error" not in result.err, result.err
    return result.err
