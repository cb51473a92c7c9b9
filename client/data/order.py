"""In which order a client sees its examples: a pure function of seed, client and position."""

from functools import lru_cache

import numpy as np

from corolla.client.seeding import random_order


def round_order(size: int, first: int, count: int, *key: object) -> list[int]:
    """Positions first..first+count-1 of an endless sequence of examples: one seeded permutation after another.

    A round goes on where the last one stopped, and every example comes once before any comes twice.
    """
    order = []
    for position in range(first, first + count):
        epoch, index = divmod(position, size)
        order.append(int(_epoch(size, epoch, key)[index]))
    return order


@lru_cache(maxsize=64)
def _epoch(size: int, epoch: int, key: tuple[object, ...]) -> np.ndarray:
    return random_order(*key, "epoch", epoch, size=size)
