"""Gaussian noise that nobody can foresee: from the operating system's random source, never from a seed."""

import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gaussian = Callable[[Sequence[int]], Tensor]
"""shape -> independent standard normals in float64."""

DRAWS = 4
"""How many draws are summed for each number."""


def secure_gaussian(shape: Sequence[int]) -> Tensor:
    """Standard normals of this shape in float64, by Box–Muller from `os.urandom`.

    Each is the sum of four draws over two: which of the numbers that a float64 can hold one draw can reach tells its
    uniforms apart, and with that the value it was added to (Mironov 2012; Holohan and Braghin, arXiv:2107.10138, whose
    cure this is: to reverse a sum of several draws is out of reach).
    """
    return sum(_box_muller(math.prod(shape)) for _ in range(DRAWS)).reshape(list(shape)) / math.sqrt(DRAWS)  # type: ignore[union-attr]


def _box_muller(count: int) -> Tensor:
    """`count` standard normals: √(−2 ln u) cos 2πv and √(−2 ln u) sin 2πv of each pair of uniforms."""
    pairs = (count + 1) // 2
    u, v = _uniforms(2 * pairs).view(2, pairs)
    radius = (-2 * u.log()).sqrt()
    return torch.cat([radius * (2 * math.pi * v).cos(), radius * (2 * math.pi * v).sin()])[:count]


def _uniforms(count: int) -> Tensor:
    """`count` uniforms in (0, 1] of 53 bits."""
    if not count:
        return torch.zeros(0, dtype=torch.float64)
    bits = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64)
    return (((bits >> 11) & (2**53 - 1)).double() + 1) / 2**53
