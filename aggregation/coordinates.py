"""A round's replies in a basis of their own: small cores instead of factors as long as the model is wide."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from corolla.aggregation.delta import LowRankDelta, low_rank
from corolla.aggregation.exact import exact_mean, in_order, modules_of
from corolla.aggregation.lowrank import add, triangular
from corolla.aggregation.state import ClientUpdate, GlobalModel, Shapes


@dataclass(frozen=True)
class Federation:
    """A round's replies in coordinates: `updates` and `start` have (q, r) and (r, p) factors, q, p <= R.

    `exact` is the exact change C and `mean` M, module -> (q, p); `shapes` are the modules' real (out, in).
    """

    updates: tuple[ClientUpdate, ...]
    weights: Mapping[str, float]
    model: GlobalModel
    mean: Mapping[str, Tensor]
    exact: Mapping[str, Tensor]
    shapes: Shapes

    @property
    def ranks(self) -> dict[str, int]:
        """Client id -> the largest rank of its modules."""
        return {u.client_id: max((d.rank for d in u.adapter.values()), default=0) for u in self.updates}


def in_coordinates(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> Federation:
    """The same round in the basis of each module's own factors: `[B_S B_1 …] = Q_B R_B`, `[A_S; A_1; …]ᵀ = Q_A R_A`.

    Raises ValueError for changes that are not low-rank.
    """
    adapters = {u.client_id: low_rank(u.adapter) for u in in_order(updates)}
    small: dict[str, dict[str, LowRankDelta]] = {client: {} for client in adapters}
    start: dict[str, LowRankDelta] = {}
    shapes = {}
    for module in modules_of(updates, model.start):
        parts = {client: adapter[module] for client, adapter in adapters.items() if module in adapter}
        begin = [model.start[module]] if module in model.start else []
        everything = add([*begin, *parts.values()])
        shapes[module] = everything.shape
        cores = iter(_split(everything, [delta.rank for delta in (*begin, *parts.values())]))
        if begin:
            start[module] = next(cores)
        for client, core in zip(parts, cores, strict=True):
            small[client][module] = core
    reduced = tuple(replace(u, adapter=small[u.client_id]) for u in in_order(updates))
    model = GlobalModel(start=start, round=model.round)
    mean = {module: delta.dense() for module, delta in exact_mean(reduced, weights, start).items()}
    exact = {m: matrix - start[m].dense() if m in start else matrix for m, matrix in mean.items()}
    return Federation(reduced, dict(weights), model, mean, exact, shapes)


def _split(stack: LowRankDelta, ranks: Sequence[int]) -> list[LowRankDelta]:
    """The parts of a stack of these ranks in the basis of the whole, in float64."""
    r_b, r_a = (triangular(factor)[1] for factor in (stack.B, stack.A.T))
    parts = zip(*(torch.split(r, list(ranks), dim=1) for r in (r_b, r_a)), strict=True)
    return [LowRankDelta(a.T.contiguous(), b.contiguous()) for b, a in parts]
