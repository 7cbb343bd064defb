"""TransformerEngine's custom operators as ONNX functions, so that ONNX Runtime can run an export as it is.

The functions follow the operators' definition (dequantized value = stored value * scale) with Div, Clip and Cast. They
share no code with the passes that rewrite the operators, and so can check them.
"""

from __future__ import annotations

import onnx
from onnx import parser

_FP8 = """
<domain: "trt", opset_import: ["" : 19]>
TRT_FP8QuantizeLinear (x, scale) => (y)
{
    wide = Cast <to = 1> (x)
    wide_scale = Cast <to = 1> (scale)
    ratio = Div (wide, wide_scale)
    low = Constant <value_float = -448.0> ()
    high = Constant <value_float = 448.0> ()
    limited = Clip (ratio, low, high)
    y = Cast <to = 17> (limited)
}
""", """
<domain: "trt", opset_import: ["" : 19]>
TRT_FP8DequantizeLinear (x, scale) => (y)
{
    wide = Cast <to = 1> (x)
    wide_scale = Cast <to = 1> (scale)
    y = Mul (wide, wide_scale)
}
"""  # fmt: skip

# The scale is the smallest power of two >= amax / 448. Log alone may miss exact powers by a rounding error, hence the
# two corrections.
_MX = """
<domain: "trt", opset_import: ["" : 19]>
TRT_MXFP8DynamicQuantize (x) => (y, scale)
{
    wide = Cast <to = 1> (x)
    lead = Shape <start = 0, end = -1> (wide)
    block = Constant <value_ints = [-1, 32]> ()
    split = Concat <axis = 0> (lead, block)
    blocks = Reshape (wide, split)
    size = Abs (blocks)
    last = Constant <value_ints = [-1]> ()
    amax = ReduceMax <keepdims = 1> (size, last)
    limit = Constant <value_float = 448.0> ()
    tiny = Constant <value_float = 2.7e-36> ()
    amax1 = Max (amax, tiny)
    ratio = Div (amax1, limit)
    ln = Log (ratio)
    ln2 = Constant <value_float = 0.6931471805599453> ()
    log2 = Div (ln, ln2)
    guess = Round (log2)
    two = Constant <value_float = 2.0> ()
    power = Pow (two, guess)
    low = Less (power, ratio)
    up = Cast <to = 1> (low)
    half = Div (power, two)
    high = GreaterOrEqual (half, ratio)
    down = Cast <to = 1> (high)
    raised = Add (guess, up)
    exponent = Sub (raised, down)
    factor = Pow (two, exponent)
    scaled = Div (blocks, factor)
    floor = Constant <value_float = -448.0> ()
    limited = Clip (scaled, floor, limit)
    whole = Shape (wide)
    flat = Reshape (limited, whole)
    y = Cast <to = 17> (flat)
    scale = Squeeze (factor, last)
}
""", """
<domain: "trt", opset_import: ["" : 19]>
TRT_MXFP8DequantizeLinear (x, scale) => (y)
{
    wide = Cast <to = 1> (x)
    lead = Shape <start = 0, end = -1> (wide)
    block = Constant <value_ints = [-1, 32]> ()
    split = Concat <axis = 0> (lead, block)
    blocks = Reshape (wide, split)
    last = Constant <value_ints = [-1]> ()
    column = Unsqueeze (scale, last)
    product = Mul (blocks, column)
    whole = Shape (wide)
    y = Reshape (product, whole)
}
"""  # fmt: skip


def functions(opset: int) -> list[onnx.FunctionProto]:
    """Returns all `trt::` functions.

    Args:
        opset: the version of the default operator set that they import. It must be the model's.
    """
    parsed = [parser.parse_function(text.strip()) for text in (*_FP8, *_MX)]
    for function in parsed:
        function.opset_import[0].version = opset
        if function.name.startswith("TRT_MXFP8"):
            # `te-mxfp8-to-qdq --keep-mx` writes these attributes for TensorRT, which takes no other values.
            function.attribute_proto.extend(
                [onnx.helper.make_attribute("axis", -1), onnx.helper.make_attribute("block_size", 32)]
            )
    return parsed
