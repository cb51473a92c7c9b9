"""HETLoRA: zero-padding weighted by the size of each client's update; clients give up ranks that they do not use."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from corolla.aggregation.algebra import adapter_norm
from corolla.aggregation.delta import LowRankState, low_rank
from corolla.aggregation.exact import certify, in_order
from corolla.aggregation.lowrank import add, zeros
from corolla.aggregation.method import Method
from corolla.aggregation.positions import zero_padded_mean
from corolla.aggregation.start import shared_start
from corolla.aggregation.state import RANK_OF, ClientRule, ClientUpdate, GlobalModel, GlobalUpdate

REASON = "zero-padding with weights by norm instead of by examples"


def norm_weights(updates: Sequence[ClientUpdate], weights: Mapping[str, float]) -> dict[str, float]:
    """‖ΔW_k‖_F / Σ_j ‖ΔW_j‖_F over all modules together; the given weights where nothing moved at all."""
    norms = {update.client_id: adapter_norm(update.adapter) for update in in_order(updates)}
    total = sum(norms.values())
    return {client: size / total for client, size in norms.items()} if total else dict(weights)


def smaller_rank(rank: int, keep: float) -> int:
    """max(1, ⌊keep · rank⌋), the rank after one step of pruning."""
    return max(1, math.floor(keep * rank))


def tail_size(adapter: LowRankState, first: int) -> float:
    """Σ over modules of ‖B[:, first:]‖_F ‖A[first:]‖_F."""
    return sum(
        float(d.B[:, first:].double().norm() * d.A[first:].double().norm()) for d in adapter.values() if d.rank > first
    )


def pruned_rank(update: ClientUpdate, start: LowRankState, keep: float) -> int | None:
    """⌊keep · r_k⌋, if the tail beyond it is now smaller than at the start of the round; None where the rank stays."""
    adapter = low_rank(update.adapter)
    rank = max((delta.rank for delta in adapter.values()), default=1)
    fewer = smaller_rank(rank, keep)
    before = {module: start[module].first(rank) for module in adapter if module in start}
    return fewer if fewer < rank and tail_size(adapter, fewer) < tail_size(before, fewer) else None


def without_tail(update: ClientUpdate, rank: int) -> ClientUpdate:
    """The update with the components from `rank` on at zero: what is given up is gone, not as it was before."""
    kept = {
        module: add([delta.first(rank), zeros(*delta.shape, delta.rank - min(rank, delta.rank))])
        for module, delta in low_rank(update.adapter).items()
    }
    return replace(update, adapter=kept)


def hetlora(keep: float = 0.99, penalty: float = 1e-3) -> Method:
    """HETLoRA (arXiv:2401.06432, from memory: its text was not at hand), `keep` = γ and `penalty` = λ there.

    Clients add λ ‖B_k[:, γr_k:]‖_F ‖A_k[γr_k:]‖_F to their loss. Where that product, summed over modules, has fallen
    over the round, r_k becomes ⌊γ r_k⌋, from this round on: the tail counts as zero, and the server keeps the rank.
    Then factors are padded with zeros and averaged with weights ‖ΔW_k‖_F / Σ_j ‖ΔW_j‖_F. Not exact, and its weights
    are not those of the run.
    Raises ValueError for a `keep` outside (0, 1] or a negative `penalty`.
    """
    if not 0 < keep <= 1 or penalty < 0:
        raise ValueError(f"hetlora needs keep in (0, 1] and penalty >= 0, got {keep} and {penalty}")

    def aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
        fewer = {u.client_id: rank for u in in_order(updates) if (rank := pruned_rank(u, model.start, keep))}
        pruned = [without_tail(u, fewer[u.client_id]) if u.client_id in fewer else u for u in in_order(updates)]
        start = zero_padded_mean(pruned, norm_weights(pruned, weights), model.start)
        proof = certify(start, updates, weights, model.start, reason=REASON)
        ranks = {RANK_OF + client: torch.tensor([rank]) for client, rank in fewer.items()}
        return GlobalUpdate({}, start, proof, {**model.method_state, **ranks})

    rule = ClientRule(penalty=penalty, keep=keep)
    why = "its clients train with a penalty on their last components"
    return Method("hetlora", shared_start, lambda round: rule, aggregate, common_start=True, foreign=why)
