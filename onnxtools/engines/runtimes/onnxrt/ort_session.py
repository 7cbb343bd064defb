"""ONNX Runtime sessions: provider, device values, and the small graphs that work on device memory."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir

from onnxtools.analysis.cache import settle_sizes
from onnxtools.analysis.decoder_io import Port
from onnxtools.analysis.experts import mixtures
from onnxtools.analysis.facts import FILTERS
from onnxtools.base.errors import JobError, one_line
from onnxtools.base.extras import install_line
from onnxtools.base.onnx_runtime import onnxruntime
from onnxtools.check.sessions import CPU, open_session, session_options
from onnxtools.engines.kernels.library import MIN_CAPABILITY, device_capability, find_nvcc, kernel_library
from onnxtools.engines.kernels.rewrite import use_kernels
from onnxtools.engines.runtimes.onnxrt.next_token import add_next_token
from onnxtools.generation.runtime import RuntimeOptions
from onnxtools.ir.model import Model
from onnxtools.ir.query import attribute, is_fp8_qdq, is_op


def choose_device(wanted: str, notes: list[str]) -> str:
    """`cuda` or `cpu`, by `wanted` (auto, cpu or cuda); a note says why auto takes the CPU.

    Raises:
        JobError: CUDA was asked for, and this ONNX Runtime has no CUDA provider.
    """
    ort = onnxruntime()
    has = "CUDAExecutionProvider" in ort.get_available_providers()
    if has:
        _preload(ort)
    elif wanted == "cuda":
        raise JobError(
            f"this ONNX Runtime has no CUDA provider; {install_line('gpu')}, or run on the CPU with --device cpu"
        )
    if wanted == "auto" and not (has and _cuda_devices()):
        if has:
            notes.append("ONNX Runtime has a CUDA provider and finds no device: runs on the CPU")
        return "cpu"
    return "cpu" if wanted == "cpu" else "cuda"


def _preload(ort: Any) -> None:
    """Load the CUDA libraries of torch or of the nvidia wheels, if they are installed."""
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401  # its libraries are found once it is loaded
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()


@functools.cache
def _cuda_devices() -> tuple[str, ...]:
    """Names of the GPUs as nvidia-smi lists them; none without nvidia-smi."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if listing.returncode != 0:
        return ()
    return tuple(line.strip() for line in listing.stdout.splitlines() if line.strip())


def device_name(device: str) -> str:
    """`device`, with the name of the first GPU for `cuda`."""
    return f"cuda ({_cuda_devices()[0]})" if device == "cuda" and _cuda_devices() else device


def device_memory() -> tuple[int, int] | None:
    """Used and total memory of the first GPU in bytes; None without one."""
    if not _cuda_devices():
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits", "--id=0"]
    used, total = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(",")
    return int(used) << 20, int(total) << 20


def why_not_captured(model: Model) -> str:
    """Why no run of `model` can be captured as a CUDA graph, or ''.

    A graph replays launches of fixed sizes. ONNX Runtime captures operators whose results' sizes depend on the data
    too, and the replay then reads memory that is not there (1.31, CUDA error 700).
    """
    node = next((node for node in model.nodes_everywhere() if is_op(node, *FILTERS)), None)
    if node is None:
        return ""
    more = "; `lower-ort` makes MoE of experts, which can" if any(True for _ in mixtures(model.graph)) else ""
    return f"the size of what {node.op_type} returns depends on the data{more}"


def open_decoder(
    model: Model, options: RuntimeOptions, device: str, notes: list[str], *, graph: bool
) -> tuple[Any, bool]:
    """A session of `model`, and whether its runs can be captured as CUDA graphs.

    Args:
        device: `cpu` or `cuda`.
        notes: notes for people are added to it.
        graph: whether to enable CUDA graphs.

    Raises:
        JobError: ONNX Runtime does not take the graph, or has no working CUDA.
    """
    assert model.path is not None
    if device == "cpu":
        return _session(str(model.path), session_options(threads=options.threads), CPU, model), False
    settings = session_options(threads=options.threads, folder=model.path.parent)
    obstacle = why_not_captured(model) if graph else ""
    if obstacle:
        graph = False
        notes.append(f"no CUDA graph: {obstacle}")
    ours = register_kernels(settings, options, notes)
    if ours:
        counts = use_kernels(model)
        notes.append(
            "our kernels: "
            + (", ".join(f"{count} {name}" for name, count in counts.items()) or "none of the model's operators")
        )
    add_next_token(model, ahead=graph, kernel=ours)
    data = model.proto().SerializeToString()
    for captured in (True, False) if graph else (False,):
        # The session computes as the graph says: norms accumulate in fp32 (strict mode), and fp32 is not TF32.
        cuda = {
            "enable_cuda_graph": str(int(captured)),
            "enable_skip_layer_norm_strict_mode": "1",
            "use_tf32": "0",
            "arena_extend_strategy": "kSameAsRequested",
        }
        try:
            with _without_xqa() if _heads_alone(model) else contextlib.nullcontext():
                session = _session(data, settings, [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"], model)
        except JobError as error:
            if captured and "graph capture" in str(error):
                notes.append("no CUDA graph: part of the model runs on the CPU")
                continue
            if ours and not is_out_of_memory(error):
                raise JobError(f"{error} (with our kernels: run with --no-kernels to see whether it is they)") from None
            raise
        if session.get_providers()[0] != "CUDAExecutionProvider":
            raise JobError(
                "ONNX Runtime's CUDA provider does not start (are CUDA and cuDNN of its version installed?); run with "
                "--device cpu"
            )
        return session, captured
    raise AssertionError


@contextlib.contextmanager
def _without_xqa() -> Iterator[None]:
    """Disable XQA while a session is created: kernels read the environment variable then.

    XQA shares a KV head among its query heads. With one query head per KV head it took 29 us where cuDNN took 19 (H200,
    16 x 32 heads, 148 tokens).
    """
    name = "ORT_ENABLE_XQA"
    if name in os.environ:
        yield
        return
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]


def _session(source: str | bytes, settings: Any, providers: Sequence[Any], model: Model) -> Any:
    try:
        return open_session(source, providers, settings, qdq_as_written=any(map(is_fp8_qdq, model.graph)))
    except Exception as error:
        if is_out_of_memory(error):
            raise JobError(
                f"{model.path}: out of memory while loading {model.weight_bytes() / 1e9:.1f} GB of weights; use a "
                "larger device"
            ) from None
        bf16 = any(value.dtype == ir.DataType.BFLOAT16 for node in model.graph for value in node.outputs)
        if "NOT_IMPLEMENTED" in str(error) and bf16 and providers is CPU:
            advice = "use --device cuda, or `onnxtools precision --to fp16` of the fp32 model"
            raise JobError(
                f"{model.path}: is bf16, for which ONNX Runtime has no kernels on the CPU; {advice}"
            ) from None
        if any(node.domain == "trt" for node in model.nodes_everywhere()):
            raise JobError(
                f"{model.path}: has TransformerEngine's operators, which ONNX Runtime has not; run `onnxtools convert` "
                "first"
            ) from None
        raise JobError(f"{model.path}: ONNX Runtime cannot load the graph: {one_line(error)}") from None


def register_kernels(settings: Any, options: RuntimeOptions, notes: list[str]) -> bool:
    """Register onnxtools' kernels with the session options `settings`.

    They are registered if `options` ask for them, the GPU supports them, and they can be compiled and loaded.

    Returns:
        Whether they are registered. If they cannot be compiled or loaded, `notes` says why.
    """
    capability = device_capability() if options.kernels else 0
    if capability < MIN_CAPABILITY:
        return False
    nvcc = find_nvcc()
    try:
        if nvcc is None:
            raise JobError("there is no nvcc to compile them; install the CUDA toolkit")
        settings.register_custom_ops_library(str(kernel_library(nvcc, capability)))
    except Exception as error:
        notes.append(f"our kernels are not used, which is slower: {one_line(error)}; or say --no-kernels")
        return False
    return True


def _heads_alone(model: Model) -> bool:
    """Whether there are GroupQueryAttention nodes and all have as many KV heads as query heads."""
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    return bool(nodes) and all(attribute(node, "num_heads") == attribute(node, "kv_num_heads") for node in nodes)


_OUT_OF_MEMORY = (
    "out of memory",
    "Failed to allocate memory",
    "bad allocation",
    "std::bad_alloc",
    "Available memory of",
    "Unable to allocate",
)
"""Texts of ONNX Runtime's and CUDA's messages on a lack of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of ONNX Runtime or CUDA, which is recognized by its text, means a lack of memory."""
    text = str(error)
    return isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY)


def ports(model: Model) -> tuple[list[Port], list[Port]]:
    """The inputs and the outputs of the graph, in order."""
    settle_sizes(model)
    return [_port(value) for value in model.graph.inputs], [_port(value) for value in model.graph.outputs]


def _port(value: ir.Value) -> Port:
    dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape) if value.shape is not None else ()
    return Port(value.name or "", value.dtype.name.lower() if value.dtype is not None else "?", dims)
