"""Checks whether a changed graph still computes the same: runs both graphs on ONNX Runtime and compares."""
