"""Does a graph still compute the same? Runs it on ONNX Runtime, and compares."""
