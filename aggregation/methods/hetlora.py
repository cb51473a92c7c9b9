"""HETLoRA: zero-padding weighted by the size of each client's update; clients give up ranks that they do not use."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from corolla.aggregation.algebra import adapter_norm
from corolla.aggregation.delta import LowRankState, low_rank
from corolla.aggregation.exact import certify, in_order
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


def prune(update: ClientUpdate, start: LowRankState, keep: float) -> ClientUpdate:
    """The update cut to ⌊keep · r_k⌋ components, if its tail is now smaller than at the start of the round."""
    adapter = low_rank(update.adapter)
    rank = max((delta.rank for delta in adapter.values()), default=1)
    fewer = smaller_rank(rank, keep)
    before = {module: start[module].first(rank) for module in adapter if module in start}
    if fewer == rank or tail_size(adapter, fewer) >= tail_size(before, fewer):
        return update
    return replace(update, adapter={module: delta.first(fewer) for module, delta in adapter.items()})


def hetlora(keep: float = 0.99, penalty: float = 1e-3) -> Method:
    """HETLoRA (arXiv:2401.06432, from memory: its text was not at hand), `keep` = γ and `penalty` = λ there.

    Clients add λ ‖B_k[:, γr_k:]‖_F ‖A_k[γr_k:]‖_F to their loss. Where that product, summed over modules, has fallen
    over the round, r_k becomes ⌊γ r_k⌋, from this round on; the server keeps the ranks. Then factors are padded with
    zeros and averaged with weights ‖ΔW_k‖_F / Σ_j ‖ΔW_j‖_F. Not exact, and its weights are not those of the run.
    Raises ValueError for a `keep` outside (0, 1] or a negative `penalty`.
    """
    if not 0 < keep <= 1 or penalty < 0:
        raise ValueError(f"hetlora needs keep in (0, 1] and penalty >= 0, got {keep} and {penalty}")

    def aggregate(updates: Sequence[ClientUpdate], weights: Mapping[str, float], model: GlobalModel) -> GlobalUpdate:
        pruned = [prune(update, model.start, keep) for update in in_order(updates)]
        start = zero_padded_mean(pruned, norm_weights(pruned, weights), model.start)
        proof = certify(start, updates, weights, model.start, reason=REASON)
        return GlobalUpdate({}, start, proof, {**model.method_state, **_ranks(pruned)})

    rule = ClientRule(penalty=penalty, keep=keep)
    why = "its clients train with a penalty on their last components"
    return Method("hetlora", shared_start, lambda round: rule, aggregate, common_start=True, foreign=why)


def _ranks(updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    found = {u.client_id: max((d.rank for d in u.adapter.values()), default=1) for u in updates}
    return {RANK_OF + client: torch.tensor([rank]) for client, rank in found.items()}
