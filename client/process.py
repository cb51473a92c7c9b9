"""What a process that trains sets for itself: threads, freed memory, and what its garbage collector goes through."""

import ctypes
import gc
import os

MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of malloc.h."""

MALLOC_BEGINS = 128 * 1024
"""Where glibc begins."""

MESSAGES = 2**20
"""For a process that holds messages: arrays travel in blocks of this size and more."""


def use_threads(threads: int) -> int:
    """Sets torch's CPU threads (0: every core this process may use) and returns the number.

    Every engine sets its own otherwise, and results are bit-equal only with equal numbers.
    """
    import torch

    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    return threads


def keep_freed_memory_low(large: int = MALLOC_BEGINS) -> None:
    """Makes glibc give blocks of `large` bytes or more back as soon as they are freed, at the price of some speed.

    By itself it raises the size from which it does so, up to 32 MiB, and a process then holds 1.2 to 1.9 times the
    activations. Elsewhere than on glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(MMAP_THRESHOLD, large)


def pass_over_libraries() -> None:
    """Takes what is loaded by now, the libraries of training with it, out of the garbage collector's way, for good.

    Every training of transformers collects, and goes through all that torch and TRL hold: a third of a second. For
    processes of Corolla's own: what is garbage in a cycle later, and was loaded before, stays.
    """
    from trl import SFTTrainer  # noqa: F401

    gc.collect()
    gc.freeze()
