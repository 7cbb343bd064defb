"""CUDA kernels of our own for ONNX Runtime: which nodes they replace, their sources, and compiling them."""
