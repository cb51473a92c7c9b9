"""Factors combined by position: component i of every client counts as one component, whatever it means there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.aggregation.delta import LowRankDelta, LowRankState, low_rank
from corolla.aggregation.exact import in_order, modules_of
from corolla.aggregation.lowrank import add, zeros
from corolla.aggregation.state import ClientUpdate


@dataclass(frozen=True)
class PositionalSum:
    """Σ p_k pad(A_k) (R, in), Σ p_k pad(B_k) (out, R) and π (R,), π_i = Σ p_k over the clients that hold component i;
    all in float64. `start` (R components) is what they started from."""

    a: Tensor
    b: Tensor
    held: Tensor
    start: LowRankDelta

    def zero_padded(self) -> LowRankDelta:
        """The sums themselves; a component that nobody holds keeps its value of the start."""
        return self._kept(self.a, self.b)

    def over_holders(self) -> LowRankDelta:
        """The means over those who hold a component; one that nobody holds keeps its value of the start."""
        share = torch.where(self.held > 0, self.held, 1.0)
        return self._kept(self.a / share[:, None], self.b / share)

    def of_changes(self, factors: frozenset[str]) -> LowRankDelta:
        """A_S + Σ p_k pad(A_k − A_S[:r_k]) and the same for B, in the given factors; the others stay at the start."""
        a, b = self.start.A.double(), self.start.B.double()
        moved_a, moved_b = self.a + (1 - self.held)[:, None] * a, self.b + (1 - self.held) * b
        return LowRankDelta(moved_a if "A" in factors else a, moved_b if "B" in factors else b)

    def _kept(self, a: Tensor, b: Tensor) -> LowRankDelta:
        lacking = self.held == 0
        return LowRankDelta(
            torch.where(lacking[:, None], self.start.A.double(), a), torch.where(lacking, self.start.B.double(), b)
        )


def sum_positions(
    updates: Sequence[ClientUpdate], weights: Mapping[str, float], start: LowRankState
) -> dict[str, PositionalSum]:
    """Module -> the positional sum over the clients that adapt it, as wide as the start and the largest client."""
    ordered = in_order(updates)
    return {module: _sum(module, ordered, weights, start) for module in modules_of(updates, start)}


def _sum(
    module: str, updates: Sequence[ClientUpdate], weights: Mapping[str, float], start: LowRankState
) -> PositionalSum:
    held_by = {u.client_id: low_rank(u.adapter)[module] for u in updates if module in u.adapter}
    begin = _widened(start.get(module), list(held_by.values()))
    a, b = torch.zeros_like(begin.A, dtype=torch.float64), torch.zeros_like(begin.B, dtype=torch.float64)
    held = torch.zeros(begin.rank, dtype=torch.float64)
    for client, delta in held_by.items():
        a[: delta.rank] += weights[client] * delta.A.double()
        b[:, : delta.rank] += weights[client] * delta.B.double()
        held[: delta.rank] += weights[client]
    return PositionalSum(a, b, held, begin)


def _widened(start: LowRankDelta | None, deltas: Sequence[LowRankDelta]) -> LowRankDelta:
    """The start with components of zeros up to the largest client's rank; one of zeros where there is none."""
    widest = max((delta.rank for delta in deltas), default=0)
    if start is None:
        return zeros(*deltas[0].shape, widest)
    return add([start, zeros(*start.shape, widest - start.rank)]) if widest > start.rank else start


def zero_padded_mean(
    updates: Sequence[ClientUpdate], weights: Mapping[str, float], start: LowRankState
) -> dict[str, LowRankDelta]:
    """(Σ p_k pad(A_k), Σ p_k pad(B_k)) per module in float32: what FedIT and zero-padding call the average."""
    return {module: found.zero_padded().single() for module, found in sum_positions(updates, weights, start).items()}
