"""Building an engine: preflight (what TensorRT would refuse or silently misread), profiles, the plan, its audit and
manifest.
"""
