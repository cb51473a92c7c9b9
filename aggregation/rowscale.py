"""The algebra of changes that scale rows: ΔW = diag(d) W + B A is linear in (d, B A) for one W.

Norms, distances and products are those of the coordinates (d, B A), since W is not here; where no row is scaled they
are those of ΔW.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from corolla.aggregation import lowrank
from corolla.aggregation.delta import LowRankDelta, RowScaleDelta
from corolla.aggregation.lowrank import Budget, require_one_shape


def _with(d: Tensor, factors: LowRankDelta) -> RowScaleDelta:
    return RowScaleDelta(d.to(factors.A.dtype), factors.A, factors.B)


def scale(delta: RowScaleDelta, factor: float) -> RowScaleDelta:
    """factor · ΔW, in the dtype of `delta`."""
    return _with(delta.d.double() * factor, lowrank.scale(delta.factors, factor))


def add(deltas: Sequence[RowScaleDelta]) -> RowScaleDelta:
    """Σ ΔW_i of changes of one W: the scales summed in float64, the factors stacked."""
    require_one_shape(deltas)
    total = torch.stack([delta.d.double() for delta in deltas]).sum(0)
    return _with(total, lowrank.add([delta.factors for delta in deltas]))


def after(before: RowScaleDelta, change: RowScaleDelta) -> RowScaleDelta:
    """`before`, and then `change` of the weight that `before` made, as one change of the first weight, in float64.

    (I + D)((I + D₀) W + B₀ A₀) + B A = (I + D)(I + D₀) W + (I + D) B₀ A₀ + B A.
    """
    old, new = before.double(), change.double()
    scaled = LowRankDelta(old.A, (1 + new.d) * old.B)
    return _with(old.d + new.d + old.d * new.d, lowrank.add([scaled, new.factors]))


def norm(delta: RowScaleDelta) -> float:
    """‖(d, B A)‖_F in float64."""
    return math.hypot(float(delta.d.double().norm()), lowrank.norm(delta.factors))


def gram_norm(delta: RowScaleDelta) -> float:
    """As `norm`, fast: what cancels may be off by 1e-8 of its parts."""
    return math.hypot(float(delta.d.double().norm()), lowrank.gram_norm(delta.factors))


def distance(one: RowScaleDelta, other: RowScaleDelta) -> float:
    """‖one − other‖_F of the coordinates in float64."""
    scales = float((one.d.double() - other.d.double()).norm())
    return math.hypot(scales, lowrank.distance(one.factors, other.factors))


def inner(one: RowScaleDelta, other: RowScaleDelta) -> float:
    """The inner product of the coordinates in float64."""
    return float((one.d.double() * other.d.double()).sum()) + lowrank.inner(one.factors, other.factors)


def orthonormal(delta: RowScaleDelta) -> RowScaleDelta:
    """The same in float64 with orthonormal rows of A."""
    return _with(delta.d.double(), lowrank.orthonormal(delta.factors))


def singular_values(delta: RowScaleDelta) -> Tensor:
    """‖d‖ and the singular values of B A, in float64, largest first."""
    scales = delta.d.double().norm().reshape(1)
    return torch.cat([scales, lowrank.singular_values(delta.factors)]).sort(descending=True).values


def compress(delta: RowScaleDelta, budget: Budget) -> tuple[RowScaleDelta, float]:
    """The factors within `budget`, the scales whole; in float32, and the error of the factors."""
    factors, error = lowrank.compress(delta.factors, budget)
    return _with(delta.d.float().contiguous(), factors), error
