"""The library of onnxtools' CUDA kernels: compiled once by nvcc for the card of the machine.

It is kept in the user's cache folder.
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
"""First compute capability x 10 of the kernels: Hopper has thread block clusters and overlapping launches."""
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76
"""CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR (cuda.h)."""
_FLAGS = ("-O3", "-std=c++17", "--threads", "0", "--shared", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")


def device_capability() -> int:
    """Compute capability x 10 (90: 9.0) of CUDA's first device; 0 without a device or driver.

    It need not be the first device of nvidia-smi.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
    for number, attribute in ((major, _COMPUTE_CAPABILITY_MAJOR), (minor, _COMPUTE_CAPABILITY_MINOR)):
        failed = failed or cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    return 0 if failed else 10 * major.value + minor.value


def find_nvcc() -> str | None:
    """The nvcc on PATH, else in CUDA_HOME, else in /usr/local/cuda; None without one."""
    folders = [folder for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if folder]
    return shutil.which("nvcc") or next(
        (path for folder in folders if (path := shutil.which("nvcc", path=f"{folder}/bin"))), None
    )


def kernel_library(nvcc: str, capability: int) -> Path:
    """The library for cards of `capability` (90: 9.0), compiled if it does not exist yet (10 s).

    Its name holds a hash of the sources, the compiler's version, the flags and the machine type, so none of them finds
    a library of another.

    Raises:
        JobError: it cannot be compiled, or other users can write to it or to its folder.
    """
    compiler = subprocess.run([nvcc, "--version"], capture_output=True, check=False)
    if compiler.returncode:
        raise JobError(f"{nvcc} --version fails; repair the CUDA toolkit")
    sources = sorted(SOURCES.iterdir())
    target = " ".join((*_FLAGS, platform.machine())).encode()
    ingredients = [compiler.stdout, target, *(path.read_bytes() for path in sources)]
    digest = hashlib.sha256(b"\0".join(ingredients)).hexdigest()[:16]
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
    """Check that only the user can write the file or folder: the library runs with the user's rights.

    Raises:
        JobError: it is another user's, a symbolic link, or others may write to it.
    """
    status = path.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or stat.S_ISLNK(status.st_mode):
        raise JobError(
            f"{path}: our compiled kernels may lie only where you alone can write; `chown` it to you and `chmod go-w` "
            "it, or set XDG_CACHE_HOME"
        )


def _compile(nvcc: str, capability: int, sources: list[str], path: Path) -> None:
    with replacing(path) as tmp:
        command = [nvcc, *_FLAGS, f"-gencode=arch=compute_{capability},code=sm_{capability}", *sources, "-o", str(tmp)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            reason = next(
                (
                    line
                    for line in (result.stdout + result.stderr).splitlines()
                    if "error" in line.lower() or "fatal" in line.lower()
                ),
                f"exit code {result.returncode}",
            )
            raise JobError(f"{nvcc} cannot compile our kernels: {reason[:200]}")
        tmp.chmod(0o600)
