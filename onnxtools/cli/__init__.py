"""The command line: one file a command."""

from onnxtools.base.deferred import defer

# onnx_ir needs sympy for arithmetic with dimensions alone, but imports it always: 0.3 of the 0.6 s that a command took
# to start.
defer("sympy")
defer("_symbolic_shapes", package="onnx_ir")
