"""How much memory this process has needed, and how much it can still have."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

_MADV_DONTNEED = 4
_RELEASE_SECONDS = 0.05


def peak_mib() -> float:
    """Peak resident set of this process so far, in MiB.

    Linux: VmHWM. `getrusage` would count what the parent held when it forked, so a small job started by a large
    process would look large.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def available_bytes() -> int | None:
    """Bytes that a new allocation can have: what the kernel calls available, and what a limit on the address space
    leaves. None where neither is known.
    """
    found = []
    meminfo, statm = Path("/proc/meminfo"), Path("/proc/self/statm")
    if meminfo.exists():
        found += [
            int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")
        ]
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and statm.exists():
        found.append(limit - int(statm.read_text().split()[0]) * resource.getpagesize())
    return max(0, min(found)) if found else None


@contextlib.contextmanager
def releasing_pages(files: Iterable[Path]) -> Iterator[None]:
    """Give pages of the mapped `files` back 20 times a second, whoever mapped them: a library that reads each weight
    once keeps them all.

    Only mappings that are there at the beginning, and must stay until the end, and that nobody can write to are
    touched: a page used again is read again, from the page cache. Linux only; elsewhere this does nothing.
    """
    spans, done = list(_read_only_spans({bytes(file.resolve()) for file in files})), threading.Event()
    if not spans:
        yield
        return

    def release() -> None:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        while not done.wait(_RELEASE_SECONDS):
            for start, end in spans:
                madvise(start, end - start, _MADV_DONTNEED)

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _read_only_spans(names: set[bytes]) -> Iterator[tuple[int, int]]:
    """Addresses where this process has files of these names mapped for reading alone."""
    maps = Path("/proc/self/maps")
    for line in maps.read_bytes().split(b"\n") if maps.exists() else ():
        span, rights, *rest = (
            line.split(maxsplit=5)[:6] if line else (b"", b"")
        )  # proc(5): address perms offset dev inode pathname
        if rights.startswith(b"r--") and len(rest) == 4 and rest[3] in names:
            start, end = span.split(b"-")
            yield int(start, 16), int(end, 16)
