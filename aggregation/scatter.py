"""Clients that hold a slice of a module, some of its rows or of its columns, and the mean over those that hold each.

A client whose base was pruned (LoRAM, arXiv:2502.13533) changes ΔW_k = E_I B A E_Jᵀ, E_I placing its rows among all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.aggregation.delta import LowRankDelta
from corolla.aggregation.lowrank import add, scale

Indices = Sequence[int] | Tensor | None
"""Positions in the whole of what a slice holds, in the slice's order; None: all, as they are."""


@dataclass(frozen=True, eq=False)
class Slice:
    """A change of a part of a module: `delta` is (len(rows), len(columns)) of the whole's (out, in)."""

    delta: LowRankDelta
    rows: Indices = None
    columns: Indices = None


def scatter(delta: LowRankDelta, rows: Indices, columns: Indices, shape: tuple[int, int]) -> LowRankDelta:
    """E_I B A E_Jᵀ (out, in) = `shape`: the change of a slice as one of the whole module, zero where it has no part.

    Of the delta's rank and dtype. Raises ValueError for indices that are not whole numbers, out of range, repeated, or
    not as many as the delta has rows or columns.
    """
    at = _positions(rows, delta.shape[0], shape[0], "rows"), _positions(columns, delta.shape[1], shape[1], "columns")
    b, a = delta.B.new_zeros(shape[0], delta.rank), delta.A.new_zeros(delta.rank, shape[1])
    b[at[0]], a[:, at[1]] = delta.B, delta.A
    return LowRankDelta(a, b)


def combine_slices(slices: Mapping[str, Slice], weights: Mapping[str, float], shape: tuple[int, int]) -> LowRankDelta:
    """Row i: Σ_k p_k ΔW_k[i] / Σ_k p_k over the clients that hold row i, in float64 and of rank Σ r_k; or by columns.

    The stack of the scattered changes with the rows of B (or the columns of A) divided by their coverage: exact, since
    that is a diagonal scaling. What nobody holds stays unchanged. Without the division, what few hold would shrink.
    The weights need not sum to 1. Raises ValueError for no slices, weights that are not one positive number for each
    client, what `scatter` raises, and where some hold a part of the rows and some of the columns: then an entry's
    coverage is its own, and no such mean is a product of two factors of that rank.
    """
    if not slices:
        raise ValueError("a combination needs at least one slice, got none")
    _require_weights(slices, weights)
    whole = {k: scatter(s.delta.double(), s.rows, s.columns, shape) for k, s in slices.items()}
    by_rows = _partial(slices, "rows", shape[0])
    by_columns = _partial(slices, "columns", shape[1])
    if by_rows and by_columns:
        raise ValueError(
            f"slices must be of rows or of columns, got a part of the rows at {by_rows[0]} and of the columns at "
            f"{by_columns[0]}: the coverage of both is no diagonal scaling"
        )
    stacked = add([scale(whole[client], weights[client]) for client in sorted(whole)])
    side = "columns" if by_columns else "rows"
    shares = coverage({k: getattr(s, side) for k, s in slices.items()}, weights, shape[1 if by_columns else 0])
    factor = torch.where(shares > 0, 1 / shares, 0.0)
    if by_columns:
        return LowRankDelta(stacked.A * factor, stacked.B)
    return LowRankDelta(stacked.A, stacked.B * factor[:, None])


def coverage(held: Mapping[str, Indices], weights: Mapping[str, float], size: int) -> Tensor:
    """Σ p_k over the clients that hold position i, (size) in float64. Raises ValueError as `scatter` for indices."""
    total = torch.zeros(size, dtype=torch.float64)
    for client in sorted(held):
        indices = held[client]
        count = size if indices is None else len(indices)
        total[_positions(indices, count, size, f"positions of {client}")] += weights[client]
    return total


def _positions(indices: Indices, count: int, size: int, what: str) -> Tensor:
    """The indices as int64, checked: `count` different ones below `size`."""
    found = torch.arange(count) if indices is None else torch.as_tensor(indices)
    if found.ndim != 1 or (found.numel() and (found.is_floating_point() or found.dtype == torch.bool)):
        raise ValueError(f"{what} must be a list of whole numbers, got {found.dtype} of shape {tuple(found.shape)}")
    found = found.long()
    if len(found) != count or (indices is None and count != size):
        raise ValueError(f"{what} must be {count}, as the change has, got {size if indices is None else len(found)}")
    if odd := found[(found < 0) | (found >= size)].tolist():
        raise ValueError(f"{what} must be from 0 to {size - 1}, got {odd[0]}")
    if odd := (torch.bincount(found, minlength=size) > 1).nonzero().flatten().tolist():
        raise ValueError(f"{what} must differ from each other, got {odd[0]} more than once")
    return found


def _partial(slices: Mapping[str, Slice], side: str, size: int) -> list[str]:
    """The clients that hold fewer than all of a side."""
    return [k for k in sorted(slices) if (held := getattr(slices[k], side)) is not None and len(held) < size]


def _require_weights(slices: Mapping[str, Slice], weights: Mapping[str, float]) -> None:
    if odd := sorted(slices.keys() ^ weights.keys()):
        raise ValueError(f"weights must be one for each client of the slices, got a difference in {odd[0]}")
    for client, weight in sorted(weights.items()):
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of {client} must be a positive number, got {weight}")
