"""Engines: built from ONNX graphs, and run.

A builder is found by its name in the entry-point group `onnxtools.builders`, a runtime in `onnxtools.runtimes`; nothing
here imports one at module level.
"""
