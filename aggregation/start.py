"""Where a client's trainable adapter begins: its share of the global start, filled up with fresh components."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.aggregation.delta import LowRankDelta, LowRankState
from corolla.aggregation.lowrank import add, zeros
from corolla.aggregation.state import GlobalModel, Shapes


@dataclass(frozen=True)
class FreshRows:
    """Draws new rows of A, uniform in ±1/√in (the default of PEFT: kaiming-uniform with a = √5).

    A row depends on (seed, round, module, row) alone: smaller ranks are prefixes of larger ones, and all clients
    share them. `client` (empty: shared) makes them independent by client.
    """

    seed: int
    round: int = 0
    client: str = ""

    def rows(self, module: str, first: int, last: int, in_features: int) -> Tensor:
        """Rows first..last-1 of A, (last - first, in), float32."""
        bound = 1 / math.sqrt(in_features)
        fresh = torch.empty(last - first, in_features)
        for row in range(first, last):
            key = f"{self.seed}/{self.round}/{self.client}/{module}/{row}".encode()
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)
            fresh[row - first].uniform_(-bound, bound, generator=generator)
        return fresh


def fill(start: LowRankDelta, rank: int, module: str, fresh: FreshRows) -> LowRankDelta:
    """`start` brought to `rank` components: missing ones get a fresh row of A and a zero column of B.

    A component that is zero in both factors is drawn afresh as well: its gradient would stay zero for ever. The
    product B @ A is that of `start`. Raises ValueError where `start` has more than `rank` components.
    """
    if start.rank > rank:
        raise ValueError(f"start of {module} must have at most {rank} components, got {start.rank}: take first({rank})")
    out_features, in_features = start.shape
    wide = add([start, zeros(out_features, in_features, rank - start.rank)] if start.rank < rank else [start])
    dead = (wide.A == 0).all(dim=1) & (wide.B == 0).all(dim=0)
    if not dead.any():
        return wide
    rows = fresh.rows(module, 0, rank, in_features)
    return LowRankDelta(torch.where(dead[:, None], rows, wide.A), wide.B)


def fill_adapter(start: LowRankState, shapes: Shapes, rank: int, fresh: FreshRows) -> dict[str, LowRankDelta]:
    """L_k before training: every module of `shapes` at `rank`, beginning with `start` where it has the module."""
    return {
        module: fill(start.get(module, zeros(*shape)), rank, module, fresh) for module, shape in sorted(shapes.items())
    }


Principal = Callable[[Shapes, int], LowRankState]
"""(shapes, rank) -> the principal components of the base's weights; raises ValueError where there is no base."""


def empty_start(shapes: Shapes, max_rank: int, seed: int, principal: Principal) -> GlobalModel:
    """The first global model of methods that begin afresh each round (FLoRA): nothing merged, no start."""
    return GlobalModel()


def shared_start(shapes: Shapes, max_rank: int, seed: int, principal: Principal) -> GlobalModel:
    """The first global model of methods with a common start (FedIT): fresh A of `max_rank` rows, B = 0."""
    return GlobalModel(start=fill_adapter({}, shapes, max_rank, FreshRows(seed)))


def no_principal(shapes: Shapes, rank: int) -> LowRankState:
    """Raises ValueError: what stands in for `Principal` where the server has no base."""
    raise ValueError("this method starts from the base's weights, got a server without the base: set model.name to it")
