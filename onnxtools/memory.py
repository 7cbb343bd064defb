"""How much memory this process has needed, and how much it can still have."""

from __future__ import annotations

from pathlib import Path


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
    """Bytes that a new allocation can have: what the kernel calls available, and what a limit on the address space leaves. None where neither is known."""
    found = []
    meminfo, statm = Path("/proc/meminfo"), Path("/proc/self/statm")
    if meminfo.exists():
        found += [int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and statm.exists():
        found.append(limit - int(statm.read_text().split()[0]) * resource.getpagesize())
    return max(0, min(found)) if found else None
