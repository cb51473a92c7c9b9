"""FLoRA: aggregation by stacking, exact for any mix of ranks, scalings and modules."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from corolla.aggregation.delta import LowRankDelta, LowRankState, is_low_rank, low_rank
from corolla.aggregation.exact import certify, exact_means, mean_parts, modules_of
from corolla.aggregation.lowrank import weighted_stack
from corolla.aggregation.method import Method
from corolla.aggregation.start import empty_start
from corolla.aggregation.state import ClientRule, ClientUpdate, GlobalModel, GlobalUpdate

CLAIM = "a stack has no cross terms"
COORDINATES = "each kind of change in the coordinates in which it is linear"


def stack(
    updates: Sequence[ClientUpdate],
    weights: Mapping[str, float],
    start: LowRankState = {},  # noqa: B006  (never written to)
) -> dict[str, LowRankDelta]:
    """Σ_k p_k B_k A_k by concatenation (FLoRA, arXiv:2409.05976): rank Σ r_k, no rounding beyond float32.

    `[p_1 B_1 … p_K B_K] @ [A_1; …; A_K]` in client-id order; the scaling is in B_k already. A module that only some
    clients adapt is summed over those, with the p_k of all: the others changed it by zero. Where the clients began
    from parts of a `start`, what they did not hold of it is put back (`exact_mean`).

    >>> import torch
    >>> from corolla.aggregation import client_weights
    >>> one = LowRankDelta(A=torch.ones(1, 3), B=torch.ones(2, 1))
    >>> two = LowRankDelta(A=torch.ones(4, 3), B=torch.ones(2, 4))
    >>> updates = [ClientUpdate("a", 1, {"q": one}), ClientUpdate("b", 3, {"q": two})]
    >>> stack(updates, client_weights(updates))["q"].dense()  # 1/4 * 1 + 3/4 * 4
    tensor([[3.2500, 3.2500, 3.2500],
            [3.2500, 3.2500, 3.2500]])
    """
    replies = [replace(update, adapter=low_rank(update.adapter)) for update in updates]
    stacked = {}
    for module in modules_of(replies, start):
        parts = mean_parts(module, replies, weights, start)
        stacked[module] = weighted_stack(cast(Sequence[tuple[LowRankDelta, float]], parts))
    return stacked


def _aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
    if all(is_low_rank(update.adapter) for update in updates):
        merge = {module: delta.single() for module, delta in stack(updates, weights, model.start).items()}
        return GlobalUpdate(merge, {}, certify(merge, updates, weights, model.start, claim=CLAIM))
    means = {module: delta.single() for module, delta in exact_means(updates, weights, model.start)}
    return GlobalUpdate(means, {}, certify(means, updates, weights, model.start, claim=COORDINATES))


def flora() -> Method:
    """The stack is merged, every client begins afresh (B = 0) in the next round. Exact.

    Changes that are not low-rank are combined by the rule of their own algebra: Σ p_k in linear coordinates.
    """
    return Method(
        "flora", empty_start, lambda round: ClientRule(), _aggregate, merges=True, by_product=True, of_the_sum=True
    )
