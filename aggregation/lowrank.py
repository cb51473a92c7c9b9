"""The algebra of low-rank deltas, without ever forming an (out, in) matrix.

Sums are concatenations; norms and the best approximation come from two QR factorisations and the singular values of
a small core. QR, SVD and norms run in float64 and are cast to float32 once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.aggregation.delta import Delta, LowRankDelta

ZERO = 1e-7
"""A singular value below ZERO · σ_1 is float32 rounding, not signal, and is dropped."""


@dataclass(frozen=True)
class Budget:
    """A limit on one module's rank: at most `max_rank` components (None: no limit), and no more than needed for a
    relative Frobenius error of `max_error`. The default is lossless."""

    max_rank: int | None = None
    max_error: float = 0.0

    def at(self, round_number: int) -> "Budget":
        """The same in every round: see `Squeeze` for one that is not."""
        return self

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise ValueError(f"max_rank must be at least 1, got {self.max_rank}; leave it out for no limit")
        if not 0 <= self.max_error < 1:
            raise ValueError(f"max_error must be in [0, 1), got {self.max_error}: it is a relative Frobenius error")


def require_one_shape(deltas: Sequence[Delta]) -> None:
    """Raises ValueError for no delta, or for deltas of different (out, in)."""
    if not deltas:
        raise ValueError("add needs at least one delta, got none")
    shapes = {delta.shape for delta in deltas}
    if len(shapes) > 1:
        raise ValueError(f"deltas of one module must share (out, in), got {sorted(shapes)}")


def zeros(out_features: int, in_features: int, rank: int = 0) -> LowRankDelta:
    """The delta that changes nothing: B (out, rank) and A (rank, in) of zeros."""
    return LowRankDelta(torch.zeros(rank, in_features), torch.zeros(out_features, rank))


def scale(delta: LowRankDelta, factor: float) -> LowRankDelta:
    """factor · ΔW, on B alone (on both factors it would be squared), in the dtype of `delta`."""
    return LowRankDelta(delta.A, (delta.B.double() * factor).to(delta.B.dtype))


def add(deltas: Sequence[LowRankDelta]) -> LowRankDelta:
    """Σ ΔW_i by concatenation, rank Σ r_i, in the given order; no rounding at all. One alone is not copied.

    Raises ValueError for no delta, or for deltas of different (out, in).
    """
    require_one_shape(deltas)
    if len(deltas) == 1:
        return LowRankDelta(deltas[0].A.contiguous(), deltas[0].B.contiguous())
    return LowRankDelta(torch.cat([d.A for d in deltas]), torch.cat([d.B for d in deltas], dim=1))


def weighted_stack(parts: Sequence[tuple[LowRankDelta, float]]) -> LowRankDelta:
    """Σ w_i ΔW_i by concatenation in the dtype of the first: `[w_1 B_1 …] @ [A_1; …]`, weights rounded to it first.

    About two copies of the bytes; where the factors lie side by side already (`Slots`), half a copy.
    """
    require_one_shape([delta for delta, _ in parts])
    counts = torch.tensor([delta.rank for delta, _ in parts])
    weights = torch.tensor([weight for _, weight in parts], dtype=parts[0][0].B.dtype).repeat_interleave(counts)
    b = _side_by_side([delta.B for delta, _ in parts], 1)
    a = _side_by_side([delta.A for delta, _ in parts], 0)
    b = torch.cat([delta.B for delta, _ in parts], dim=1).mul_(weights) if b is None else b * weights
    return LowRankDelta(torch.cat([delta.A for delta, _ in parts]) if a is None else a, b)


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The concatenation along `dim` as a view, where the parts lie in one storage in just that order; else None."""
    parts = [part for part in parts if part.shape[dim]] or parts[:1]
    first = parts[0]
    place, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == storage and part.stride() == first.stride()
        if not same or part.data_ptr() != place or part.dtype != first.dtype:
            return None
        place += part.shape[dim] * part.stride(dim) * part.element_size()
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    fits = shape[1] <= first.stride(0)  # rows must not run into one another
    return first.as_strided(shape, first.stride()) if fits and first.stride(1) == 1 else None


def after(before: LowRankDelta, change: LowRankDelta) -> LowRankDelta:
    """Their sum: what is added does not depend on the weight that it is added to."""
    return add([before, change])


def distance(one: LowRankDelta, other: LowRankDelta) -> float:
    """‖one − other‖_F in float64, by QR. Where both have the same A, as a stack and its target do, B tells it all."""
    if one.rank == other.rank and torch.equal(one.A, other.A):
        return gram_norm(LowRankDelta(one.A.double(), one.B.double() - other.B.double()))
    return norm(add([one.double(), scale(other.double(), -1.0)]))


def inner(one: LowRankDelta, other: LowRankDelta) -> float:
    """⟨ΔW, ΔW'⟩_F = Σ (BᵀB' ∘ A A'ᵀ) in float64, right to 1e-16 of both sizes where both have orthonormal rows."""
    return float(((one.B.double().T @ other.B.double()) * (one.A.double() @ other.A.double().T)).sum())


def orthonormal(delta: LowRankDelta) -> LowRankDelta:
    """The same ΔW in float64 with orthonormal rows of A (min(rank, in) of them): no component cancels another."""
    if delta.rank == 0:
        return delta.double()
    q, r = triangular(delta.A.T)
    eye = torch.eye(r.shape[0], dtype=torch.float64)
    return LowRankDelta(q.times(eye).T, delta.B.double() @ r.T)


def gram_norm(delta: LowRankDelta) -> float:
    """‖B A‖_F = √Σ (BᵀB ∘ A Aᵀ) in float64: some ten times faster than `norm`, but where components cancel it sees
    nothing below 1e-8 of what they are by themselves."""
    a, b = delta.A.double(), delta.B.double()
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


@dataclass(frozen=True)
class _Orthonormal:
    """Q of a QR factorisation, (n, k), as Householder reflectors: to form it would cost more than to use it."""

    reflectors: Tensor
    scales: Tensor

    def times(self, x: Tensor) -> Tensor:
        """Q @ x."""
        padded = x.new_zeros(self.reflectors.shape[0], x.shape[1])
        padded[: x.shape[0]] = x
        return torch.ormqr(self.reflectors, self.scales, padded)


def triangular(matrix: Tensor) -> tuple[_Orthonormal, Tensor]:
    """Q and the upper triangular R (k, columns) of a matrix (n, columns) in float64, k = min(n, columns)."""
    reflectors, scales = torch.geqrf(matrix.double())
    count = min(matrix.shape)
    return _Orthonormal(reflectors[:, :count], scales), torch.triu(reflectors[:count])


def singular_values(delta: LowRankDelta) -> Tensor:
    """The singular values of B @ A in float64, largest first: min(rank, out, in) of them."""
    if delta.rank == 0:
        return torch.zeros(0, dtype=torch.float64)
    sigma: Tensor = torch.linalg.svdvals(_core(delta))
    return sigma


def norm(delta: LowRankDelta) -> float:
    """‖B A‖_F by QR in float64: right down to rounding, where a Gram matrix loses half the digits."""
    return float(torch.linalg.norm(_core(delta))) if delta.rank else 0.0


def _core(delta: LowRankDelta) -> Tensor:
    """C (q, p) in float64 with ΔW = Q_B C Q_Aᵀ and orthonormal Q; q, p <= rank."""
    return triangular(delta.B)[1] @ triangular(delta.A.T)[1].T


def kept(sigma: Tensor, budget: Budget, floor: float = 0.0) -> int:
    """How many of the singular values (largest first) a budget keeps. Those up to ZERO · σ_1 or `floor` never stay."""
    if sigma.numel() == 0:
        return 0
    rank = int((sigma > max(ZERO * float(sigma[0]), floor)).sum())
    if budget.max_error:
        tails = sigma.square().flip(0).cumsum(0).flip(0).sqrt()
        rank = min(rank, int((tails > budget.max_error * tails[0]).sum()))
    return rank if budget.max_rank is None else min(rank, budget.max_rank)


def compress(delta: LowRankDelta, budget: Budget = Budget()) -> tuple[LowRankDelta, float]:
    """The best approximation of ΔW within `budget` in float32, largest components first, and its error ‖ΔW − ·‖_F.

    Eckart–Young on the core of two QR factorisations: O((out + in) R² + R³), no (out, in) matrix. The singular
    values go to B; A has orthonormal rows, so that a learning rate keeps its meaning. Signs are fixed (the entry of
    largest size in each row of A is positive), so that the result does not depend on the LAPACK build's choice.
    """
    if delta.rank == 0:
        return delta.single(), 0.0
    (q_b, r_b), (q_a, r_a) = triangular(delta.B), triangular(delta.A.T)
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    rounding = 1e-13 * float(r_b.norm() * r_a.norm())  # all that is left of a full cancellation
    rank = kept(sigma, budget, rounding)
    a, b = q_a.times(vh[:rank].T).T, q_b.times(u[:, :rank] * sigma[:rank])
    if rank:
        signs = torch.gather(a, 1, a.abs().argmax(1, keepdim=True)).sign()
        a, b = a * signs, b * signs.T
    return LowRankDelta(a, b).single(), float(sigma[rank:].square().sum().sqrt())


def split(delta: LowRankDelta, rank: int) -> tuple[LowRankDelta, LowRankDelta]:
    """ΔW as (its top `rank` components, the rest), both in float32; the first is padded with zeros up to `rank`."""
    ordered, _ = compress(delta)
    top = ordered.first(rank)
    return add([top, zeros(*delta.shape, rank - top.rank)]), ordered.after(rank)
