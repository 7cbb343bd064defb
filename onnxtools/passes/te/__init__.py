"""TransformerEngine operators to standard ONNX."""
