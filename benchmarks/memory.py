"""The memory that a piece of work takes at its peak."""

import ctypes
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(work: Callable[[], object]) -> float:
    """Resident bytes at the peak of `work()` beyond those before it (Linux with glibc). Raises OSError elsewhere."""
    before = resident()
    reset_peak()
    work()
    return resident_peak() - before


def resident() -> float:
    """Bytes that the process holds, after giving back what was freed before: it must not be taken for free now."""
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """The peak is counted from here."""
    CLEAR.write_text("5")


def resident_peak() -> float:
    """The most bytes that the process held since `reset_peak`."""
    return _status("VmHWM")


def _status(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024.0 * int(line.split()[1])
