"""What an engine really holds: its inspector's layers, and what they say about precision and sparsity.

An engine can be read back only where its GPU is; elsewhere the audit is of the parsed network, and says so.
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
"""Our name of a type, and how the inspector's words for it look; the first that matches counts."""


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine, which may be many of the network.

    Attributes:
        kind: the inspector's LayerType.
        inputs, outputs, weights: types, of each tensor.
        tactic: the kernel; empty where the inspector names none.
        sparse: whether the kernel is one for 2:4 weights.
        origin: names of the ONNX nodes in it.
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
    """Of the inspector's JSON with detailed verbosity (`Layers`; 8.6 to 11 name their keys alike)."""
    layers = information.get("Layers", [])
    return [_layer(entry) for entry in layers if isinstance(entry, dict)]  # without detail they are mere names


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
        sparse=re.search(r"sparse|sptensor", tactic)
        is not None,  # HasSparseWeights is about the weights, not the kernel
        origin=tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(entry.get("Metadata", "")))),
    )


def _dtype(tensor: Mapping[str, Any]) -> str:
    """11 has Datatype, earlier ones a sentence of both: `Row major linear FP16 format`."""
    return _named(str(tensor.get("Datatype", tensor.get("Format/Datatype", tensor.get("Format", "")))))


def _named(text: str) -> str:
    return next((name for name, pattern in _DTYPES if re.search(pattern, text.upper())), text.lower())


def audit_engine(trt: Any, logger: Any, plan: Path) -> list[EngineLayer] | None:
    """The layers of a plan; None where there is no GPU driver, or the plan is for another GPU."""
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
    """The audit of the manifest.

    Args:
        layers: of the engine, or None.
        precisions: type -> layer outputs of the parsed network, which stands in.
    """
    if layers is None:
        return {"source": "parsed network", "outputs": dict(precisions), "layers": None}
    outputs = Counter(dtype for layer in layers for dtype in layer.outputs)
    return {
        "source": "engine inspector", "outputs": dict(outputs.most_common()),
        "sparse": sum(layer.sparse for layer in layers),
        "layers": [asdict(layer) for layer in layers],
    }  # fmt: skip


def holds(audit: Mapping[str, Any], precision: str) -> bool:
    """Whether anything in the engine is of `precision` (fp8, fp16, bf16, int8, int4)."""
    names = {_named(name) for name in audit["outputs"]}
    for layer in audit["layers"] or ():
        names |= {*layer["inputs"], layer["weights"]}
    return precision in names
