"""The library of our CUDA kernels: compiled once by nvcc for the card that is there, and kept in the user's cache
folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
from pathlib import Path

import filelock

from onnxtools.base.errors import JobError
from onnxtools.storage.files import replacing

SOURCES = Path(__file__).parent / "cuda"
MIN_CAPABILITY = 90
"""Hopper: thread block clusters, and launches that overlap."""
_FLAGS = ("-O3", "-std=c++17", "--threads", "0", "--shared", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")


def device_capability() -> int:
    """Of the device that CUDA counts as the first (90: 9.0), which may not be nvidia-smi's; 0 where there is none or no
    driver.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
    for found, wanted in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        failed = failed or cuda.cuDeviceGetAttribute(ctypes.byref(found), wanted, device)
    return 0 if failed else 10 * major.value + minor.value


def find_nvcc() -> str | None:
    """Of the path, else of CUDA_HOME, else of where CUDA is usually installed."""
    folders = [folder for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if folder]
    return shutil.which("nvcc") or next(
        (found for folder in folders if (found := shutil.which("nvcc", path=f"{folder}/bin"))), None
    )


def kernel_library(nvcc: str, capability: int) -> Path:
    """The library for cards of `capability` (90: 9.0), compiled where it is not there yet (10 s).

    It is named by what it was made of, so another version of the sources or of the compiler, or another machine, never
    finds it.

    Raises:
        JobError: it cannot be compiled.
    """
    done = subprocess.run([nvcc, "--version"], capture_output=True, check=False)
    if done.returncode:
        raise JobError(f"{nvcc} --version fails; repair the CUDA toolkit")
    sources = sorted(SOURCES.iterdir())
    made_of = [done.stdout, " ".join((*_FLAGS, platform.machine())).encode(), *(path.read_bytes() for path in sources)]
    digest = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxtools"
    path = folder / f"kernels-sm{capability}-{digest}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_own(folder)
    if not path.exists():
        with filelock.FileLock(f"{path}.lock"):
            if not path.exists():
                _compile(nvcc, capability, [str(source) for source in sources if source.suffix in (".cc", ".cu")], path)
    _check_own(path)
    return path


def _check_own(path: Path) -> None:
    """What lies here runs with our rights, so nobody else may have written it.

    Raises:
        JobError: it is another user's, or others may write to it.
    """
    status = path.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022 or stat.S_ISLNK(status.st_mode):
        raise JobError(
            f"{path}: our compiled kernels may lie only where you alone can write; `chown` it to you and `chmod go-w` "
            "it, or set XDG_CACHE_HOME"
        )


def _compile(nvcc: str, capability: int, sources: list[str], path: Path) -> None:
    with replacing(path) as tmp:
        command = [nvcc, *_FLAGS, f"-gencode=arch=compute_{capability},code=sm_{capability}", *sources, "-o", str(tmp)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = next(
                (
                    line
                    for line in (done.stdout + done.stderr).splitlines()
                    if "error" in line.lower() or "fatal" in line.lower()
                ),
                f"exit code {done.returncode}",
            )
            raise JobError(f"{nvcc} cannot compile our kernels: {said[:200]}")
        tmp.chmod(0o600)
