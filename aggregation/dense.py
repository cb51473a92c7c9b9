"""The algebra of dense changes: full fine-tuning, where ΔW is a matrix and a sum is a sum."""

from collections.abc import Sequence

import torch
from torch import Tensor

from corolla.aggregation.delta import DenseDelta
from corolla.aggregation.lowrank import Budget, require_one_shape


def scale(delta: DenseDelta, factor: float) -> DenseDelta:
    """factor · W, in the dtype of `delta`."""
    return DenseDelta((delta.W.double() * factor).to(delta.W.dtype))


def add(deltas: Sequence[DenseDelta]) -> DenseDelta:
    """Σ W_i in float64, cast to the dtype of the first. Raises ValueError for none, or for different (out, in)."""
    require_one_shape(deltas)
    total = deltas[0].W.double().clone()
    for delta in deltas[1:]:
        total += delta.W
    return DenseDelta(total.to(deltas[0].W.dtype))


def after(before: DenseDelta, change: DenseDelta) -> DenseDelta:
    """Their sum: what is added does not depend on the weight that it is added to."""
    return add([before, change])


def distance(one: DenseDelta, other: DenseDelta) -> float:
    """‖one − other‖_F in float64."""
    return norm(DenseDelta(one.W.double() - other.W.double()))


def norm(delta: DenseDelta) -> float:
    """‖W‖_F in float64."""
    return float(torch.linalg.matrix_norm(delta.W.double()))


def inner(one: DenseDelta, other: DenseDelta) -> float:
    """Σ W ∘ W' in float64."""
    return float((one.W.double() * other.W.double()).sum())


def orthonormal(delta: DenseDelta) -> DenseDelta:
    """W in float64: it has no components that could cancel."""
    return delta.double()


gram_norm = norm
"""There is nothing to save."""


def singular_values(delta: DenseDelta) -> Tensor:
    """The singular values of W in float64, largest first."""
    sigma: Tensor = torch.linalg.svdvals(delta.W.double())
    return sigma


def compress(delta: DenseDelta, budget: Budget) -> tuple[DenseDelta, float]:
    """W in float32 and 0.0: a dense change has no factors to cut, and stays whole whatever the budget."""
    return delta.single(), 0.0
