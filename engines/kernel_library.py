"""The library of our CUDA kernels: compiled once by nvcc for the card that is there, and kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import filelock

from onnxtools.errors import JobError
from onnxtools.storage import replacing

SOURCES = Path(__file__).parent / "cuda"
MIN_CAPABILITY = 90
"""Hopper: thread block clusters, and launches that overlap."""


def find_nvcc() -> str | None:
    """Of the path, else of CUDA_HOME, else of where CUDA is usually installed."""
    folders = [folder for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if folder]
    return shutil.which("nvcc") or next((found for folder in folders if (found := shutil.which("nvcc", path=f"{folder}/bin"))), None)


def kernel_library(nvcc: str, capability: int) -> Path:
    """The library for cards of `capability` (90: 9.0), compiled where it is not there yet (10 s).

    It is named by what it was made of, so another version of the sources or of the compiler never finds it.

    Raises:
        JobError: it cannot be compiled.
    """
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    sources = sorted(SOURCES.iterdir())
    digest = hashlib.sha256(b"\0".join([version, *(path.read_bytes() for path in sources)])).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxtools"
    path = folder / f"kernels-sm{capability}-{digest}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock"):
            if not path.exists():
                _compile(nvcc, capability, [str(source) for source in sources if source.suffix in (".cc", ".cu")], path)
    return path


def _compile(nvcc: str, capability: int, sources: list[str], path: Path) -> None:
    with replacing(path) as tmp:
        command = [
            nvcc, "-O3", "-std=c++17", f"-gencode=arch=compute_{capability},code=sm_{capability}", "--threads", "0", "--shared",
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", *sources, "-o", str(tmp),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = next((line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()), f"exit code {done.returncode}")
            raise JobError(f"{nvcc} cannot compile our kernels: {said[:200]}; run with --no-kernels, and please report it")
