"""How much memory this process has needed."""

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
