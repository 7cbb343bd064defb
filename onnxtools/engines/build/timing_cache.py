"""The timing cache file: locked, merged with what other builds wrote meanwhile, and never half written.

TensorRT-RTX has no timing cache, and a note says so.
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
    """`spec` with the file for this GPU and this version, if its timing cache is a folder.

    Timings of another GPU or version are of no use.
    """
    if spec.timing_cache is None or not Path(spec.timing_cache).is_dir():
        return spec
    query = ["nvidia-smi", f"--id={spec.device}", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    description = (
        subprocess.run(query, capture_output=True, text=True, check=False).stdout if shutil.which("nvidia-smi") else ""
    )
    gpu = re.sub(r"[^A-Za-z0-9.]+", "-", description.strip()) or "no-gpu"
    return dataclasses.replace(
        spec, timing_cache=str(Path(spec.timing_cache) / f"{gpu}-{backend}-{'.'.join(map(str, version))}.cache")
    )


def rtx_note(path: Path) -> str:
    """The note on a timing cache for TensorRT-RTX, whose calls for one are deprecated and do nothing."""
    return f"timing cache: TensorRT-RTX has none; {path} {'left as it is' if path.exists() else 'not written'}"


class TimingCache:
    """The timing cache of one build, loaded from the file and merged into it afterwards.

    Several builds may use one file at once: each merges its timings into what the file holds when it is done.

    Args:
        config: an IBuilderConfig of TensorRT.
        path: the cache file, which need not exist.

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
        self._loaded = _entries(cache)

    @classmethod
    def open(cls, builder: str, config: Any, spec: EngineSpec) -> TimingCache | None:
        """The timing cache of `spec`; None if it names none, or for TensorRT-RTX."""
        return (
            cls(config, Path(spec.timing_cache))
            if spec.timing_cache is not None and builder != "tensorrt-rtx"
            else None
        )

    def save(self) -> list[str]:
        """Merge the new timings into the file; returns a line for people.

        Raises:
            JobError: the cache that is in the file now cannot be merged.
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
        new = _entries(mine) - self._loaded
        amount = f"{self._loaded} timings known, {new} measured" if self._loaded >= 0 else f"{len(data)} bytes"
        return [f"timing cache: {self.path}, {amount}"]

    def _locked(self) -> FileLock:
        return FileLock(self.path.with_name(f"{self.path.name}.lock"))


def _entries(cache: Any) -> int:
    """Number of timings in the cache; -1 before TensorRT 10, which does not report it."""
    return len(cache.queryKeys()) if hasattr(cache, "queryKeys") else -1
