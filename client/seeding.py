"""Seeded draws: each depends on its key alone, on every machine, and never on a process-wide random state."""

import hashlib

import numpy as np


def seed_of(*key: object) -> int:
    """A 31-bit seed that depends on the key alone."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:4], "big") >> 1


def random_order(*key: object, size: int) -> np.ndarray:
    """A permutation of range(size) that depends on the key alone."""
    return np.random.Generator(np.random.PCG64(seed_of(*key))).permutation(size)
