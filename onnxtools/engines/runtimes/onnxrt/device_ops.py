"""Values on ONNX Runtime's device, and operations on them without a copy through the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnxtools.base.dtypes import of
from onnxtools.base.onnx_runtime import onnxruntime
from onnxtools.check.sessions import CPU, CUDA, open_session


class DeviceOps:
    """Values of one device, whose rows are picked and joined on the device by graphs of one node.

    Such a graph is only made when it is needed: a second CUDA session in the process, once it has run, slows down each
    replay of the step that the first session captured (3.56 to 3.71 ms for GPT-5B on an H200).
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._sessions: dict[tuple[str, int, int, int], Any] = {}

    def value(self, array: np.ndarray) -> Any:
        """`array` as a value on the device; on the CPU the value shares the memory of `array`."""
        ort = onnxruntime()
        return ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def values(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """`value` of each array, by name."""
        return {name: self.value(array) for name, array in arrays.items()}

    def zeros(self, shape: list[int], dtype: str) -> Any:
        """A value of zeros; `dtype` is ONNX's name of the type in lower case."""
        ort = onnxruntime()
        kind = of(dtype)
        if kind.numpy().isbuiltin == 1:
            return self.value(np.zeros(shape, kind.numpy()))
        elem = int(kind.value)  # numpy itself lacks the type, and ONNX Runtime takes its bits; zero is all bits zero
        bits = np.zeros(shape, f"u{kind.numpy().itemsize}")
        if self.device == "cpu":
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, elem)
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, elem, self.device, 0)
        value.update_inplace(bits)
        return value

    def picked(self, value: Any, rows: np.ndarray, axis: int) -> Any:
        """`value` with its entries along `axis` replaced by those at `rows` (int64)."""
        return self._run("Gather", [value, self.value(rows)], axis)

    def joined(self, values: Sequence[Any], axis: int) -> Any:
        """`values` of one type, concatenated along `axis`."""
        return self._run("Concat", values, axis)

    def _run(self, op_type: str, values: Sequence[Any], axis: int) -> Any:
        session = self._session(op_type, axis, values[0].element_type(), len(values))
        binding = session.io_binding()
        for index, value in enumerate(values):
            binding.bind_ortvalue_input(f"x{index}", value)
        binding.bind_output("y", self.device, 0)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    def _session(self, op_type: str, axis: int, elem: int, count: int) -> Any:
        key = (op_type, axis, elem, count)
        if key not in self._sessions:
            types = [(elem, 4), (onnx.TensorProto.INT64, 1)] if op_type == "Gather" else [(elem, 4)] * count
            info = onnx.helper.make_tensor_value_info
            inputs = [info(f"x{index}", kind, [None] * rank) for index, (kind, rank) in enumerate(types)]
            node = onnx.helper.make_node(op_type, [value.name for value in inputs], ["y"], axis=axis)
            graph = onnx.helper.make_graph([node], op_type, inputs, [info("y", elem, [None] * 4)])
            model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
            self._sessions[key] = open_session(model.SerializeToString(), CUDA if self.device == "cuda" else CPU)
        return self._sessions[key]
