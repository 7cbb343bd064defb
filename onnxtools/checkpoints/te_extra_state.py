"""Reads TransformerEngine's `_extra_state`: FP8 scales in a pickle or torch.save archive inside the checkpoint."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxtools.base.errors import ModelError
from onnxtools.base.inputs import shown
from onnxtools.checkpoints.torch_file import loads

_MOST = 4096
"""Most scales of a module."""
Array = np.ndarray[Any, Any]


def forward_scales(extra: Any, label: str) -> Array | None:
    """Returns `scale_fwd` of a module, float32 [3 x GEMMs]: the scales of activation, weight and output of each GEMM.

    The result is None if the module has no FP8 state.

    Args:
        extra: BytesIO (TransformerEngine 1.x), a uint8 tensor (2023, and 2.x), or None.
        label: names the module in errors.

    Raises:
        ModelError: the state is damaged, a scale is not a positive number, or the pickle needs more than data.
    """
    data = _bytes(extra, label)
    if not data:
        return None
    state = loads(data, f"the FP8 state of {label}")
    scale = state.get("scale_fwd") if isinstance(state, dict) else None
    if scale is None:
        return None
    if not isinstance(scale, ir.TensorProtocol) or scale.size > _MOST:
        raise ModelError(f"the FP8 state of {label} holds {shown(scale)} as its scales; save the checkpoint again")
    array = np.asarray(scale.numpy(), np.float32).reshape(-1)
    if array.size < 2 or not np.isfinite(array).all() or array.min() <= 0:
        raise ModelError(
            f"the FP8 state of {label} holds the scales {array[:6].tolist()}; they must be positive numbers"
        )
    return array


def _bytes(extra: Any, label: str) -> bytes:
    if isinstance(extra, io.BytesIO):
        return extra.getvalue()
    if isinstance(extra, ir.TensorProtocol) and extra.dtype == ir.DataType.UINT8:
        return extra.tobytes()
    if extra is None or isinstance(extra, ir.TensorProtocol):
        return b""
    raise ModelError(
        f"the FP8 state of {label} is a {type(extra).__name__}, not the bytes that TransformerEngine writes; save the "
        "checkpoint again"
    )
