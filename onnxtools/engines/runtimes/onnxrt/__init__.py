"""The runtime `onnxrt`: ONNX Runtime on the CPU or CUDA, caches kept on the device."""
