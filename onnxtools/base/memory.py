"""Memory of this process: its peak use, the amount still available, and the release of mapped pages."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

_MADV_DONTNEED = 4
_RELEASE_SECONDS = 0.05


def peak_mib() -> float:
    """Returns the peak resident set size of this process so far, in MiB.

    On Linux this is VmHWM. `getrusage` also counts the memory that the parent held at the fork, so a small job
    started by a large process would look large.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def available_bytes() -> int | None:
    """Returns the bytes that a new allocation can have, or None if unknown.

    This is the smaller of the kernel's MemAvailable and the rest of the address space under RLIMIT_AS.
    """
    limits = []
    meminfo, statm = Path("/proc/meminfo"), Path("/proc/self/statm")
    if meminfo.exists():
        limits += [
            int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")
        ]
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and statm.exists():
        limits.append(limit - int(statm.read_text().split()[0]) * resource.getpagesize())
    return max(0, min(limits)) if limits else None


@contextlib.contextmanager
def releasing_pages(files: Iterable[Path]) -> Iterator[None]:
    """Release the resident pages of the mapped `files` 20 times a second.

    A library that reads each weight once would keep all pages resident. It does not matter which code mapped the files.
    Only read-only mappings that exist at the beginning are released, and they must exist until the end. A page that is
    used again is read again from the page cache. Linux only; elsewhere this does nothing.
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
    """Yields (start, end) addresses of the read-only mappings of files with these names in this process."""
    maps = Path("/proc/self/maps")
    for line in maps.read_bytes().split(b"\n") if maps.exists() else ():
        # proc(5): address perms offset dev inode pathname
        span, rights, *rest = line.split(maxsplit=5)[:6] if line else (b"", b"")
        if rights.startswith(b"r--") and len(rest) == 4 and rest[3] in names:
            start, end = span.split(b"-")
            yield int(start, 16), int(end, 16)
