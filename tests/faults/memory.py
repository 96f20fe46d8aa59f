"""The most memory that a process holds, as the kernel counts it."""

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["HAS_PROC", "peak_growth", "peak_memory"]

HAS_PROC = os.path.isfile("/proc/self/clear_refs")
"""Linux counts the largest resident memory of a process, and can begin to count anew."""


def peak_memory(process_id: int | str = "self") -> int:
    """The largest resident memory that a process has had, in bytes."""
    return _status(process_id, "VmHWM")


def peak_growth(work: Callable[[], object]) -> int:
    """How far the resident memory of this process rises while it works, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the largest is the present one again
    before = _status("self", "VmRSS")
    work()
    return peak_memory() - before


def _status(process_id: int | str, key: str) -> int:
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(key))) * 1024
