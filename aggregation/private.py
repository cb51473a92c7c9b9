"""Differential privacy at the level of clients: clipped changes, their noised mean, and what may be noised at all.

One round releases Σ_k clip(D_k) / m + N(0, (σ C / m)² I), m the expected number of participants, which no client
changes. The noise stands in orthonormal coordinates of the ΔW that a round can reach, so that its standard deviation is
measured against ‖ΔW‖_F, as the clip is. Everything after that (the start's next form, SVDs, server optimizers) only
works with what was released.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.aggregation.algebra import adapter_norm
from corolla.aggregation.delta import Delta, DenseDelta, LowRankDelta, LowRankState, low_rank
from corolla.aggregation.exact import in_order
from corolla.aggregation.gaussian import Gaussian, secure_gaussian
from corolla.aggregation.geometry import client_change
from corolla.aggregation.lowrank import triangular
from corolla.aggregation.method import Method
from corolla.aggregation.state import ClientUpdate, Shapes

ROUNDING = 1e-9
"""Norms are taken this much larger, so that no rounding of a clipped change is larger than the clip norm."""

FLAT = 1e-6
"""Directions of the fixed factor below FLAT of its largest are not released: its inverse would be rounding there."""


@dataclass(frozen=True)
class Mechanism:
    """`clip_norm` C, `noise_multiplier` σ, and `expected` m = q N, the participants that sampling gives on average."""

    clip_norm: float
    noise_multiplier: float
    expected: float

    @property
    def deviation(self) -> float:
        """The standard deviation of each coordinate of a round's noise, σ C / m."""
        return self.noise_multiplier * self.clip_norm / self.expected


def require_linear(method: Method) -> None:
    """Raises ValueError for a method whose round is not linear in what its clients train."""
    if any(len(method.constrain(r).trains) != 1 for r in (1, 2)):
        raise ValueError(
            f"differential privacy needs a round that is linear in what clients train, got {method.name}: where both A "
            "and B move, noise on them enters ΔW as a product, ξ_B ξ_A, whose size and tails no accountant knows, and "
            "noise on ΔW itself has no low rank: use ffa, fedsvd, rolora or full"
        )


def private_update(
    updates: Sequence[ClientUpdate],
    start: LowRankState,
    whole: Shapes,
    mechanism: Mechanism,
    trains: str,
    gaussian: Gaussian = secure_gaussian,
) -> ClientUpdate:
    """S + Σ_k clip(L_k − S_k) / m + noise, as one client of the start's ranks would have replied it, in float32.

    `trains` is the factor that moved, A or B (W: neither); the other is the same for all, as `start` has it filled up
    to its ranks. `whole` are the modules trained as whole weights. Every module of both gets its noise, whoever took
    part: where no one did, noise is all there is. Raises ValueError for an update with another fixed factor.
    """
    parts = [_clipped(update, start, trains, mechanism.clip_norm) for update in in_order(updates)]
    found: dict[str, Delta] = {}
    for module, shape in whole.items():
        moved = _sum([part[module] for part in parts if module in part], shape)
        found[module] = DenseDelta(moved / mechanism.expected + mechanism.deviation * gaussian(shape)).single()
    for module, delta in start.items():
        fixed, begin = _sides(delta, trains)
        moved = _sum([part[module] for part in parts if module in part], begin.shape)
        after = begin + _release(moved, fixed, mechanism, gaussian)
        found[module] = (LowRankDelta(fixed, after) if trains == "B" else LowRankDelta(after.T, fixed.T)).single()
    return ClientUpdate("private", 1, found)


def _clipped(update: ClientUpdate, start: LowRankState, trains: str, clip_norm: float) -> dict[str, Tensor]:
    """min(1, C / ‖D_k‖_F) times what moved, by module: B (out, r_k), Aᵀ (in, r_k) or W, the norm over all of them."""
    norm = adapter_norm(client_change(update.adapter, start)) * (1 + ROUNDING)
    part = clip_norm / norm if norm > clip_norm else 1.0
    return {module: part * _moved(module, delta, start, trains) for module, delta in update.adapter.items()}


def _moved(module: str, delta: Delta, start: LowRankState, trains: str) -> Tensor:
    if isinstance(delta, DenseDelta):
        return delta.W.double()
    fixed, free = _sides(low_rank({module: delta})[module], trains)
    held, begin = _sides(start[module].first(delta.rank), trains)
    if not torch.equal(fixed, held):
        raise ValueError(f"{module} must keep the other factor of its start where {trains} is trained, got a new one")
    return free - begin


def _sides(delta: LowRankDelta, trains: str) -> tuple[Tensor, Tensor]:
    """(the fixed factor (r, n), the trained one (m, r)) in float64, ΔW or its transpose being trained @ fixed."""
    a, b = delta.A.double(), delta.B.double()
    return (a, b) if trains == "B" else (b.T, a.T)


def _sum(parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Σ of the parts, columns that one lacks being zero."""
    total = torch.zeros(*shape, dtype=torch.float64)
    for part in parts:
        total[:, : part.shape[1]] += part
    return total


def _release(moved: Tensor, fixed: Tensor, mechanism: Mechanism, gaussian: Gaussian) -> Tensor:
    """X (m, r) with X F = (U F / m + noise), U = `moved` (m, r), F = `fixed` (r, n).

    F = L Q with orthonormal rows of Q, so ‖U F‖_F = ‖U L‖_F: the coordinates are Y = U L / m + N(0, deviation²), and
    X = Y L⁺ with L⁺ L = I.
    """
    u, sigma, _ = torch.linalg.svd(triangular(fixed.T)[1].T, full_matrices=False)
    kept = sigma > FLAT * sigma[:1]
    u, sigma = u[:, kept], sigma[kept]
    noise = mechanism.deviation * gaussian((moved.shape[0], len(sigma)))
    released = moved @ (u * sigma) / mechanism.expected + noise
    step: Tensor = released @ (u / sigma).T
    return step
