"""onnxtools: ONNX graph surgery and engine building for language models."""

from onnxtools.base.deferred import defer

__version__ = "0.1.0"

# onnx_ir needs sympy for arithmetic with dimensions alone, but imports it always: 0.3 of the 0.6 s that a command took to start.
defer("sympy")
defer("_symbolic_shapes", package="onnx_ir")
