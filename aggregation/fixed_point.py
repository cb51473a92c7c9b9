"""Real numbers as integers modulo 2^bits, in which sums are exact and masks can be uniform."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {32: torch.int32, 64: torch.int64}


@dataclass(frozen=True)
class FixedPoint:
    """Integers of `bits` bits for numbers of size at most `clip`, of which up to `terms` can be summed.

    The step is the smallest power of two for which terms · ⌈clip / step⌉ < 2^(bits − 1): no sum of rounded numbers
    can wrap around.
    Raises ValueError for numbers of bits other than 32 and 64, a clip that is not above 0, or no term.
    """

    bits: int
    clip: float
    terms: int

    def __post_init__(self) -> None:
        if self.bits not in DTYPES:
            raise ValueError(f"fixed point needs 32 or 64 bits, got {self.bits}")
        if not (self.clip > 0 and math.isfinite(self.clip)) or self.terms < 1:
            raise ValueError(
                f"fixed point needs a clip above 0 and at least one term, got clip {self.clip} and {self.terms} terms"
            )

    @property
    def step(self) -> float:
        """The distance of neighbouring numbers."""
        step = 2.0 ** (math.frexp(self.terms * self.clip)[1] - self.bits + 1)
        return step if self.terms * math.ceil(self.clip / step) < 2 ** (self.bits - 1) else 2 * step

    @property
    def dtype(self) -> torch.dtype:
        """The integers' type: signed, and added modulo 2^bits."""
        return DTYPES[self.bits]

    def encode(self, values: Tensor) -> Tensor:
        """round(values / step), the same shape. Raises ValueError for a value that is not finite, or above `clip`."""
        largest = float(values.abs().max()) if values.numel() else 0.0
        if not largest <= self.clip:  # also NaN
            raise ValueError(
                f"a secure sum takes finite numbers of size at most secure.clip = {self.clip:g}, got {largest:g}: "
                "raise secure.clip, or lower the learning rate"
            )
        return (values.double() / self.step).round().to(self.dtype)

    def decode(self, total: Tensor) -> Tensor:
        """The sum of encoded numbers in float64."""
        return total.double() * self.step

    def error(self, entries: int, terms: int) -> float:
        """A bound of ‖decoded sum − true sum‖₂ for `terms` encoded vectors of `entries` numbers: each term is off by
        half a step an entry."""
        return terms * self.step / 2 * math.sqrt(entries)
