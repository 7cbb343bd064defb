"""The builders `tensorrt` and `tensorrt-rtx`, through TensorRT's Python interface."""
