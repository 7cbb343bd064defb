"""The one place that opens an ONNX Runtime session."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxtools.base.onnx_runtime import onnxruntime

CPU = ("CPUExecutionProvider",)
CUDA = ("CUDAExecutionProvider", "CPUExecutionProvider")
_BROKEN_OPTIMIZERS = ["ReluQuantRewrite", "ClipQuantRewrite"]
"""These remove a Relu or Clip before QuantizeLinear when the zero point is 0.

That is right for uint8 only; with FP8 it changes the result.
"""


def session_options(*, threads: int = 0, folder: Path | None = None, spinning: bool = True) -> Any:
    """Returns onnxruntime.SessionOptions that print nothing; errors are raised as exceptions.

    Args:
        threads: threads of one operator on the CPU; 0 for all cores.
        folder: the folder of the data files of a graph in memory.
        spinning: whether threads wait for work by spinning. This is faster, but takes the cores from numpy between
            runs.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    # Otherwise ONNX Runtime rounds the activations of INT4 products to 8 bits, which the graph does not say.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(
    source: str | bytes, providers: Sequence[Any] = CPU, options: Any = None, *, qdq_as_written: bool = False
) -> Any:
    """Opens an onnxruntime.InferenceSession. Errors of ONNX Runtime are not translated.

    Args:
        source: the path of a file, or a serialized graph.
        providers: execution providers, the preferred one first.
        options: onnxruntime.SessionOptions; `session_options()` by default. `qdq_as_written` changes them.
        qdq_as_written: compute QuantizeLinear and DequantizeLinear as separate nodes. ONNX Runtime's fusions treat
            FP8 as INT8 (FACTS-te-nemo, 1.7).
    """
    ort = onnxruntime()
    options = options or session_options()
    if qdq_as_written:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    disabled = {"disabled_optimizers": _BROKEN_OPTIMIZERS} if qdq_as_written else {}
    return ort.InferenceSession(source, options, providers=list(providers), **disabled)
