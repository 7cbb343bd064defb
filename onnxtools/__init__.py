"""onnxtools: ONNX graph surgery and engine building for language models."""

__version__ = "0.1.0"
