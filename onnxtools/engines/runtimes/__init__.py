"""What runs models and engines: ONNX Runtime, TensorRT, PyTorch."""
