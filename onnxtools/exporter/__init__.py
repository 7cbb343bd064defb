"""From a checkpoint to ONNX: families say what a checkpoint means, one set of builders writes the graph."""
