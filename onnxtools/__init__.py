"""onnxtools: ONNX graph surgery and engine building for language models.

The names in `__all__` are the library; the command line is made of the same. A name is imported when it is used, so
`import onnxtools` costs nothing.

    model = onnxtools.load("model.onnx")
    onnxtools.PassManager([onnxtools.load_pass("prune")()]).run(model)
    model.save("sparse.onnx")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onnxtools.base.version import __version__

if TYPE_CHECKING:
    from onnxtools.base.errors import JobError, ModelError, NoMatchError, OnnxtoolsError, UsageError
    from onnxtools.base.options import option
    from onnxtools.check.validate import RandomInputs, Verdict, validate
    from onnxtools.engines.build.builder import Engine
    from onnxtools.engines.build.engine import build
    from onnxtools.engines.build.spec import EngineSpec
    from onnxtools.exporter.export import Exported, export
    from onnxtools.exporter.export_options import ExportOptions
    from onnxtools.generation.generate import generate
    from onnxtools.generation.generation_options import GenerationOptions
    from onnxtools.generation.loop import Generated
    from onnxtools.generation.runtime import Runtime, RuntimeOptions, Session, open_runtime
    from onnxtools.ir.edit import Builder
    from onnxtools.ir.model import Model, load
    from onnxtools.ir.rank import Rank, load_ranks, save_ranks
    from onnxtools.pipeline.manager import Instrument, PassManager, Report, Step
    from onnxtools.pipeline.partition import Partition
    from onnxtools.pipeline.passbase import Pass, PassResult, load_pass
    from onnxtools.storage.save import SaveReport

_HOMES = {
    "base.errors": ("JobError", "ModelError", "NoMatchError", "OnnxtoolsError", "UsageError"),
    "base.options": ("option",),
    "check.validate": ("RandomInputs", "Verdict", "validate"),
    "engines.build.builder": ("Engine",),
    "engines.build.engine": ("build",),
    "engines.build.spec": ("EngineSpec",),
    "exporter.export": ("Exported", "export"),
    "exporter.export_options": ("ExportOptions",),
    "generation.generate": ("generate",),
    "generation.generation_options": ("GenerationOptions",),
    "generation.loop": ("Generated",),
    "generation.runtime": ("Runtime", "RuntimeOptions", "Session", "open_runtime"),
    "ir.edit": ("Builder",),
    "ir.model": ("Model", "load"),
    "ir.rank": ("Rank", "load_ranks", "save_ranks"),
    "pipeline.manager": ("Instrument", "PassManager", "Report", "Step"),
    "pipeline.partition": ("Partition",),
    "pipeline.passbase": ("Pass", "PassResult", "load_pass"),
    "storage.save": ("SaveReport",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Builder", "Engine", "EngineSpec", "ExportOptions", "Exported", "Generated", "GenerationOptions", "Instrument",
    "JobError", "Model", "ModelError", "NoMatchError", "OnnxtoolsError", "Partition", "Pass", "PassManager",
    "PassResult", "RandomInputs", "Rank", "Report", "Runtime", "RuntimeOptions", "SaveReport", "Session", "Step",
    "UsageError", "Verdict", "__version__", "build", "export", "generate", "load", "load_pass", "load_ranks",
    "open_runtime", "option", "save_ranks", "validate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'onnxtools' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"onnxtools.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
