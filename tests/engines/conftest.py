"""Every test here builds with the real TensorRT-RTX, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onnxtools.engines.build.builder import Engine
from onnxtools.engines.build.engine import build
from onnxtools.engines.build.spec import EngineSpec

try:
    import tensorrt_rtx  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_engine_*.py"]

Build = Callable[..., Engine]


@pytest.fixture
def make(tmp_path: Path) -> Build:
    """Build a model to tmp_path/e.engine with small derived profiles."""

    def run(source: Path, **options: Any) -> Engine:
        small = {} if "min_shapes" in options else {"max_batch_size": 2, "max_seq_len": 16}
        values: dict[str, Any] = {**small, "backend": "tensorrt-rtx", **options}
        return build(source, tmp_path / "e.engine", EngineSpec(**values), force=True)

    return run
