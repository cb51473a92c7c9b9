"""Out of memory at run time: a client halves its micro-batch, then its rank, and goes on."""

import gc
from dataclasses import dataclass
from typing import Self

import torch
from accelerate.utils.memory import should_reduce_batch_size


@dataclass(frozen=True)
class Limits:
    """What a client trains at once: examples per micro-batch, micro-batches per step, and components of its adapter.

    micro_batch · accumulation never changes, so neither do the examples of an optimizer step.
    """

    micro_batch: int
    accumulation: int
    rank: int

    def halved(self) -> Self | None:
        """The next smaller ones: the micro-batch down to 1, then the rank; None where nothing is left to give up."""
        batch = self.micro_batch * self.accumulation
        if self.micro_batch > 1:
            smaller = max(n for n in range(1, self.micro_batch // 2 + 1) if batch % n == 0)
            return type(self)(smaller, batch // smaller, self.rank)
        return type(self)(1, batch, self.rank // 2) if self.rank > 1 else None

    def within(self, other: "Limits") -> Self:
        """The smaller of both; `other` may be of a run with another batch."""
        found = self
        while found.micro_batch > other.micro_batch and (next_one := found.halved()):
            found = next_one
        return type(self)(found.micro_batch, found.accumulation, min(found.rank, other.rank))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch or rank may help."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, Exception) and should_reduce_batch_size(error))


def free_memory() -> None:
    """Gives back what a failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
