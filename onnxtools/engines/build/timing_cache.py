"""The timing cache file: locked, merged with what others wrote meanwhile, and never half written.

TensorRT-RTX has none, and we say so.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from filelock import FileLock

from onnxtools.base.errors import JobError
from onnxtools.engines.build.spec import EngineSpec
from onnxtools.engines.build.versions import Version
from onnxtools.storage.files import make_parent, replacing


def check_timing_cache(path: Path) -> None:
    """Create the folder of a cache, and refuse one that no builder could read or write.

    Raises:
        JobError: it cannot be read, or its folder cannot be made.
    """
    make_parent(path)
    if path.exists() and not os.access(path, os.R_OK):
        raise JobError(f"--timing-cache {path} cannot be read; check its permissions")


def with_cache_file(spec: EngineSpec, backend: str, version: Version) -> EngineSpec:
    """A timing cache that is a folder becomes its file of this GPU and this version: timings of another are of no
    use.
    """
    if spec.timing_cache is None or not Path(spec.timing_cache).is_dir():
        return spec
    query = ["nvidia-smi", f"--id={spec.device}", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    told = (
        subprocess.run(query, capture_output=True, text=True, check=False).stdout if shutil.which("nvidia-smi") else ""
    )
    gpu = re.sub(r"[^A-Za-z0-9.]+", "-", told.strip()) or "no-gpu"
    return dataclasses.replace(
        spec, timing_cache=str(Path(spec.timing_cache) / f"{gpu}-{backend}-{'.'.join(map(str, version))}.cache")
    )


def rtx_note(path: Path) -> str:
    """What TensorRT-RTX does with a timing cache (its calls for one are deprecated and do nothing)."""
    return f"timing cache: TensorRT-RTX has none; {path} {'left as it is' if path.exists() else 'not written'}"


class TimingCache:
    """The cache of one build; made from the file, and merged into it afterwards.

    Several builds may use one file at once: each merges its timings into what the file holds when it is done.

    Args:
        config: an IBuilderConfig of TensorRT.
    Raises:
        JobError: the file is of another TensorRT or another GPU, or damaged.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self._config, self.path = config, path
        with self._locked():
            data = path.read_bytes() if path.exists() else b""
        cache = config.create_timing_cache(data)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise JobError(
                f"{path}: is no timing cache of this TensorRT and this GPU; name another file with --timing-cache, or "
                "remove it"
            )
        self._known = _entries(cache)

    @classmethod
    def open(cls, builder: str, config: Any, spec: EngineSpec) -> TimingCache | None:
        """None where none was asked for, and for TensorRT-RTX."""
        return (
            cls(config, Path(spec.timing_cache))
            if spec.timing_cache is not None and builder != "tensorrt-rtx"
            else None
        )

    def save(self) -> list[str]:
        """Merge into the file; a line for people.

        Raises:
            JobError: what lies in the file now cannot be merged.
        """
        mine = self._config.get_timing_cache()
        with self._locked():
            if self.path.exists():
                whole = self._config.create_timing_cache(self.path.read_bytes())
                if whole is None or not whole.combine(mine, ignore_mismatch=False):
                    raise JobError(
                        f"{self.path}: was replaced by a timing cache that does not fit; the new timings are lost, the "
                        "engine is not"
                    )
            else:
                whole = mine
            data = bytes(memoryview(whole.serialize()))
            with replacing(self.path) as tmp:
                tmp.write_bytes(data)
        new = _entries(mine) - self._known
        what = f"{self._known} timings known, {new} measured" if self._known >= 0 else f"{len(data)} bytes"
        return [f"timing cache: {self.path}, {what}"]

    def _locked(self) -> FileLock:
        return FileLock(self.path.with_name(f"{self.path.name}.lock"))


def _entries(cache: Any) -> int:
    """How many timings; -1 before TensorRT 10, which does not say."""
    return len(cache.queryKeys()) if hasattr(cache, "queryKeys") else -1
