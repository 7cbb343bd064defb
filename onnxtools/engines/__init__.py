"""Building engines from ONNX graphs, and running them.

`build.build(model, engine, spec)` is the whole job: preflight (what TensorRT would refuse or, worse, silently misread),
profiles, the builder, the plan and its manifest. A builder is found by its name in the entry-point group
`onnxtools.builders`; this package imports none of them at module level.
"""
