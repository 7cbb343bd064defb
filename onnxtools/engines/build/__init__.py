"""Building an engine: preflight, profiles, the plan, its audit and its manifest.

The preflight finds what TensorRT would refuse or silently misread.
"""
