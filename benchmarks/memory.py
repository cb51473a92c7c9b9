"""The memory that a piece of work takes at its peak."""

import ctypes
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(work: Callable[[], object]) -> float:
    """Resident bytes at the peak of `work()` beyond those before it (Linux with glibc). Raises OSError elsewhere."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be taken for free now
    before = _resident("VmRSS")
    CLEAR.write_text("5")  # the peak is counted from here
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024.0 * int(line.split()[1])
