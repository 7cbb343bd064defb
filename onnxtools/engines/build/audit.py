"""What an engine really holds: the layers of its inspector, with their precision and sparsity.

An engine can be read back only on a machine with its GPU; elsewhere the audit is of the parsed network, and says so.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_DTYPES = (
    ("fp8", r"FP8|E4M3"), ("int4", r"INT4"), ("fp4", r"FP4|E2M1"), ("int8", r"INT8"),
    ("bf16", r"BF16|BFLOAT16"), ("fp16", r"HALF|FP16|FLOAT16"),
    ("fp32", r"FLOAT|FP32"), ("int64", r"INT64"), ("int32", r"INT32"), ("bool", r"BOOL"),
)  # fmt: skip
"""The manifest's name of a type, and a pattern of the inspector's names for it; the first match counts."""


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine, which may combine many layers of the network.

    Attributes:
        name: the inspector's name of the layer.
        kind: the inspector's LayerType.
        inputs: type of each input.
        outputs: type of each output.
        weights: type of the weights; empty without weights.
        tactic: the kernel; empty where the inspector names none.
        sparse: whether the kernel is for 2:4 weights.
        origin: names of the ONNX nodes in the layer.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: str
    tactic: str
    sparse: bool
    origin: tuple[str, ...]


def read_layers(information: Mapping[str, Any]) -> list[EngineLayer]:
    """The layers of the inspector's JSON with detailed verbosity (`Layers`; 8.6 to 11 name the keys alike)."""
    layers = information.get("Layers", [])
    return [_layer(entry) for entry in layers if isinstance(entry, dict)]  # without details an entry is only a name


def _layer(entry: Mapping[str, Any]) -> EngineLayer:
    tactic = str(entry.get("TacticName", ""))
    weights = entry.get("Weights")
    return EngineLayer(
        name=str(entry.get("Name", "")),
        kind=str(entry.get("LayerType", "")),
        inputs=tuple(_dtype(tensor) for tensor in entry.get("Inputs", [])),
        outputs=tuple(_dtype(tensor) for tensor in entry.get("Outputs", [])),
        weights=_named(str(weights.get("Type", ""))) if isinstance(weights, dict) else "",
        tactic=tactic,
        # HasSparseWeights is about the weights, not the kernel.
        sparse=re.search(r"sparse|sptensor", tactic) is not None,
        origin=tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(entry.get("Metadata", "")))),
    )


def _dtype(tensor: Mapping[str, Any]) -> str:
    """The type of a tensor: TensorRT 11 has Datatype, older ones a text such as `Row major linear FP16 format`."""
    return _named(str(tensor.get("Datatype", tensor.get("Format/Datatype", tensor.get("Format", "")))))


def _named(text: str) -> str:
    return next((name for name, pattern in _DTYPES if re.search(pattern, text.upper())), text.lower())


def audit_engine(trt: Any, logger: Any, plan: Path) -> list[EngineLayer] | None:
    """The layers of a plan; None if there is no GPU driver, or the plan is for another GPU.

    Args:
        trt: the module of TensorRT or TensorRT-RTX.
        logger: an ILogger of `trt`.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        return None
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return read_layers(json.loads(text))


def summary(layers: Sequence[EngineLayer] | None, precisions: Mapping[str, int]) -> dict[str, Any]:
    """The audit that the manifest holds.

    Args:
        layers: layers of the engine; None if it cannot be read back.
        precisions: type -> number of layer outputs of the parsed network, which is used without `layers`.
    """
    if layers is None:
        return {"source": "parsed network", "outputs": dict(precisions), "layers": None}
    outputs = Counter(dtype for layer in layers for dtype in layer.outputs)
    return {
        "source": "engine inspector",
        "outputs": dict(outputs.most_common()),
        "sparse": sum(layer.sparse for layer in layers),
        "layers": [asdict(layer) for layer in layers],
    }


def holds(audit: Mapping[str, Any], precision: str) -> bool:
    """Whether an input, output or weight in the engine has the type `precision` (fp8, fp16, bf16, int8, int4)."""
    names = {_named(name) for name in audit["outputs"]}
    for layer in audit["layers"] or ():
        names |= {*layer["inputs"], layer["weights"]}
    return precision in names
