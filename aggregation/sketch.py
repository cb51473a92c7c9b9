"""Σ_k ΔW_k from two sums of linear sketches, neither of which has more to it than its width.

    Y = Σ_k B_k (A_k Ω)      Q = qr(Y)      X = Σ_k (Qᵀ B_k) A_k      ΔW = Q X

Both Y (out, width) and X (width, in) are plain sums over clients, so that they can be summed under masks, which a stack
cannot. ΔW is exact when the width is at least the rank of the sum (the range finder of Halko, Martinsson and Tropp,
arXiv:0909.4061); below it ΔW = Q Qᵀ Σ_k ΔW_k, and columns of Ω that Q was not made from tell how much is missing.

The second sum may be of fewer clients than the first. Then Q spans what is summed where the rows of all A_k are
linearly independent; where they are not (Σ rank > in, or clients that hardly moved a shared A), it need not, and the
probes, which come with the second sum, tell.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from corolla.aggregation.delta import LowRankDelta
from corolla.aggregation.start import FreshRows
from corolla.aggregation.state import Shapes

EXTRA = 8
"""Columns of an exact sketch beyond the rank: without them Ω is square on the range of the sum, and may be ill
conditioned there."""

PROBES = 4
"""Columns beyond the sketch, from which Q is not made, but judged."""


def exact_widths(shapes: Shapes, rank_sums: Mapping[str, int]) -> dict[str, int]:
    """module -> columns of Ω for which the sketch is exact: Σ of the clients' ranks plus EXTRA, at most the shape."""
    return {module: min(rank_sums[module] + EXTRA, *shape) for module, shape in shapes.items()}


def random_columns(module: str, in_features: int, first: int, last: int, seed: int, round_number: int) -> Tensor:
    """Columns first..last-1 of Ω, (in, last - first), float64: uniform with mean 0 and variance 1.

    They depend on the seed and the round alone, and are alike on every machine: `FreshRows` draws them from integers,
    where a normal distribution would go through logarithms and cosines that differ in the last bit.
    """
    rows = FreshRows(seed, round_number, "sketch").rows(module, first, last, in_features)
    return rows.double().T * math.sqrt(3.0 * in_features)


def range_sketch(delta: LowRankDelta, omega: Tensor) -> Tensor:
    """B (A Ω), (out, width), float64."""
    return delta.B.double() @ (delta.A.double() @ omega)


def basis(sketch: Tensor) -> Tensor:
    """Q, (out, min(out, width)), float64, with orthonormal columns that span those of the sketch."""
    q: Tensor = torch.linalg.qr(sketch)[0]
    return q


def missing(probes: Tensor, q: Tensor) -> float:
    """An estimate of ‖(I − Q Qᵀ) Σ_k ΔW_k‖_F from `probes`: range sketches (out, PROBES) that Q was not made from.

    E ‖(I − QQᵀ) M ω‖² = ‖(I − QQᵀ) M‖_F² for ω with independent entries of variance 1: the mean over probes is
    unbiased (in the square), and its spread falls with their number and with the rank of what is missing.
    """
    rest = probes - q @ (q.T @ probes)
    return float(torch.linalg.norm(rest)) / math.sqrt(probes.shape[1])


def projection(delta: LowRankDelta, q: Tensor) -> Tensor:
    """(Qᵀ B) A, (width, in), float64."""
    return (q.T @ delta.B.double()) @ delta.A.double()
