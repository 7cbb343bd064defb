"""The `onnxtools` command."""
