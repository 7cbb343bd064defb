"""The runtime `trt`: a TensorRT or TensorRT-RTX engine built by `onnxtools build`.

NOT YET RUN: no machine of this project runs these engines.

The module is kept thin. All that can be known without a GPU (inputs and outputs, caches, which profile fits) is read
from the manifest beside the plan and is tested. The decode loop is the same as for ONNX Runtime. concat: the cache
alternates between two buffers. scatter: the cache is written in place (KVCacheUpdate aliases input and output). Every
buffer is as large as the longest run that was started.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onnxtools.analysis.decoder_io import DecoderIO, Port, decoder_io
from onnxtools.base.dtypes import itemsize, of
from onnxtools.base.errors import JobError
from onnxtools.base.extras import install_line
from onnxtools.checkpoints.model_info import ModelInfo
from onnxtools.engines.build.manifest import check_plan, read_manifest
from onnxtools.engines.runtimes.onnxrt.ort_session import device_name
from onnxtools.generation.runtime import (
    Floats,
    HostLogits,
    Ids,
    Logits,
    Prompts,
    RuntimeOptions,
    check_length,
    check_slots,
    padded,
    positions_of,
)
from onnxtools.ir.description import MODEL_KEY

Shapes = Mapping[str, Sequence[int]]
_EXTRAS = {"tensorrt-rtx": "rtx", "tensorrt": "tensorrt"}
_MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}


def engine_io(engine: Path, manifest: Mapping[str, Any]) -> DecoderIO:
    """The decoder's ports as the manifest lists them."""
    inputs, outputs = (
        [Port(t["name"], t["dtype"], tuple(d if d >= 0 else None for d in t["shape"])) for t in manifest[key]]
        for key in ("inputs", "outputs")
    )
    return decoder_io(engine, inputs, outputs)


def choose_profile(profiles: Sequence[Mapping[str, Any]], shapes: Shapes, engine: Path) -> int:
    """Index of the first profile that takes `shapes`.

    Raises:
        JobError: none does; names the first input that is outside the first profile.
    """
    problem = ""
    for index, profile in enumerate(profiles):
        ranges = profile["inputs"]
        outside = next((n for n, shape in shapes.items() if n in ranges and not _within(shape, ranges[n])), None)
        if outside is None:
            return index
        problem = (
            problem
            or f"{outside} of {list(shapes[outside])} is outside profile {profile['name']!r} "
            f"({ranges[outside]['min']} to {ranges[outside]['max']})"
        )
    raise JobError(
        f"{engine}: no profile takes this run: {problem}; run a smaller batch or text, or build with wider shapes"
    )


def _within(shape: Sequence[int], limits: Mapping[str, Sequence[int]]) -> bool:
    return all(low <= extent <= high for extent, low, high in zip(shape, limits["min"], limits["max"], strict=True))


class TrtRuntime:
    """See the module; the attributes are those of `Runtime`.

    Raises:
        JobError: there is no manifest, TensorRT, GPU or cache, or the plan is for another GPU or version.
    """

    def __init__(self, path: Path, options: RuntimeOptions) -> None:
        self.name, self.path = "trt", path
        self.notes: list[str] = [
            "the runtime trt has not been run on hardware by this project; check its texts against onnxrt"
        ]
        self.manifest = read_manifest(path)
        self.io = engine_io(path, self.manifest)
        info = self.manifest["graph"].get("info")
        self.info = ModelInfo.read(path, {MODEL_KEY: info} if isinstance(info, str) else {})
        self.vocab_size, self.has_cache, self.pads = self.io.vocab_size, bool(self.io.caches), self.io.mask is not None
        self.weight_bytes = int(self.manifest["engine"]["bytes"])
        if not self.has_cache:
            raise JobError(f"{path}: the engine has no KV cache; add one with add-kv-cache and build again")
        if options.device == "cpu":
            raise JobError(f"{path}: an engine runs on a GPU alone; run the ONNX model on the CPU")
        backend = str(self.manifest["backend"]["name"])
        try:
            self._trt: Any = importlib.import_module(_MODULES[backend])
            self._cuda: Any = importlib.import_module("cuda.bindings.runtime")
        except (KeyError, ImportError) as error:
            needs = f"{install_line(_EXTRAS.get(backend, 'tensorrt'))} cuda-python"
            raise JobError(
                f"{path}: an engine of {backend} needs its runtime and cuda-python ({error}); {needs}"
            ) from None
        if not self._cuda_ok():
            raise JobError(
                f"{path}: there is no CUDA device; run the engine where its GPU is, or the ONNX model with --runtime "
                "onnxrt"
            )
        self.device = device_name("cuda")
        self._open(options)
        self.buffers: dict[str, tuple[int, int]] = {}

    # --- opening -----------------------------------------------------------------------------------------------------

    def _cuda_ok(self) -> bool:
        error, count = self._cuda.cudaGetDeviceCount()
        return int(error) == 0 and count > 0

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call a CUDA function; raises JobError with CUDA's own message."""
        error, *results = getattr(self._cuda, function)(*arguments)
        if int(error):
            raise JobError(
                f"{self.path}: {function} failed: "
                f"{self._cuda.cudaGetErrorString(error)[1].decode()}{self._room(function)}"
            )
        return results[0] if results else None

    def _room(self, function: str) -> str:
        if function != "cudaMalloc":
            return ""
        error, free, total = self._cuda.cudaMemGetInfo()
        return (
            "" if int(error) else f" ({free / 1e9:.1f} of {total / 1e9:.1f} GB are free); run a smaller batch or text"
        )

    def _capability(self) -> str:
        kind = self._cuda.cudaDeviceAttr
        names = (kind.cudaDevAttrComputeCapabilityMajor, kind.cudaDevAttrComputeCapabilityMinor)
        return ".".join(str(self._call("cudaDeviceGetAttribute", name, 0)) for name in names)

    def _open(self, options: RuntimeOptions) -> None:
        trt = self._trt
        check_plan(self.path, self.manifest, version=str(trt.__version__), capability=self._capability())
        self._stream = self._call("cudaStreamCreate")
        engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(self.path.read_bytes())
        if engine is None:
            raise JobError(
                f"{self.path}: the plan does not load here (another GPU, or another version of "
                f"{self.manifest['backend']['name']}); build it here"
            )
        self._engine = engine
        self._cache_file: Path | None = None
        config: list[Any] = []
        # TensorRT-RTX compiles its kernels at the first run and keeps them in this file.
        if hasattr(engine, "create_runtime_config"):
            self._cache_file = self.path.with_name(f"{self.path.name}.runtime-cache")
            config = [engine.create_runtime_config()]
            self._runtime_cache = config[0].create_runtime_cache()
            if self._cache_file.is_file():
                self._runtime_cache.deserialize(self._cache_file.read_bytes())
            config[0].set_runtime_cache(self._runtime_cache)
            if options.cuda_graph and self.io.kind == "scatter":
                config[0].cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # There is a context for each profile: switching the profile of a context would wait for the device.
        self._contexts = [engine.create_execution_context(*config) for _ in range(engine.num_optimization_profiles)]
        for index, context in enumerate(self._contexts):
            context.set_optimization_profile_async(index, int(self._stream))

    # --- the protocol ------------------------------------------------------------------------------------------------

    def open(self, slots: int, length: int) -> TrtSession:
        return TrtSession(self, slots, length)

    def score(self, prompts: Prompts) -> list[Floats]:
        if not self.io.logits_all:
            raise JobError(
                f"{self.path}: returns the logits of the last token alone; export with --logits all to score texts"
            )
        session = self.open(len(prompts), max(map(len, prompts)))
        ids, logits = session.prompts(prompts)
        right = self.side == "right"
        return [
            logits[row, : len(p)] if right else logits[row, ids.shape[1] - len(p) :] for row, p in enumerate(prompts)
        ]

    def close(self) -> None:
        if self._cache_file is not None:
            self._cache_file.write_bytes(bytes(self._runtime_cache.serialize()))
        for pointer, _ in self.buffers.values():
            self._call("cudaFree", pointer)
        self.buffers.clear()

    # --- the device --------------------------------------------------------------------------------------------------

    @property
    def side(self) -> Literal["left", "right"]:
        """The side on which prompts are padded."""
        return "right" if self.io.kind == "scatter" else "left"

    def buffer(self, name: str, size: int) -> int:
        """The address of the device buffer `name` of at least `size` bytes, zeroed when it is allocated."""
        pointer, room = self.buffers.get(name, (0, 0))
        if size > room:
            if pointer:
                self._call("cudaFree", pointer)
            pointer = int(self._call("cudaMalloc", max(size, 1)))
            self._call("cudaMemset", pointer, 0, max(size, 1))
            self.buffers[name] = (pointer, size)
        return pointer

    def copy(self, to: int, of: int, size: int, kind: str) -> None:
        """Copy `size` bytes from address `of` to address `to` in the stream; `kind` names a cudaMemcpyKind."""
        self._call("cudaMemcpyAsync", to, of, size, getattr(self._cuda.cudaMemcpyKind, kind), self._stream)

    def sync(self) -> None:
        """Wait for the stream."""
        self._call("cudaStreamSynchronize", self._stream)

    def run(self, ids: Ids, mask: Ids, positions: Ids, write: Ids, *, past: int, swapped: bool) -> Floats:
        """Execute the engine once; returns all logits, fp32 [rows, tokens or 1, vocabulary].

        Args:
            ids: int64 [rows, tokens].
            mask: int64 [rows, total].
            positions: int64 [rows, tokens].
            write: the first slot to write of each row, int64 [rows].
            past: number of tokens in the cache.
            swapped: whether a concat cache is in the buffers named after the present outputs.

        Raises:
            JobError: no profile takes the shapes, or TensorRT or CUDA fails.
        """
        io = self.io
        pairs = ((io.ids, ids), (io.mask, mask), (io.positions, positions), (io.write_indices, write))
        arrays = {port.name: np.ascontiguousarray(array, port.dtype) for port, array in pairs if port is not None}
        shapes: dict[str, list[int]] = {name: list(array.shape) for name, array in arrays.items()}
        shapes |= {cache.past.name: cache.shape(len(ids), past) for cache in io.caches}
        context = self._contexts[
            choose_profile(self.manifest["profiles"], shapes, self.path) if self.manifest["profiles"] else 0
        ]
        for name, array in arrays.items():
            self.copy(self.buffer(name, array.nbytes), array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")
        addresses = {name: self.buffers[name][0] for name in arrays}
        for cache in io.caches:
            past_buffer, present_buffer = (
                self.buffers[cache.past.name][0],
                self.buffers[cache.present.name if io.kind == "concat" else cache.past.name][0],
            )
            addresses[cache.past.name], addresses[cache.present.name] = (
                (present_buffer, past_buffer) if swapped else (past_buffer, present_buffer)
            )
        tokens = ids.shape[1] if io.logits_all else 1
        logits = np.empty((len(ids), tokens, self.vocab_size), of(io.logits.dtype).numpy())
        addresses[io.logits.name] = self.buffer(io.logits.name, logits.nbytes)
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise JobError(f"{self.path}: the engine refuses {name} of {shape}; build with wider shapes")
        for name, address in addresses.items():
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(int(self._stream)):
            raise JobError(
                f"{self.path}: the engine failed on {len(ids)} rows of {ids.shape[1]} tokens after {past}; see "
                "TensorRT's log"
            )
        self.copy(logits.ctypes.data, addresses[io.logits.name], logits.nbytes, "cudaMemcpyDeviceToHost")
        self.sync()
        return logits.astype(np.float32, copy=False)


class TrtSession:
    """See `Session`; rows run in step: joining caches on the device is not implemented yet."""

    joins = False

    def __init__(self, runtime: TrtRuntime, slots: int, length: int) -> None:
        self._runtime, self.slots, self.length, self._swapped = runtime, slots, length, False
        io = runtime.io
        if io.cache_length is not None and length > io.cache_length:
            raise JobError(
                f"{runtime.path}: its cache has {io.cache_length} slots and {length} tokens are wanted; build with a "
                "longer cache"
            )
        for cache in io.caches:
            size = int(np.prod(cache.shape(slots, length))) * itemsize(cache.past.dtype)
            runtime.buffer(cache.past.name, size)
            if io.kind == "concat":
                runtime.buffer(cache.present.name, size)

    def prompts(self, prompts: Prompts) -> tuple[Ids, Floats]:
        """Run the prompts; returns their padded ids [rows, tokens] and all logits, as `TrtRuntime.run` does."""
        runtime = self._runtime
        ids, mask = padded(prompts, runtime.info.pad_token_id, runtime.side)
        self._mask, self._lengths = mask, mask.sum(axis=1)
        if runtime.io.kind == "scatter":
            self._mask = np.pad(mask, ((0, 0), (0, (runtime.io.cache_length or 0) - mask.shape[1])))
        return ids, self._run(ids, positions_of(mask), np.zeros(self.slots, np.int64), past=0)

    def _run(self, ids: Ids, positions: Ids, write: Ids, *, past: int) -> Floats:
        logits = self._runtime.run(ids, self._mask, positions, write, past=past, swapped=self._swapped)
        self._swapped = self._runtime.io.kind == "concat" and not self._swapped
        return logits

    def admit(self, slots: Sequence[int], prompts: Prompts) -> Logits:
        check_slots(self, slots)
        check_length(self._runtime.info, self.length, max(map(len, prompts)), str(self._runtime.path))
        _, logits = self.prompts(prompts)
        ends = self._lengths - 1 if self._runtime.side == "right" else np.full(self.slots, -1)
        return HostLogits(logits[np.arange(self.slots), ends if logits.shape[1] > 1 else 0])

    def step(self, ids: Ids, slots: Sequence[int] | None = None) -> Logits:
        if slots is not None:
            check_slots(self, slots)
        past, positions = self._mask.shape[1], self._lengths.copy()
        if self._runtime.io.kind == "scatter":
            self._mask[np.arange(self.slots), positions] = 1
        else:
            self._mask = np.concatenate([self._mask, np.ones((self.slots, 1), np.int64)], axis=1)
        self._lengths = self._lengths + 1
        return HostLogits(self._run(ids[:, None], positions[:, None], positions, past=past)[:, -1])

    def release(self, slot: int) -> None:
        """Nothing is done: the row of the slot runs on, and its logits are not read."""

    def reorder(self, rows: Ids) -> None:
        """Reorder the caches through the host: beam search on engines is not optimized yet."""
        runtime = self._runtime
        for cache in runtime.io.caches:
            address = runtime.buffers[cache.present.name if self._swapped else cache.past.name][0]
            array = np.empty(cache.shape(self.slots, self._mask.shape[1]), of(cache.past.dtype).numpy())
            runtime.copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")
            runtime.sync()
            picked = np.ascontiguousarray(np.take(array, rows, axis=1 if cache.axis == 0 else 0))
            runtime.copy(address, picked.ctypes.data, picked.nbytes, "cudaMemcpyHostToDevice")
            runtime.sync()
        self._mask, self._lengths = self._mask[rows], self._lengths[rows]

    def close(self) -> None:
        """The buffers stay with the runtime."""
