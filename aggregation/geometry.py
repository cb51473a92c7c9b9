"""Where a round's changes lie to one another: the clients' Gram matrix and distances, from factors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.aggregation.algebra import add, inner, module_distance, orthonormal, scale
from corolla.aggregation.delta import AdapterState, Delta, LowRankDelta, LowRankState
from corolla.aggregation.exact import in_order, modules_of
from corolla.aggregation.state import ClientUpdate

CLOSE = 1e-6
"""Two changes whose squared distance is below CLOSE of their squared sizes are compared by QR: a difference of Gram
entries would have lost ten of its sixteen digits there, and reads 0 at a relative distance of 1e-8."""


@dataclass(frozen=True)
class Geometry:
    """`gram` ⟨D_j, D_k⟩_F and `squared` ‖D_j − D_k‖²_F over all modules, (K, K) in float64, by client id in order."""

    clients: tuple[str, ...]
    gram: Tensor
    squared: Tensor

    @property
    def norms(self) -> Tensor:
        """‖D_k‖_F, (K,)."""
        return self.gram.diagonal().clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """cos(D_j, D_k), (K, K); 0 where one of them is zero."""
        norms = self.norms
        sizes = norms[:, None] * norms
        return torch.where(sizes > 0, self.gram / sizes.clamp(min=torch.finfo(torch.float64).tiny), 0.0)

    def of(self, kept: Sequence[int]) -> "Geometry":
        """The geometry of these clients, by position."""
        rows = torch.tensor(kept)
        return Geometry(tuple(self.clients[i] for i in kept), self.gram[rows][:, rows], self.squared[rows][:, rows])


def client_change(adapter: AdapterState, start: LowRankState) -> dict[str, Delta]:
    """D_k = L_k − S_k by module in float64: what a client changed, S_k being the first r_k components of the start.

    A factor that did not move stays as it is, so that a change of B alone has the rank of B.
    """
    return {m: _minus(delta.double(), start[m]) if m in start else delta.double() for m, delta in adapter.items()}


def _minus(delta: Delta, start: LowRankDelta) -> Delta:
    begin = start.first(delta.rank).double()
    if isinstance(delta, LowRankDelta) and delta.rank == begin.rank:
        if torch.equal(delta.A, begin.A):
            return LowRankDelta(delta.A, delta.B - begin.B)
        if torch.equal(delta.B, begin.B):
            return LowRankDelta(delta.A - begin.A, delta.B)
    return add([delta, scale(begin, -1.0)])


def measure_geometry(updates: Sequence[ClientUpdate], start: LowRankState) -> Geometry:
    """The geometry of what these clients changed. A module that a client lacks is zero there.

    Factor norms say nothing, since (c B, A / c) is the same ΔW; so each change is brought to orthonormal rows of A by
    QR first, one module at a time. O(K (out + in) r² + K² (out + in) r²), no (out, in) matrix.
    """
    ordered = in_order(updates)
    gram = torch.zeros(len(ordered), len(ordered), dtype=torch.float64)
    squared = torch.zeros_like(gram)
    for module in modules_of(ordered, {}):
        changes = {
            k: orthonormal(client_change({module: u.adapter[module]}, start)[module])
            for k, u in enumerate(ordered)
            if module in u.adapter
        }
        one_gram = torch.zeros_like(gram)
        for j, one in changes.items():
            for k, other in changes.items():
                if j <= k:
                    one_gram[j, k] = one_gram[k, j] = inner(one, other)
        gram += one_gram
        squared += _squared_distances(one_gram, changes)
    return Geometry(tuple(u.client_id for u in ordered), gram, squared)


def _squared_distances(gram: Tensor, changes: dict[int, Delta]) -> Tensor:
    """‖D_j − D_k‖² of one module, (K, K)."""
    sizes = gram.diagonal()[:, None] + gram.diagonal()
    squared = (sizes - 2 * gram).clamp(min=0).fill_diagonal_(0.0)
    for j, k in torch.nonzero(torch.triu(squared < CLOSE * sizes, diagonal=1)).tolist():
        squared[j, k] = squared[k, j] = module_distance("", {"": changes[j]}, {"": changes[k]}) ** 2
    return squared
